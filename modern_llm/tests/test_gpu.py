"""What only a GPU can show: its kernels, precisions, compiler, memory and NCCL against the CPU.

    python -m pytest -n 0 modern_llm/tests/test_gpu.py    # about 3 minutes

The same bodies, where there is no GPU:

    MODERN_LLM_TEST_DEVICE=cpu python -m pytest -n 0 modern_llm/tests/test_gpu.py

It needs torch, numpy, safetensors, tokenizers, tqdm, click, pandas, matplotlib, pytest with
pytest-xdist, and hypothesis.
"""

from __future__ import annotations

import os

# before CUDA starts: without it, matrix products are not the same twice
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modern_llm.config import TRAINED, ModelConfig, TrainConfig
from modern_llm.models.attention import attend, attention_mask, attention_weights
from modern_llm.models.counts import flops_per_token, training_memory
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.experts import MixtureOfExperts, grouped_experts, has_grouped_kernel
from modern_llm.models.generation import generate
from modern_llm.models.layers import SwiGLU
from modern_llm.models.packed import BlockAttention, DocumentAttention, block_mask, plan_attention
from modern_llm.tests.test_hardware import MODEL, MODELS, rows_of, stage_of
from modern_llm.tests.test_memory import LiveBytes
from modern_llm.training.bench_lines import shape_for
from modern_llm.training.bench_measures import forget, measure_memory, random_rows, stage_step
from modern_llm.training.distributed import DataParallelLoss, World
from modern_llm.training.optim import gather_tensor, lm_loss
from modern_llm.training.train_step import optimizer_step
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import (
    HOPPER, TrainingState, attention_order, compute_dtype, forward_context, inference_dtype,
    set_inference_precision,
)

DEVICE = torch.device(os.environ.get("MODERN_LLM_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(),
    reason="no CUDA GPU here (MODERN_LLM_TEST_DEVICE=cpu runs the same on the CPU)")
CPU = torch.device("cpu")
WIDE = replace(MODEL, vocab_size=512, context_length=128, width=128, num_heads=4, num_kv_heads=2,
               ffn_width=256)


@pytest.fixture(autouse=True)
def clean():
    """Every test begins with exact float32 products and an empty GPU."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)
    forget(DEVICE)


@pytest.fixture
def repeatable():
    """Inside, the GPU adds in the same order every time."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def wide_rows(step: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """A batch for WIDE, another one at every step, with a rule that can be learned."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, 512, (rows, 1), generator=generator)
    ids = (first + 7 * torch.arange(129)) % 512
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def loss_and_gradients(module: nn.Module, loss, batch: dict, device: torch.device,
                       precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss per item and every gradient, on the CPU in float32, of a copy on a device."""
    module = deepcopy(module).to(device)
    state = TrainingState(module, TrainConfig(precision=precision), device)
    with state.autocast():
        out = loss(module, {name: value.to(device) for name, value in batch.items()})
    out.total.backward()
    return ((out.total / out.count).item(), {
        name: p.grad.float().cpu() for name, p in module.named_parameters() if p.grad is not None})


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([value.flatten() for value in gradients.values()])


# ---- loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", ["pretrain", "dpo with replay", "verifier"])
def test_float32_is_the_cpus(stage, model):
    module, loss, batches, _ = stage_of(stage, MODELS[model])
    expected, gradients = loss_and_gradients(module, loss, batches(0), CPU, "fp32")
    found, others = loss_and_gradients(module, loss, batches(0), DEVICE, "fp32")
    assert found == pytest.approx(expected, rel=1e-4) and others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3,
                                   atol=1e-4 * (1 + gradient.abs().max().item()), msg=name)


@pytest.mark.parametrize("precision", ["bf16", *["fp16"] * ON_GPU])  # slow on a CPU
@pytest.mark.parametrize("kind", ["plain", "sinks", "window", "segments"])
def test_sixteen_bits_are_near_the_cpus_float32(precision, kind):
    cfg = replace(WIDE, use_attention_sinks=kind == "sinks",
                  sliding_window=32 if kind == "window" else None)
    torch.manual_seed(1)
    module, batch = ModernDecoderLM(cfg), wide_rows(0)
    if kind == "segments":
        batch["segment_ids"] = torch.arange(128).div(48, rounding_mode="floor").expand(8, -1) + 1
    expected, gradients = loss_and_gradients(module, lm_loss, batch, CPU, "fp32")
    found, others = loss_and_gradients(module, lm_loss, batch, DEVICE, precision)
    assert found == pytest.approx(expected, rel=2e-3)
    one, other = flat(gradients), flat(others)
    assert torch.cosine_similarity(one, other, 0) > 0.999
    assert other.norm().item() == pytest.approx(one.norm().item(), rel=0.02)


# ---- attention -----------------------------------------------------------------------------------

MASKS = {
    "causal": {}, "window": {"window": 24},
    "documents": {"segment_ids": torch.arange(128).div(50, rounding_mode="floor").expand(2, -1)},
    "padding": {"pad_lengths": torch.tensor([0, 17])},
}


def check_attention(dtype: torch.dtype, heads: int, groups: int, t: int, mask, sinks: bool,
                    attention=None) -> None:
    """`attend`, or another attention, against `attention_weights`, values and gradients of
    everything that goes in.
    """
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    inputs = [draw(2, heads, t, 64), draw(2, groups, 128, 64), draw(2, groups, 128, 64)]
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    weight = draw(2, heads, t, 64).to(DEVICE)
    sink = draw(heads).to(DEVICE).requires_grad_() if sinks else None
    wanted = [*inputs, sink] if sinks else inputs
    plain = (attention_weights(*inputs[:2], mask, sink)
             @ inputs[2].float().repeat_interleave(heads // groups, dim=1))
    fused = attention(*inputs, sink) if attention else attend(*inputs, mask, sink)
    assert fused.dtype == dtype
    tolerance = 2e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(fused.float(), plain, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad((plain * weight).sum(), wanted)
    found = torch.autograd.grad((fused.float() * weight).sum(), wanted)
    for one, other in zip(found, expected):
        scale = other.float().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance,
                                   atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("t, kind", [(128, "causal"), (1, "causal"), (128, "window"),
                                     (128, "documents"), (128, "padding"), (40, "padding")])
def test_every_path_of_attention_is_the_plain_one(dtype, groups, sinks, t, kind):
    options = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
               for name, value in MASKS[kind].items()}
    check_attention(dtype, 4, groups, t, attention_mask(t, 128, device=DEVICE, **options), sinks)


@pytest.mark.parametrize(
    "kernel", ["FLASH_ATTENTION", *["CUDNN_ATTENTION", "EFFICIENT_ATTENTION"] * ON_GPU, "MATH"])
def test_every_kernel_is_the_plain_one(kernel):
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        check_attention(torch.bfloat16, 4, 4, 128, None, sinks=False)


@pytest.fixture
def flex_by_formula(monkeypatch):
    """Where there is no kernel: FlexAttention's formula, which has a gradient there as well."""
    if not ON_GPU:
        from torch.nn.attention import flex_attention

        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("documents", [False, True])
def test_skipped_blocks_were_masked(dtype, groups, sinks, window, documents, flex_by_formula):
    segments = MASKS["documents"]["segment_ids"].to(DEVICE) if documents else None
    mask = attention_mask(128, 128, window=window, segment_ids=segments, device=DEVICE)
    attention = BlockAttention(block_mask(128, window, segments, DEVICE))
    check_attention(dtype, 4, groups, 128, mask, sinks, attention)


@pytest.mark.parametrize("sinks", [False, True])
def test_packed_rows_choose_their_attention_and_compile(sinks, monkeypatch):
    """A step on packed rows, compiled or not, has the loss and the gradients of the CPU's mask."""
    cfg = replace(WIDE, use_attention_sinks=sinks, context_length=256)
    ids = torch.randint(0, 512, (2, 257), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:],
             "segment_ids": torch.arange(256).div(100, rounding_mode="floor").expand(2, -1) + 1}
    plan = plan_attention(cfg, 256, batch["segment_ids"].to(DEVICE), device=DEVICE)
    assert isinstance(plan, BlockAttention if ON_GPU else DocumentAttention)
    torch.manual_seed(1)
    module = ModernDecoderLM(cfg)
    with monkeypatch.context() as patched:
        patched.setattr("modern_llm.models.packed.documents_pay", lambda *sizes: False)
        expected, gradients = loss_and_gradients(module, lm_loss, batch, CPU, "fp32")
    module.to(DEVICE)
    whole = torch.compile(lm_loss, backend="eager")  # traced with the plan of attention in it
    for loss, backend in ((lm_loss, None), (whole, None),
                          (lm_loss, "inductor" if ON_GPU else "eager")):
        for block in module.layers if backend else ():
            block.compile(backend=backend)
        out = loss(module, {name: value.to(DEVICE) for name, value in batch.items()})
        found = dict(zip(gradients, torch.autograd.grad(out.total, list(module.parameters()))))
        assert (out.total / out.count).item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(flat(found).cpu(), flat(gradients), rtol=1e-3, atol=1e-4)


# ---- training ------------------------------------------------------------------------------------

STEPS = TrainConfig(max_steps=6, batch_size=8, micro_batch_size=4, warmup_steps=2, lr=3e-3,
                    muon_lr=1e-2, keep_checkpoints=0, log_every=1, ema_decay=0.5)


def run_in(folder, cfg: TrainConfig, model: ModelConfig = WIDE, **options):
    """A trained model, and the rows of its metrics."""
    torch.manual_seed(4)
    module = ModernDecoderLM(model)
    result = Trainer(module, lm_loss, wide_rows, cfg, folder, device=str(DEVICE),
                     progress_bar=False, flops_per_token=flops_per_token(model), **options).fit()
    return module, result.history


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sinks, compiled", [(False, True), (True, True), (True, "model")])
def test_compiled_or_not_is_the_same(precision, sinks, compiled, tmp_path, monkeypatch):
    """Every block by itself, or the whole model with its loss and Muon's iteration."""
    if not ON_GPU:  # where the compiler takes minutes; the program is traced all the same
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl)))
    cfg = replace(STEPS, precision=precision, ema_decay=None)
    model = replace(WIDE, num_layers=4, use_attention_sinks=sinks)
    eager, rows = run_in(tmp_path / "eager", cfg, model)
    compiled, others = run_in(tmp_path / "compiled", replace(cfg, compile=compiled), model)
    tolerance = 2e-3 if precision == "fp32" else 2e-2
    assert ([row["loss"] for row in others]
            == pytest.approx([row["loss"] for row in rows], rel=tolerance))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_compiled_model_is_one_graph():
    """The forward pass, the loss in chunks, its gradients: nothing falls back to Python."""
    torch.manual_seed(4)
    model, graphs = ModernDecoderLM(WIDE).to(DEVICE), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(lm_loss, backend=count, fullgraph=True)
    batch = {name: value.to(DEVICE) for name, value in wide_rows(0).items()}
    loss(model, batch).total.backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, *[torch.float32] * (not ON_GPU)], ids=str)
def test_experts_at_once_are_those_one_by_one(dtype):
    """Values and gradients of the grouped products; on a GPU without a word to the host."""
    torch.manual_seed(6)
    experts = nn.ModuleList(SwiGLU(64, 96) for _ in range(4)).to(DEVICE, dtype)
    rows = torch.randn(48, 64, device=DEVICE).to(dtype)
    counts = [11, 0, 30, 7]  # one that nobody chose
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = grouped_experts(rows, ends, experts, dtype)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    expected = torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts))])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(y.float().square().sum(), list(experts.parameters()))
                 for y in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * (
            1e-6 + other.float().abs().max().item()))


def test_a_layer_of_experts_asks_nothing_of_the_host():
    """With the grouped kernel on a GPU; the same answer as the CPU's loop."""
    torch.manual_seed(6)
    layer, x = MixtureOfExperts(64, 96, 4, 2), torch.randn(2, 24, 64)
    expected, loss = layer(x)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    with forward_context(DEVICE, torch.bfloat16):
        assert has_grouped_kernel(x) == (ON_GPU and hasattr(F, "grouped_mm"))
        if has_grouped_kernel(x):
            layer(x)  # warm
            torch.cuda.set_sync_debug_mode("error")
        try:
            found, other = layer(x)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.05, atol=0.02)
    assert other.item() == pytest.approx(loss.item(), rel=1e-4)


def test_kernels_are_tried_in_our_order_on_hopper():
    """And a choice made outside is obeyed."""
    order = torch._C._get_sdp_priority_order
    before = order()
    hopper = ON_GPU and torch.cuda.get_device_capability()[0] == HOPPER
    with attention_order(DEVICE):
        assert order() == before or hopper and order()[0] == int(SDPBackend.CUDNN_ATTENTION)
        check_attention(torch.bfloat16, 4, 2, 128, None, sinks=False)
    with sdpa_kernel(SDPBackend.MATH), forward_context(DEVICE, torch.bfloat16):
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert order() == before


@pytest.mark.parametrize("wanted", ["fp32", "tf32", "bf16"])
def test_a_model_is_asked_in_the_precision_that_is_set(wanted):
    torch.manual_seed(5)
    model, ids = ModernDecoderLM(WIDE).eval(), wide_rows(0)["input_ids"]
    expected = model(ids).log_softmax(-1)
    set_inference_precision(wanted, DEVICE)
    asked = deepcopy(model).to(DEVICE, inference_dtype(wanted))
    found = asked(ids.to(DEVICE)).float().log_softmax(-1).cpu()
    tolerance = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}[wanted]
    assert (found - expected).abs().max() < tolerance


def test_a_float16_step_that_overflows_is_left_out():
    torch.manual_seed(4)
    model = WIDE if ON_GPU else replace(WIDE, width=16, num_heads=2, ffn_width=24)
    state = TrainingState(ModernDecoderLM(model), replace(STEPS, precision="fp16"), DEVICE)
    state.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    before = [p.detach().clone() for p in state.module.parameters()]
    optimizer_step(state, lm_loss, wide_rows(0), STEPS, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(state.module.parameters(), before))
    assert state.scaler.get_scale() == 2.0**39
    losses = []
    for step in range(1, 40):
        out, _ = optimizer_step(state, lm_loss, wide_rows(step), STEPS, 1.0)
        losses.append((out.total / out.count).item())
    assert losses[-1] < losses[0] - 0.1 and state.scaler.get_scale() < 2.0**39
    assert all(p.isfinite().all() for p in state.module.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32", *["fp16"] * ON_GPU])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_is_the_same_to_the_last_bit(precision, optimizer, tmp_path, repeatable):
    cfg = replace(STEPS, precision=precision, optimizer=optimizer)
    model = replace(WIDE, dropout=0.1)  # drawn by the device's own generator
    straight, rows = run_in(tmp_path / "straight", cfg, model)
    steps = iter(range(1, 100))
    run_in(tmp_path / "cut", cfg, model, should_stop=lambda: next(steps) == 3)
    resumed, others = run_in(tmp_path / "cut", cfg, model, resume=True, seed=9)
    assert [row["loss"] for row in others][-3:] == [row["loss"] for row in rows][-3:]
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(one, other), name


def test_a_row_of_metrics_knows_the_gpu(tmp_path):
    row = run_in(tmp_path, STEPS)[1][-1]
    assert row["data_wait_s"] >= 0 and (row["peak_memory_gb"] is not None) == ON_GPU
    if ON_GPU and os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True":
        assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_trains_as_no_ranks_do(strategy, precision):
    cfg = replace(STEPS, precision=precision, ema_decay=0.5)
    torch.manual_seed(4)
    plain = ModernDecoderLM(replace(WIDE, use_attention_sinks=True))
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    module, world = deepcopy(plain).to(DEVICE), World(0, 1, strategy)
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo", store=dist.HashStore(),
                            rank=0, world_size=1)
    try:
        dtype = compute_dtype(precision, DEVICE)
        loss = DataParallelLoss(module, lm_loss, world, DEVICE, dtype)
        states = (TrainingState(plain, cfg, DEVICE), TrainingState(module, cfg, DEVICE))
        for step in range(3):
            one, _ = optimizer_step(states[0], lm_loss, wide_rows(step), cfg, 1.0)
            other, _ = optimizer_step(states[1], loss, wide_rows(step), cfg, 1.0, world)
            assert other.total.item() == pytest.approx(one.total.item(), rel=1e-3)
        here = lambda parameter: gather_tensor(parameter.detach()).float().cpu()
        others = {name: here(p) for name, p in module.named_parameters()}
        mine = {name: here(p) for name, p in plain.named_parameters()}
        if precision == "fp32":
            torch.testing.assert_close(others, mine, rtol=1e-3, atol=2e-3)
        # FSDP rounds the residual stream to bfloat16 too; a gradient near 0 may change its sign
        moved = [flat({name: value - start[name] for name, value in found.items()})
                 for found in (mine, others)]
        assert torch.cosine_similarity(*moved, 0) > 0.98
    finally:
        dist.destroy_process_group()


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_the_cpus(model, record):
    cfg = replace(MODELS[model], vocab_size=512, context_length=96, width=64, num_heads=4,
                  num_kv_heads=2, ffn_width=96)
    torch.manual_seed(5)
    module = ModernDecoderLM(cfg).eval()
    prompts = [[3, 4, 5], [7] * 20, [9, 11]]
    options = dict(max_new_tokens=40, temperature=0)
    expected = generate(module, prompts, **options)
    options["record"] = record
    assert generate(deepcopy(module).to(DEVICE), prompts, **options) == expected
    alone = [generate(deepcopy(module).to(DEVICE), [prompt], **options)[0] for prompt in prompts]
    assert alone == expected


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINED)
def test_the_memory_of_a_stage_is_what_was_estimated(stage):
    """On a GPU a step of the 253M model with half of the preset's micro-batch; on a CPU a small
    one, of which the bytes alive at once are counted.
    """
    shape = shape_for(DEVICE)
    train = getattr(shape.config, stage)
    if ON_GPU:
        train = replace(train, batch_size=train.micro_batch // 2,
                        micro_batch_size=train.micro_batch // 2)
        found = measure_memory(replace(shape, config=replace(shape.config, **{stage: train})),
                               DEVICE, {}, stage)
        print(f"{stage}: {found}")
        assert 0.9 < found["estimate_over_peak"] < 1.1, found
        return
    cfg = ModelConfig(vocab_size=2048, context_length=128, width=128, num_layers=6, num_heads=4,
                      num_kv_heads=4, ffn_width=512)
    train = replace(train, precision="bf16", ema_decay=None, compile=False)
    module, loss, batch = stage_step(stage, ModernDecoderLM(cfg), train, DEVICE)
    state = TrainingState(module, train, DEVICE)
    optimizer_step(state, loss, batch, train, 0.01)
    with LiveBytes() as alive:
        optimizer_step(state, loss, batch, train, 0.01)
    estimate = training_memory(cfg, train)
    measured = alive.peak + estimate["weights"] + estimate["optimizer"]
    print(f"{stage}: estimate over peak {estimate['total'] / measured:.3f}")
    assert 0.75 < estimate["total"] / measured < 1.35


def test_random_rows_are_pinned_for_a_gpu():
    assert random_rows(MODEL, 2, DEVICE)["input_ids"].is_pinned() == ON_GPU
    assert rows_of(0)["input_ids"].shape == (12, 16)
