"""Where the milliseconds of a training step go: its kernels by what they do, from torch's profiler.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from modern_llm.files import write_text
from modern_llm.training.bench_lines import Shape
from modern_llm.training.bench_measures import compiler_for, prepare_step, wait_for

# what the kernels of a group have in their names; the first that fits
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|wgmma|xmma|cublas|::mm$|::addmm|::bmm|::baddbmm|matmul",
    "copies between host and device": r"memcpy|memset",
    "optimizer": r"multi_tensor|foreach|adam|lerp",
    "fused by the compiler": r"triton",
}
STEPS = 3


def group_of(kernel: str) -> str:
    """The group of GROUPS that a kernel belongs to, by its name."""
    return next((group for group, names in GROUPS.items() if re.search(names, kernel, re.I)),
                "everything else, one operation at a time")


def kernel_times(call, device: torch.device, steps: int = STEPS) -> tuple[pd.DataFrame, float]:
    """A row for every kernel (group, kernel, calls and ms of a step), longest first, and the ms
    between two steps; on a CPU an operation is a kernel.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        wait_for(device)
        for _ in range(steps):
            call()
        wait_for(device)
    events = [event for event in found.key_averages() if on_gpu or event.key.startswith("aten")]
    rows = [{"group": group_of(event.key), "kernel": event.key[:160],
             "calls": event.count / steps,
             "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
                   / 1000 / steps} for event in events]
    table = pd.DataFrame(rows).sort_values("ms", ascending=False, ignore_index=True)
    times = [(event.time_range.start, event.time_range.end) for event in found.events()]
    return table, (max(end for _, end in times) - min(start for start, _ in times)) / 1000 / steps


def measure_profile(shape: Shape, device: torch.device, peaks: dict, rows_to: Path,
                    **settings) -> dict:
    """The share of a step's time that each group of kernels takes, and that in which the device has
    nothing to do; the kernels are left in the file `rows_to`.
    """
    with compiler_for(device):
        step = prepare_step(shape, device, **settings)
        for _ in range(3):
            step.call()
        table, step_ms = kernel_times(step.call, device)
    write_text(rows_to, table[table.ms > 0].to_csv(index=False, float_format="%.4g"))
    busy = table.groupby("group").ms.sum()
    return {"step_ms": step_ms, "busy": busy.sum() / step_ms,
            **{f"share of {group}": ms / busy.sum() for group, ms in busy.items()}}
