"""The lines of `modern-llm bench`: a name, a kind and the arguments of its function in MEASURES
(`bench`), which returns what was found. Training steps differ from another in one setting each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn.attention import SDPBackend

from modern_llm.config import TRAINED, ModelConfig, PipelineConfig, get_pipeline_preset

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """What is measured on a device: the 253M model of tacc-h100 on a GPU, a tiny one on a CPU."""

    config: PipelineConfig  # the model, and the settings of every stage
    world: PipelineConfig  # of the short real run
    matrix: int  # rows and columns of the matrices multiplied
    rows: tuple[int, int, int]  # sequences of a micro-batch: small, middle, large
    sampled: tuple[int, ...]  # answers written at once
    new_tokens: int  # of each
    seconds: float  # that a speed is measured for, at least
    kernels: tuple[str, ...] = ()  # for attention, to choose from


def shape_for(device: torch.device) -> Shape:
    """The shape for a device."""
    config, world = get_pipeline_preset("tacc-h100"), get_pipeline_preset("local-smoke")
    world = replace(world, pretrain=replace(world.pretrain, keep_checkpoints=0, max_minutes=1.0))
    if device.type == "cuda":
        data = replace(world.data, max_train_tokens=1_000_000)
        return Shape(config, replace(world, data=data), 8192, (8, 32, 64), (1, 16, 128), 128, 1.0,
                     tuple(KERNELS))
    small = ModelConfig(vocab_size=512, context_length=32, width=32, num_layers=2, num_heads=2,
                        num_kv_heads=2, ffn_width=64)
    config = replace(config, grpo=replace(config.grpo, group_size=2))
    rows = {stage: replace(getattr(config, stage), batch_size=4, micro_batch_size=4)
            for stage in TRAINED}
    data = replace(world.data, max_train_tokens=20_000, max_validation_tokens=1000)
    world = replace(world, model=replace(small, context_length=64), data=data, pretrain=replace(
        world.pretrain, max_steps=20, batch_size=8, micro_batch_size=8, log_every=2, eval_every=10))
    return Shape(replace(config, model=small, data=data, **rows), world, 128,
                 (1, 2, 4), (1, 2, 4), 8, 0.02, ("flash",) if device.type == "cpu" else ())


@dataclass(frozen=True)
class Line:
    """One measurement, by the name that it has in the files."""

    name: str
    kind: str  # of MEASURES
    settings: dict = field(default_factory=dict)
    seconds: float = 8.0  # that it may take on a GPU, compilation included
    against: str = ""  # the line that differs from it in one setting


def ladder(shape: Shape) -> list[Line]:
    """All lines, those that matter most first."""
    (small, middle, large), heads = shape.rows, shape.config.model.num_heads
    lines = [Line(f"matrix {name}", "matrix", {"dtype": name}, 3)
             for name in ("fp32", "TF32", "fp16", "bf16")]
    steps: dict[str, Line] = {}

    def step(name: str, against: str = "", seconds: float = 8, **changed) -> Line:
        before = steps[against].settings if against else {
            "precision": "fp32", "matmul": "highest", "compiled": "nothing", "micro_batch": small,
            "attention": "as trained", "optimizer": "adamw", "heads": heads}
        steps[name] = Line(f"step {name}", "step", {**before, **changed}, seconds,
                           against and f"step {against}")
        return steps[name]

    lines += [
        step("fp32"), step("TF32", "fp32", matmul="high"), step("bf16", "TF32", precision="bf16"),
        step("more rows", "bf16", micro_batch=middle),
        step("blocks compiled", "more rows", 60, compiled="blocks"),
        step("loss compiled", "blocks compiled", 60, compiled="blocks and loss"),
        step("Muon", "loss compiled", 30, optimizer="muon"),
        Line("profile", "profile", {name: value for name, value in steps["Muon"].settings.items()
                                    if name != "attention"}, 40),
        *(Line(f"memory {stage}", "memory", {"stage": stage}, 12) for stage in TRAINED),
        *(Line(f"sampling {rows} {name}", "sampling", {"rows": rows, "dtype": name}, 12)
          for name in ("bf16", "fp32") for rows in shape.sampled),
        *(Line(f"sampling {rows} bf16 recorded", "sampling",
               {"rows": rows, "dtype": "bf16", "record": True}, 12) for rows in shape.sampled),
        step("model compiled", "loss compiled", 70, compiled="model"),
        Line("training", "training", {}, 100),
        step("model compiled, Muon", "Muon", 90, compiled="model"),
        *(step(kernel, "loss compiled", 30, attention=kernel) for kernel in shape.kernels),
        # as many parameters, but for the gains of twice as wide norms, and FLOPs
        step("half the heads, twice as wide", "loss compiled", 60, heads=heads // 2),
        step("most rows", "loss compiled", 30, micro_batch=large),
        step("fewest rows", "loss compiled", 30, micro_batch=small),
        step("fp16", "more rows", precision="fp16"),
    ]
    return lines
