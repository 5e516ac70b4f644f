"""`modern-llm bench`: the lines of `bench_lines`, one after the other within so many minutes, each
written down as soon as it is known, so that what ends the program costs the line in hand alone.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from modern_llm.files import nan_to_none, read_json, write_json, write_text
from modern_llm.messages import StageError, UserError
from modern_llm.training import bench_measures
from modern_llm.training.bench_lines import Line, Shape, ladder, shape_for
from modern_llm.training.bench_measures import forget
from modern_llm.training.bench_profile import measure_profile
from modern_llm.training.checkpoints import append_row, read_metrics
from modern_llm.training.training_state import pick_device

ROWS, TABLE, SUMMARY = "lines.jsonl", "lines.csv", "bench.json"
CURVE, KERNELS = "training.jsonl", "kernels.csv"
MEASURES = {**bench_measures.MEASURES, "profile": measure_profile}


class DeviceLost(UserError, RuntimeError):
    """The GPU answers nothing more in this process; the line that broke it is written down."""


def machine(device: torch.device) -> dict:
    """What the figures are true of."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {"device": gpu.name if gpu else platform.processor() or platform.machine(),
            "memory_gb": gpu.total_memory / 1e9 if gpu else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF")
                         or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}


def refuse_another(folder: Path, facts: dict) -> None:
    """StageError, naming both, if the lines of the folder are true of something else."""
    path = folder / SUMMARY
    before = read_json(path)["machine"] if path.is_file() else {}
    other = [name for name in facts if before.get(name) != facts[name]]
    if other:
        was, here = (", ".join(f"{name} {found.get(name)}" for name in other)
                     for found in (before, facts))
        raise StageError(f"{folder} was begun with {was}; here is {here}: name another folder")


def measured(line: Line, shape: Shape, device: torch.device, rows: list[dict],
             folder: Path) -> dict:
    """The row of a line: what was found, or how it failed."""
    peaks = {row["dtype"]: row["tflops"] for row in rows
             if row["kind"] == "matrix" and row["status"] == "ok"}
    left = {"training": CURVE, "profile": KERNELS}  # further files, by kind
    more = {"rows_to": folder / left[line.kind]} if line.kind in left else {}
    row = {"line": line.name, "kind": line.kind, "status": "ok", "against": line.against or None,
           **line.settings}
    started = time.perf_counter()
    try:
        row |= MEASURES[line.kind](shape, device, peaks, **line.settings, **more)
    except torch.OutOfMemoryError as error:
        row |= {"status": "out of memory", "why": str(error).split(". ")[0]}
    except Exception as error:
        row |= {"status": "failed",
                "why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return nan_to_none(row | {"seconds": time.perf_counter() - started})


def works(device: torch.device) -> bool:
    """Whether the device still computes: after some errors a process has lost its GPU."""
    try:
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except RuntimeError:
        return False


def bench(device_name: str, folder: Path, minutes: float, say: Callable[[str], None] = print,
          retry: bool = True) -> list[dict]:
    """Measure every line that the folder does not have yet and that fits into the minutes, with
    `retry` also those that failed before; returns the rows.

    Raises:
        DeviceLost: a line broke the device; another process can go on, without `retry`.
        StageError: the folder was begun on another machine or with another torch.
    """
    end, device = time.monotonic() + 60 * minutes, pick_device(device_name)
    folder.mkdir(parents=True, exist_ok=True)
    shape, facts = shape_for(device), machine(device)
    again = ("left out", "failed", "out of memory") if retry else ("left out",)
    rows = [row for row in read_metrics(folder / ROWS) if row["status"] not in again]
    if rows:
        refuse_another(folder, facts)
    # without a line that a kill has torn
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / SUMMARY, {"machine": facts, "lines": rows})
    done = {row["line"] for row in rows}
    say(f"{facts['device']}, torch {facts['torch']}; {folder}")
    for line in ladder(shape):
        if line.name in done:
            continue
        seconds = line.seconds if device.type == "cuda" else 0.5
        if time.monotonic() + seconds > end:
            row = {"line": line.name, "kind": line.kind, "status": "left out",
                   "why": f"needs about {seconds:g} s, which --minutes no longer has"}
        else:
            row = measured(line, shape, device, rows, folder)
        row = {"device": facts["device"], **row}
        rows.append(append_row(folder / ROWS, row))
        write_text(folder / TABLE, pd.DataFrame(rows).to_csv(index=False))
        say(sentence(row))
        if row["status"] != "left out":
            forget_or_lose(device)
    write_json(folder / SUMMARY, {"machine": facts, "lines": rows})
    draw(folder)
    return rows


def forget_or_lose(device: torch.device) -> None:
    """Make room for the next line; DeviceLost if the device is no longer there."""
    try:
        forget(device)
    except RuntimeError:  # a GPU that has broken says so at the first call
        pass
    if not works(device):
        raise DeviceLost("the GPU is lost to this process")


def sentence(row: dict) -> str:
    """A row in words, for whoever waits for it."""
    units = {"tflops": "{:,.3g} TFLOP/s", "tokens_per_s": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}",
             "of_matrix": "{:.1%} of the matrix product", "estimate_gb": "estimate {:.3g} GB",
             "peak_gb": "peak {:.3g} GB", "busy": "busy {:.0%} of a step",
             "share of matrix products": "{:.0%} of that matrix products",
             "loss": "held-out loss {:.3f}", "floor": "floor {:.3f}"}
    found = [form.format(row[name]) for name, form in units.items() if row.get(name) is not None]
    said = ", ".join(found) if row["status"] == "ok" else f"{row['status']}: {row.get('why')}"
    return f"{row['line']}: {said} ({row.get('seconds', 0):.1f} s)"


def draw(folder: Path) -> list[Path]:
    """The figures of what the folder's table has: speeds of the steps, memory against its estimate,
    sampling, the curve of the real run.
    """
    import matplotlib.pyplot as plt

    from modern_llm.figures import figure, small_png, training_curves

    table = pd.read_csv(folder / TABLE)
    for column in ("tokens_per_s", "mfu", "estimate_gb", "peak_gb", "rows", "dtype", "floor"):
        if column not in table:
            table[column] = None
    table = table[table.status == "ok"]
    made = {}
    steps = table[table.kind == "step"][::-1]
    if len(steps):
        made["steps"], ax = figure(6.5, 0.6 + 0.24 * len(steps))
        bars = ax.barh(steps.line.str.removeprefix("step "), steps.tokens_per_s / 1000)
        ax.bar_label(bars, [f" {mfu:.0%} MFU" if pd.notna(mfu) else "" for mfu in steps.mfu])
        ax.set(xlabel="thousand tokens per second", xlim=(0, 1.2 * steps.tokens_per_s.max() / 1000))
    memory = table[table.kind.isin(["step", "memory"]) & table.estimate_gb.notna()][::-1]
    if len(memory):
        made["memory"], ax = figure(6.5, 0.6 + 0.24 * len(memory))
        ax.barh(memory.line, memory.estimate_gb, height=0.7, color="0.8", label="estimate")
        ax.plot(memory.peak_gb.astype(float), memory.line, "k|", ms=9, mew=2, label="measured")
        ax.set(xlabel="GB")
        ax.legend()
    sampling = table[table.kind == "sampling"]
    if len(sampling):
        made["sampling"], ax = figure(4, 2.8)
        kinds = sampling.line.str.replace(r"sampling \d+ ", "", regex=True)
        for kind, part in sampling.groupby(kinds):
            ax.loglog(part.rows, part.tokens_per_s, "o-", label=kind)
        ax.set(xlabel="answers written at once", ylabel="tokens per second")
        ax.legend()
    training = table[table.kind == "training"]
    if len(training) and (folder / CURVE).is_file():
        metrics = pd.DataFrame(read_metrics(folder / CURVE))
        made["training"] = training_curves(metrics, floor=float(training.floor.iloc[-1]))
    paths = []
    for name, fig in made.items():
        (folder / f"{name}.png").write_bytes(small_png(fig))
        plt.close(fig)
        paths.append(folder / f"{name}.png")
    return paths
