"""The training steps and epochs that `modern-llm bench --peers` compares with those of other
programs; the work is shown to be the same before it is timed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modern_llm.config import DPOConfig, ModelConfig, SFTConfig, TrainConfig
from modern_llm.data.chat import PackedExamples
from modern_llm.data.packing import IGNORED
from modern_llm.data.pairs import encode_pairs, preference_pairs
from modern_llm.data.tokens import end_of_text_id, load_tokenizer, train_tokenizer
from modern_llm.evaluation.peers import PlainGPT, peak_bytes, take_turns
from modern_llm.models.counts import flops_per_token, parameter_count
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model
from modern_llm.training.dpo import PairBatches, dpo_loss, pair_log_probs
from modern_llm.training.optim import lm_loss, lm_loss_for
from modern_llm.training.sft import encode_examples, instructions, save_chat_model
from modern_llm.training.train_step import optimizer_step, prepare_module
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import TrainingState, training_precision

CPU = torch.device("cpu")
OURSELVES = "ourselves (A/A)"  # the peer whose ratio is 1 but for chance
LLAMA = ModelConfig(use_qk_norm=False, zero_init_outputs=False)  # what transformers' Llama has too
SHAPES = {
    "0.9M": replace(LLAMA, width=128, num_layers=4, num_heads=4, num_kv_heads=2, ffn_width=384),
    "5.8M": replace(LLAMA, vocab_size=4096, width=256, num_layers=6, num_heads=4, num_kv_heads=2,
                    ffn_width=768),
    "vocabulary 50,304": replace(LLAMA, vocab_size=50304, width=256, num_layers=6, num_heads=4,
                                 num_kv_heads=2, ffn_width=768),
    "width 768": replace(LLAMA, vocab_size=4096, width=768, num_layers=12, num_heads=12,
                         num_kv_heads=4, ffn_width=2048),
    "135M": replace(LLAMA, vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3,
                    ffn_width=1536)}


@dataclass
class Bench:
    """What all lines of a run share."""

    quick: bool
    shapes: dict[str, ModelConfig] = field(default_factory=lambda: SHAPES)
    peaks: dict[str, float] = field(default_factory=dict)  # operations per second
    compiled: tuple[str, ...] = ("5.8M", "vocabulary 50,304")  # tried where it is not quick

    @property
    def bf16(self) -> bool:
        """Whether the processor multiplies faster in bfloat16, by its own measurement."""
        return self.peaks["bf16"] > 1.5 * self.peaks["fp32"]

    @property
    def turns(self) -> dict:
        """How long a line is measured."""
        return {"pairs": 3, "seconds": 2.0 if self.quick else 15.0}


# ---- training steps ------------------------------------------------------------------------------


def random_batch(cfg: ModelConfig, rows: int) -> dict[str, Tensor]:
    """Rows of random tokens; labels are the next ones, the last of each row is not trained."""
    ids = torch.randint(0, cfg.vocab_size, (rows, cfg.context_length),
                        generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    return {"input_ids": ids, "labels": labels}


def our_step(cfg: ModelConfig, rows: int, precision: str = "fp32", compiled: bool = False,
             model: nn.Module | None = None) -> Callable[[], float]:
    """A whole step of this package with AdamW, which gives the loss before the update."""
    train = TrainConfig(optimizer="adamw", lr=1e-4, batch_size=rows, precision=precision,
                        compile=compiled)
    state = TrainingState(model or ModernDecoderLM(cfg), train, CPU)
    prepare_module(state.module, train)
    loss, batch = lm_loss_for(train), random_batch(cfg, rows)

    def step() -> float:
        out, _ = optimizer_step(state, loss, batch, train, 1.0)
        return float(out.total / out.count)

    return step


def plain_step(model: nn.Module, batch: dict[str, Tensor], precision: str = "fp32",
               compiled: bool = False, fused: bool | None = True,
               lr: float = 1e-4) -> Callable[[], float]:
    """A step as PyTorch's tutorials write it; the model returns a loss, or an object that has one.
    The gradient is clipped and the optimizer AdamW, as on our side.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], lr=lr,
                                  betas=(0.9, 0.95), fused=fused)
    call = torch.compile(model) if compiled else model
    model.train()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = call(**batch)
        loss = getattr(out, "loss", out)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class ShiftedLlama(nn.Module):
    """transformers' model with labels that are shifted already; its loss is transformers' own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean nats per token."""
        return self.model(input_ids=input_ids, labels=input_ids, shift_labels=labels,
                          use_cache=False).loss


def llama_of(model: ModernDecoderLM) -> nn.Module:
    """transformers' Llama with the same weights."""
    quiet_transformers()
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        return ShiftedLlama(AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"))


def quiet_transformers() -> None:
    """No bars and no advice between the lines of the table."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class LitLoss(nn.Module):
    """litgpt's model of the same shape, with its loss function."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        from litgpt import GPT, Config
        from litgpt.utils import chunked_cross_entropy

        self.loss = chunked_cross_entropy
        self.model = GPT(Config(
            name="same", block_size=cfg.context_length, vocab_size=cfg.vocab_size,
            padded_vocab_size=cfg.vocab_size, n_layer=cfg.num_layers, n_head=cfg.num_heads,
            n_embd=cfg.width, n_query_groups=cfg.num_kv_heads, intermediate_size=cfg.ffn_width,
            rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP"))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean nats per token."""
        return self.loss(self.model(input_ids), labels, chunk_size=0, ignore_index=IGNORED)


def faster_of(programs: dict[str, Callable[[], Callable]]) -> str:
    """The name of the program that is fastest after warming up; one that cannot be made is none."""
    found = {}
    for name, build in programs.items():
        with contextlib.suppress(Exception):  # no compiler, say
            step = build()
            step(), step()
            started = time.perf_counter()
            step(), step()
            found[name] = time.perf_counter() - started
    return min(found, key=found.get)


def compare_steps(bench: Bench, shape: str, rows: int, peer: str, best: bool = True) -> dict:
    """A training step of ours and of a peer: tokens per second, memory, share of the limit."""
    cfg = bench.shapes[shape]
    precision = "bf16" if best and bench.bf16 else "fp32"
    own = precision if best else training_precision("auto", CPU)  # as shipped
    torch.manual_seed(0)
    model = ModernDecoderLM(cfg)
    batch, flops = random_batch(cfg, rows), flops_per_token(cfg)
    makers = {"transformers": lambda: llama_of(model), "litgpt": lambda: LitLoss(cfg),
              "nanoGPT's recipe": lambda: PlainGPT(cfg.vocab_size, cfg.context_length, cfg.width,
                                                   cfg.num_layers, cfg.num_heads),
              OURSELVES: lambda: model}
    builds = {
        "ours": lambda compiled=False: our_step(cfg, rows, own, compiled, ModernDecoderLM(cfg)),
        "peer": lambda compiled=False: plain_step(makers[peer](), batch, precision, compiled,
                                                  fused=True if best else None)}
    if peer == OURSELVES:
        builds["peer"] = builds["ours"]
    one = makers[peer]()
    size = sum(p.numel() for p in one.parameters())
    if peer == "transformers":
        ours, theirs = our_step(cfg, rows, model=model)(), plain_step(one, batch)()
        if abs(ours - theirs) > 1e-4:
            raise ValueError(f"the losses differ: {ours} and {theirs}")
        checked = "same weights, same loss to 1e-4"
    else:
        checked = f"parameters {parameter_count(cfg)['total']:,} and {size:,}"
    peer_flops = one.flops_per_token() if hasattr(one, "flops_per_token") else flops
    chosen = dict.fromkeys(builds, "eager")
    if best and not bench.quick and shape in bench.compiled:
        chosen = {name: faster_of({"eager": build, "compiled": partial(build, compiled=True)})
                  for name, build in builds.items()}
    step = {name: build(compiled=chosen[name] == "compiled") for name, build in builds.items()}
    tokens = rows * cfg.context_length
    found = take_turns(step["ours"], step["peer"], **bench.turns)
    del step
    shown = {"ours": f"{own}, fused AdamW, {chosen['ours']}",
             "peer": (f"{precision}, sdpa, fused AdamW, {chosen['peer']}" if best
                      else "fp32, sdpa, AdamW as torch has it, eager")}
    return {**found, "unit": "tokens", "units": tokens, "checked": checked,
            "limit": f"matrix product in {own if own == precision else f'{own} and {precision}'}",
            "ours_of_limit": tokens * flops / bench.peaks[own] / found["ours_s"],
            "peer_of_limit": tokens * peer_flops / bench.peaks[precision] / found["peer_s"],
            **{f"{name}_settings": words for name, words in shown.items()},
            **{f"{name}_gb": peak_bytes(build) / 1e9 for name, build in builds.items()}}


# ---- epochs of SFT and DPO -----------------------------------------------------------------------


def chat_folder(folder: Path, cfg: ModelConfig, texts: list[str]) -> ModelConfig:
    """A random chat model whose tokenizer was trained on the texts, as any checkpoint."""
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    torch.manual_seed(0)
    save_chat_model(folder, ModernDecoderLM(cfg), tokenizer)
    return cfg


def train_epoch(model: nn.Module, loss: Callable, batches: Callable, steps: int,
                train: TrainConfig) -> None:
    """Train for some steps with the package's trainer, in a folder that is thrown away."""
    train = replace(train, max_steps=steps, log_every=steps, eval_every=steps + 1,
                    checkpoint_every=steps + 1, keep_checkpoints=0)
    with tempfile.TemporaryDirectory() as place:
        Trainer(model, loss, batches, train, Path(place) / "run", device="cpu",
                progress_bar=False).fit()


def trl_arguments(kind: type, place: str, cfg: ModelConfig, rows: int, bf16: bool, **more):
    """What trl gets: one epoch, no checkpoints in between, no logs, no recomputation."""
    return kind(output_dir=place, use_cpu=True, bf16=bf16, gradient_checkpointing=False,
                max_length=cfg.context_length, num_train_epochs=1, learning_rate=1e-4,
                per_device_train_batch_size=rows, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, **more)


def compare_sft(bench: Bench, shape: str, rows: int, number: int, source: str) -> dict:
    """An epoch of SFT from messages in memory and a model's folder to trained weights."""
    quiet_transformers()
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig as TheirConfig
    from trl import SFTTrainer

    datasets.disable_progress_bars()
    examples = [e for e in instructions(source, "train", number) if e.request and e.output.strip()]
    cfg, precision = bench.shapes[shape], "bf16" if bench.bf16 else "fp32"
    train = SFTConfig(optimizer="adamw", lr=1e-4, batch_size=rows, precision=precision)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        chat_folder(folder, cfg, [f"{e.request}\n{e.output}" for e in examples])
        trained: dict[str, int] = {}

        def ours() -> None:
            tokenizer = load_tokenizer(folder)
            encoded, counts = encode_examples(tokenizer, examples, cfg.context_length)
            trained["ours"] = counts["tokens"]
            batches = PackedExamples(encoded, cfg.context_length, rows,
                                     pad_id=end_of_text_id(tokenizer))
            train_epoch(load_model(folder), lm_loss, batches,
                        -(-batches.rows_per_epoch // rows), train)

        def theirs() -> None:
            data = datasets.Dataset.from_list([
                {"prompt": e.messages[:-1], "completion": e.messages[-1:]} for e in examples])
            with tempfile.TemporaryDirectory() as out:
                trainer = SFTTrainer(
                    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                    args=trl_arguments(TheirConfig, out, cfg, rows, bench.bf16, packing=True),
                    train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder))
                with silenced():
                    trainer.train()
                trained["peer"] = sum(len(row["input_ids"]) for row in trainer.train_dataset)

        found = take_turns(ours, theirs, **bench.turns)
    if abs(trained["peer"] / trained["ours"] - 1) > 0.03:
        raise ValueError(f"not the same tokens: {trained}")
    return {**found, "unit": "examples", "units": len(examples),
            "checked": f"tokens read {trained['ours']:,} and {trained['peer']:,}",
            "ours_settings": f"{precision}, packed, fused AdamW",
            "peer_settings": f"{precision}, packing=True, fused AdamW, no recomputation"}


def compare_dpo(bench: Bench, shape: str, rows: int, number: int, source: str) -> dict:
    """An epoch of DPO, reference included, from pairs in memory and a model's folder."""
    quiet_transformers()
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer

    datasets.disable_progress_bars()
    pairs = preference_pairs(source, "train", number)[0]
    cfg, precision = bench.shapes[shape], "bf16" if bench.bf16 else "fp32"
    train = DPOConfig(optimizer="adamw", lr=1e-4, batch_size=rows, precision=precision)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        chat_folder(folder, cfg, [f"{pair.request}\n{pair.chosen}" for pair in pairs])
        kept = encode_pairs(load_tokenizer(folder), pairs, cfg.context_length)[0]
        pairs = [example.pair for example in kept]  # those that both can use whole

        def ours() -> None:
            examples = encode_pairs(load_tokenizer(folder), pairs, cfg.context_length)[0]
            model = load_model(folder)
            batches = PairBatches(examples, pair_log_probs(model, examples), rows)
            train_epoch(model, partial(dpo_loss, cfg=train), batches, batches.per_epoch, train)

        def theirs() -> None:
            turn = lambda text: [{"role": "assistant", "content": text}]
            data = datasets.Dataset.from_list([
                {"prompt": list(pair.prompt), "chosen": turn(pair.chosen),
                 "rejected": turn(pair.rejected)} for pair in pairs])
            with tempfile.TemporaryDirectory() as out, silenced():
                DPOTrainer(
                    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                    args=trl_arguments(TheirConfig, out, cfg, rows, bench.bf16,
                                       precompute_ref_log_probs=True),
                    train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)
                ).train()

        found = take_turns(ours, theirs, **bench.turns)
    return {**found, "unit": "pairs", "units": len(pairs), "checked": "the same pairs",
            "ours_settings": f"{precision}, sorted by length, reference computed once, fused AdamW",
            "peer_settings": f"{precision}, precompute_ref_log_probs=True, fused AdamW, "
                             "no recomputation"}


@contextlib.contextmanager
def silenced():
    """What a peer prints is not a line of the table."""
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        yield
