"""What `modern-llm bench` measures: matrix products, training steps, memory of every stage, sampling,
a short real run.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from modern_llm.config import ModelConfig, PipelineConfig, TrainConfig
from modern_llm.models.counts import flops_per_token, inference_memory, training_memory
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.verifier import VerifierModel
from modern_llm.training.bench_lines import KERNELS, Shape
from modern_llm.training.dpo import dpo_loss
from modern_llm.training.grpo import grpo_loss
from modern_llm.training.optim import lm_loss_for
from modern_llm.training.pretrain import Pretraining
from modern_llm.training.recording import mfu_scale, peak_flops, peak_memory_gb
from modern_llm.training.train_step import (
    batch_tokens, optimizer_step, prepare_loss, prepare_module,
)
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import TrainingState, compute_dtype
from modern_llm.training.verifier import verifier_loss

# ---- tools ---------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def forget(device: torch.device) -> None:
    """Give back what a line has left: compiled code, cached memory; the peak begins anew."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed_of(call: Callable[[], object], device: torch.device,
             seconds: float) -> tuple[float, float]:
    """Seconds of a call: the median of five groups of calls, and the largest difference to it as a
    share. Warmed up by the caller; the host waits for the device only after each group.
    """
    wait_for(device)
    started = time.perf_counter()
    call()
    wait_for(device)
    number = max(1, round(seconds / (time.perf_counter() - started)))
    found = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(number):
            call()
        wait_for(device)
        found.append((time.perf_counter() - started) / number)
    middle = statistics.median(found)
    return middle, max(abs(each / middle - 1) for each in found)


def attention_kernel(name: str) -> contextlib.AbstractContextManager:
    """Inside, attention is computed by that kernel of KERNELS alone, or as in training."""
    return sdpa_kernel(KERNELS[name]) if name in KERNELS else contextlib.nullcontext()


def compiler_for(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, programs are compiled as training does it; on a CPU they are traced, but no code is
    generated, which would take minutes.
    """
    if device.type == "cuda":
        return contextlib.nullcontext()
    return patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def random_rows(cfg: ModelConfig, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of random tokens, in memory from which a GPU can read while it works."""
    ids = torch.randint(0, cfg.vocab_size, (rows, cfg.context_length),
                        generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    return ({name: value.pin_memory() for name, value in batch.items()} if device.type == "cuda"
            else batch)


def stage_step(stage: str, model: ModernDecoderLM, train: TrainConfig, device: torch.device
               ) -> tuple[nn.Module, Callable, dict[str, Tensor]]:
    """What a stage trains, its loss, and one full micro-batch of random tokens, all of them trained
    or judged.
    """
    cfg, rows = model.cfg, train.micro_batch
    batch = random_rows(cfg, rows, device)
    halves = torch.arange(cfg.context_length).ge(cfg.context_length // 2).long().expand(rows, -1)
    loss: Callable = lm_loss_for(train)
    if stage == "sft":
        batch["segment_ids"] = halves + 1
    elif stage == "dpo":
        batch = {f"{side}_{name}": value.roll(shift, 0)
                 for shift, side in enumerate(("chosen", "rejected"))
                 for name, value in batch.items()}
        batch |= {f"reference_{side}": torch.full((rows,), -20.0)
                  for side in ("chosen", "rejected")}
        loss = partial(dpo_loss, cfg=train)
    elif stage == "grpo":
        answer = torch.ones(rows, cfg.context_length, dtype=torch.bool)
        answer[:, 0] = False
        batch = {"input_ids": batch["input_ids"], "answer": answer,
                 "old_log_p": torch.full(answer.shape, -math.log(cfg.vocab_size)),
                 "weight": 1 / answer.sum(1)}
        batch |= {name: torch.ones(rows)
                  for name in ("advantage", "reward", "right", "ended", "spread")}
        loss = partial(grpo_loss, cfg=train)
    elif stage == "verifier":
        answers = torch.ones(rows, cfg.context_length, dtype=torch.long)
        answers[:, 0] = 0
        batch = {"input_ids": batch["input_ids"], "segment_ids": torch.ones_like(answers),
                 "answers": answers, "weights": answers / answers.sum(1, keepdim=True),
                 "targets": torch.ones(rows, cfg.context_length)}
        return VerifierModel(model, train).to(device), partial(verifier_loss,
                                                               lm_weight=train.lm_weight), batch
    return model, loss, batch


# ---- measures ------------------------------------------------------------------------------------


def measure_matrix(shape: Shape, device: torch.device, peaks: dict, dtype: str) -> dict:
    """FLOP/s of one large matrix product, and their share of the data sheet's."""
    torch.set_float32_matmul_precision("high" if dtype == "TF32" else "highest")
    kind = compute_dtype("fp32" if dtype == "TF32" else dtype, device)
    a, b = (torch.randn(shape.matrix, shape.matrix, device=device).to(kind) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds, spread = speed_of(lambda: a @ b, device, shape.seconds / 5)
    speed = 2 * shape.matrix**3 / seconds
    sheet = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else "", kind)
    return {"tflops": speed / 1e12, "of_data_sheet": speed / sheet if sheet else None,
            "spread": spread}


@dataclass
class PreparedStep:
    """A whole pretraining step, ready to be called, and what it is a step of."""

    cfg: ModelConfig
    train: TrainConfig
    state: TrainingState
    batch: dict[str, Tensor]
    call: Callable[[], tuple]


def prepare_step(shape: Shape, device: torch.device, precision: str, matmul: str, compiled: str,
                 micro_batch: int, optimizer: str, heads: int) -> PreparedStep:
    """A step of one micro-batch with these settings, on random tokens; made and called inside
    `compiler_for` the device.
    """
    cfg = replace(shape.config.model, num_heads=heads, num_kv_heads=heads)
    train = replace(shape.config.pretrain, batch_size=micro_batch, micro_batch_size=micro_batch,
                    precision=precision, optimizer=optimizer,
                    compile={"nothing": False, "model": "model"}.get(compiled, True))
    torch.manual_seed(0)
    with device:
        model = ModernDecoderLM(cfg)
    state, batch = TrainingState(model, train, device), random_rows(cfg, micro_batch, device)
    torch.set_float32_matmul_precision(matmul)
    prepare_module(model, train)
    loss = lm_loss_for(replace(train, compile=False) if compiled == "blocks" else train)
    loss = prepare_loss(loss, train, device)
    return PreparedStep(cfg, train, state, batch,
                        partial(optimizer_step, state, loss, batch, train, 0.01))


def measure_step(shape: Shape, device: torch.device, peaks: dict, precision: str, matmul: str,
                 attention: str, **settings) -> dict:
    """Tokens per second of a whole pretraining step of one micro-batch, optimizer included; MFU
    against the data sheet and against the matrix product of the same dtype; memory and its
    estimate.
    """
    with attention_kernel(attention), compiler_for(device):
        step = prepare_step(shape, device, precision, matmul, **settings)
        started = time.perf_counter()
        step.call()
        wait_for(device)
        first = time.perf_counter() - started
        for _ in range(2):
            out, _ = step.call()
        if not torch.isfinite(out.total):
            raise ValueError(f"the loss is {out.total}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, spread = speed_of(step.call, device, shape.seconds / 5)
    tokens = batch_tokens(step.batch) / seconds
    flops = flops_per_token(step.cfg)
    scale = mfu_scale(flops, step.state)
    matrix = peaks.get("TF32" if precision == "fp32" and matmul == "high" else precision)
    return {"tokens_per_s": tokens, "step_ms": 1000 * seconds, "spread": spread,
            "mfu": tokens * scale if scale else None,
            "of_matrix": tokens * flops / (1e12 * matrix) if matrix else None,
            "first_step_s": first,
            **memory_found(device, training_memory(step.cfg, step.train)["total"])}


def memory_found(device: torch.device, estimate: int) -> dict:
    """Peak of the tensors, peak that the allocator took, and the estimate, in 10^9 bytes."""
    peak = peak_memory_gb(device)
    return {"estimate_gb": estimate / 1e9, "peak_gb": peak,
            "reserved_gb": (torch.cuda.max_memory_reserved(device) / 1e9 if peak is not None
                            else None),
            "estimate_over_peak": estimate / 1e9 / peak if peak else None}


def measure_memory(shape: Shape, device: torch.device, peaks: dict, stage: str) -> dict:
    """Peak memory of a step of a stage with the micro-batch of the preset, not compiled, beside its
    estimate.
    """
    train = getattr(shape.config, stage)
    train = replace(train, batch_size=train.micro_batch, precision="bf16", ema_decay=None,
                    compile=False)
    torch.manual_seed(0)
    with device:
        model = ModernDecoderLM(shape.config.model)
    module, loss, batch = stage_step(stage, model, train, device)
    torch.set_float32_matmul_precision("high")
    prepare_module(module, train)
    state = TrainingState(module, train, device)
    # the optimizer's averages are there from now on
    optimizer_step(state, loss, batch, train, 0.01)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    optimizer_step(state, loss, batch, train, 0.01)
    wait_for(device)
    return {"micro_batch": train.micro_batch, "optimizer": train.optimizer,
            "step_ms": 1000 * (time.perf_counter() - started),
            **memory_found(device, training_memory(shape.config.model, train)["total"])}


def measure_sampling(shape: Shape, device: torch.device, peaks: dict, rows: int,
                     dtype: str, record: bool = False) -> dict:
    """New tokens per second over all rows, which grow together; recorded or not."""
    cfg = shape.config.model
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with device:
        model = ModernDecoderLM(cfg).to(compute_dtype(dtype, device))
    prompts = [[(7 * row + 13 * at) % cfg.vocab_size for at in range(cfg.context_length // 4)]
               for row in range(rows)]
    generate(model, prompts, max_new_tokens=2)  # warm
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    answers = generate(model, prompts, max_new_tokens=shape.new_tokens, record=record)
    wait_for(device)
    seconds = time.perf_counter() - started
    estimate = inference_memory(cfg, rows, len(prompts[0]) + shape.new_tokens,
                                compute_dtype(dtype, device).itemsize, len(prompts[0]))["total"]
    return {"tokens_per_s": sum(map(len, answers)) / seconds,
            "step_ms": 1000 * seconds / shape.new_tokens, **memory_found(device, estimate)}


@dataclass
class WorldRun:
    """A short run on the built-in world, as chapter 03 makes it."""

    config: PipelineConfig
    device: str
    folder: Path
    start = None

    def trainer(self, model, loss, batches, recipe, **others) -> Trainer:
        """A Trainer of the settings, without model files."""
        given = {"cfg": self.config.pretrain, "evaluate": recipe.evaluate, "device": self.device,
                 "seed": self.config.seed, "progress_bar": False,
                 "flops_per_token": flops_per_token(self.config.model)}
        return Trainer(model, loss, batches, folder=self.folder, **(given | others))


def measure_training(shape: Shape, device: torch.device, peaks: dict, rows_to: Path) -> dict:
    """A real run: its last held-out loss, how far that is above the entropy floor, and its rows of
    metrics, which are left in the file `rows_to`.
    """
    with tempfile.TemporaryDirectory() as place:
        run = WorldRun(shape.world, str(device), Path(place) / "run")
        recipe = Pretraining(run)
        floor = (sum(cache.floor_nats for cache in recipe.validation_caches.values())
                 / sum(cache.num_tokens for cache in recipe.validation_caches.values()))
        result = recipe.fit()
        shutil.copyfile(run.folder / "metrics.jsonl", rows_to)
    last = result.history[-1]
    return {"steps": result.step, "tokens": result.tokens, "loss": last["val_loss"],
            "floor": floor, "tokens_per_s": result.tokens / result.seconds, "mfu": last["mfu"],
            "data_wait_s": sum(row.get("data_wait_s") or 0 for row in result.history),
            "peak_gb": last["peak_memory_gb"]}


MEASURES = {"matrix": measure_matrix, "step": measure_step, "memory": measure_memory,
            "sampling": measure_sampling, "training": measure_training}
