"""How long a stage will take, before and while it runs: steps × seconds per step, measured or
assumed; times as SLURM writes them.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from modern_llm.config import STAGES, ConfigError, PipelineConfig, TrainConfig, Work, function_of
from modern_llm.config.machines import gpu_peaks
from modern_llm.models.counts import flops_per_token

CPU_FLOPS = 136e9  # fp32 FLOP/s of two CPU cores, as measured for the diary
# model FLOPs utilisation: well-tuned programs of this size reach 0.33 to 0.5 on H100s
ASSUMED_MFU = 0.3
ASSUMED_DECODE_SECONDS = 0.03  # to write one more token of every answer of a batch
# imports, tokenising or reading the corpus, compiling
ASSUMED_START_MINUTES = {"gpu": 15, "cpu": 1}
MARGIN = 1.5  # time limit / estimate
# of a job's time are lost to the warning before its end (--signal in slurm/*.slurm)
WARNING_MINUTES = 6


@dataclass(frozen=True)
class Estimate:
    """How long a stage will take, and where each figure is from."""

    minutes: float
    steps: int = 0
    tokens_per_second: float = 0.0
    why: str = ""


def tokens_per_step(config: PipelineConfig, stage: str) -> int:
    """Tokens that an optimizer step reads when every row is as long as the context."""
    train = getattr(config, stage)
    return train.batch_size * train.sequences * config.model.context_length


def measured_seconds(folder: Path) -> tuple[int, float, float] | None:
    """Steps done, seconds per step and tokens per second, as the stage's `metrics.jsonl` has them;
    None if there are too few.
    """
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that a kill has torn, or that is being written
            break
    rows = [row for row in rows if row.get("tokens_per_s")]
    pairs = [(b["step"] - a["step"], b["tokens"] - a["tokens"], b["tokens_per_s"])
             for a, b in zip(rows, rows[1:]) if b["step"] > a["step"]]
    if not pairs:
        return None
    seconds = statistics.median(tokens / speed / steps for steps, tokens, speed in pairs)
    return rows[-1]["step"], seconds, statistics.median(speed for _, _, speed in pairs)


def estimate(config: PipelineConfig, stage: str, folder: Path, gpu: str | None,
             gpus: int = 1, peak: float | None = None) -> Estimate:
    """How long a stage takes: steps × seconds per step, measured or assumed, what else it does, and
    the start.

    Args:
        config: the settings of the run.
        stage: which stage.
        folder: its folder; if `metrics.jsonl` there has rows, their speed counts, and only the
            steps still to do.
        gpu: a name of `gpu_peaks`; "" = one that nobody knows, taken for the slowest of those;
            None = a CPU.
        gpus: how many work on one batch.
        peak: FLOP/s of a large matrix product, as measured on the device itself.
    """
    start = ASSUMED_START_MINUTES["cpu" if gpu is None else "gpu"]
    if peak:
        device = "measured here"
    elif gpu is None:
        peak, device = CPU_FLOPS, "2 CPU cores"
    else:
        peaks = gpu_peaks()
        slowest = min(peaks, key=peaks.get)
        peak, device = peaks[gpu or slowest], gpu or f"unknown GPU, assumed {slowest}"
    work = function_of(STAGES[stage].work)(config) if STAGES[stage].work else Work()
    # a token costs the forward pass, a third of training on it
    minutes = (work.steps * ASSUMED_DECODE_SECONDS
               + work.tokens * flops_per_token(config.model) / 3 / (ASSUMED_MFU * peak)) / 60
    said = [f"{work.steps:,} decoding steps of {1000 * ASSUMED_DECODE_SECONDS:.0f} ms and "
            f"{work.tokens:,} tokens, assumed"] * (work != Work())
    said += ["the steps once more for a control"] * (work.trainings > 0)
    train = getattr(config, stage, None)
    if not isinstance(train, TrainConfig):
        return Estimate(start + minutes, why="; ".join([*said, f"{start} min to start, assumed"]))
    steps = train.max_steps
    if found := measured_seconds(folder):
        done, seconds, speed = found
        steps = max(0, train.max_steps - done)
        said.insert(0, f"measured in {folder.name}/metrics.jsonl"
                       + (f", {done:,} of {train.max_steps:,} steps done" if done else ""))
    else:
        speed = ASSUMED_MFU * peak * gpus / flops_per_token(config.model)
        seconds = tokens_per_step(config, stage) / speed
        said.insert(0, f"assumed: {100 * ASSUMED_MFU:.0f}% of {peak / 1e12:g} TFLOP/s "
                       f"({f'{gpus} × ' * (gpus > 1)}{device})")
    longest = train.max_minutes or math.inf
    training, again = (min(longest, count * seconds / 60)
                       for count in (steps, work.trainings * train.max_steps))
    if training == longest:
        said.append(f"at most {longest:g} min, a setting")
    return Estimate(training + again + minutes + start, steps, speed,
                    "; ".join([*said, f"{start} min to start, assumed"]))


def time_limit(minutes: float, longest: int | None) -> int:
    """Minutes to ask for: the estimate with a margin and the warning, in steps of ten, at most what
    the partition allows.
    """
    wanted = -(-int(minutes * MARGIN + WARNING_MINUTES) // 10) * 10
    return min(wanted, longest) if longest else wanted


# ---- times as SLURM writes them ------------------------------------------------------------------

NO_LIMIT = ("infinite", "unlimited", "n/a")
# days-hours, days-hours:minutes, days-hours:minutes:seconds
DAYS = re.compile(r"([0-9]+)-([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")
# minutes, minutes:seconds, hours:minutes:seconds
NO_DAYS = re.compile(r"(?:([0-9]+):(?=[0-9]+:))?([0-9]+)(?::([0-9]+))?")


def minutes_of(time: str) -> int | None:
    """Minutes of a time as SLURM writes it, seconds rounded up as SLURM does; None = no limit,
    which is also what 0 means there.

    Behind a day stand hours, without one a single number is minutes: `90`, `90:00`, `1:30:00`,
    `1-12`, `1-12:30`, `1-12:30:00`, `UNLIMITED` (see sbatch(1), --time). Raises ConfigError for
    anything else.
    """
    text = time.strip()
    if text.lower() in NO_LIMIT:
        return None
    if found := DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := NO_DAYS.fullmatch(text):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in found.groups())
    else:
        raise ConfigError(f"{time!r} is not a time as SLURM writes it: minutes, minutes:seconds, "
                          "hours:minutes:seconds, days-hours, "
                          "days-hours:minutes, days-hours:minutes:seconds, or UNLIMITED")
    return (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60) or None


def clock(minutes: float) -> str:
    """Minutes as SLURM reads them, HH:MM:SS; a begun minute counts, since 00:00:00 would mean no
    limit.
    """
    whole = max(1, math.ceil(minutes))
    return f"{whole // 60:02d}:{whole % 60:02d}:00"
