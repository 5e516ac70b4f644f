"""Can a stage run here? Its device, its memory by a closed-form estimate, its data: looked at
before anything is written.

torch is imported where it is needed, not at the top.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution

from modern_llm.config import STAGES, PipelineConfig, TrainConfig, override
from modern_llm.messages import StageError, say
from modern_llm.models import counts
from modern_llm.runs.data_files import check_splits, missing_data

GIB = 2**30


def settings_of(config: PipelineConfig, stage: str) -> object | None:
    """The config section named after the stage; the attention stage has none."""
    return getattr(config, stage, None)


def available_memory() -> int:
    """Bytes of main memory that can be had now."""
    try:
        import psutil

        return psutil.virtual_memory().available
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_micro_batch(config: PipelineConfig, stage: str, memory: int) -> PipelineConfig:
    """The config with the largest micro-batch whose training memory fits in `memory` bytes (the
    result is the same).
    """
    train = getattr(config, stage)
    hardware = config.hardware
    sizes = [m for m in range(train.micro_batch, 0, -1) if train.batch_size % m == 0]
    for size in sizes:
        smaller = dataclasses.replace(train, micro_batch_size=size)
        if counts.training_memory(config.model, smaller, hardware.ranks,
                                  hardware.strategy)["total"] <= 0.9 * memory:
            return (config if size == train.micro_batch
                    else dataclasses.replace(config, **{stage: smaller}))
    need = counts.training_memory(config.model, dataclasses.replace(train, micro_batch_size=1),
                                  hardware.ranks, hardware.strategy)["total"]
    raise StageError(f"memory: even one sequence at a time needs {need / GIB:.1f} GB, there are "
                     f"{memory / GIB:.1f} GB")


def memory_needed(config: PipelineConfig, stage: str) -> int:
    """Bytes to train in this stage, or to run the model where it does not train: a closed-form
    estimate.
    """
    if isinstance(train := settings_of(config, stage), TrainConfig):
        return counts.training_memory(config.model, train, config.hardware.ranks,
                                      config.hardware.strategy)["total"]
    return counts.inference_memory(config.model, batch=16, bytes_per_value=4)["total"]


def fit_to_memory(config: PipelineConfig, stage: str, memory: int) -> PipelineConfig:
    """The config with a micro-batch that fits; StageError if not even one row does."""
    if isinstance(settings_of(config, stage), TrainConfig):
        return fit_micro_batch(config, stage, memory)
    if (need := memory_needed(config, stage)) > 0.9 * memory:
        raise StageError(
            f"memory: the model needs {need / GIB:.1f} GB, there are {memory / GIB:.1f} GB")
    return config


def can_compile() -> bool:
    """Whether torch can compile for this processor: it needs a C++ compiler and Python's headers.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return bool(shutil.which(compiler)
                and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))


def settle(config: PipelineConfig, stage: str, device: str) -> PipelineConfig:
    """The config with what the stage's settings mean on the device: `precision="auto"`, and
    `compile` where that cannot be had, which a line says.
    """
    import torch

    from modern_llm.training.training_state import training_precision

    train = settings_of(config, stage)
    if not isinstance(train, TrainConfig):
        return config
    found: dict = {"precision": training_precision(train.precision, torch.device(device))}
    if train.compile and device.startswith("cpu") and not can_compile():
        say(f"{stage}: not compiled, since that needs a C++ compiler and Python's headers (on "
            f"Debian: apt install g++ python3-dev); slower, or say {stage}.compile=false")
        found["compile"] = False
    return override(config, {stage: found})


def check_tracker(config: PipelineConfig, stage: str) -> None:
    """StageError if the stage trains and the package of its tracker is not installed."""
    if config.tracker and isinstance(settings_of(config, stage), TrainConfig):
        need_tracker(config.tracker)


def need_tracker(name: str) -> None:
    """StageError unless the package of that tracker is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        raise StageError(f"tracker={name!r} needs the package {name}, which is not installed: pip "
                         f"install 'modern_llm[{name}]', or do without: metrics.jsonl has the same "
                         "numbers") from None


def device_for(config: PipelineConfig) -> tuple[str, list[str]]:
    """The device that the settings come to here ("cpu" where there is none such), and what it lacks
    of what they ask for. A device named by hand (not "auto") lifts their demands on the GPU.
    """
    import torch

    from modern_llm.training.training_state import pick_device

    device, missing, hardware = "cpu", [], config.hardware
    try:
        device = str(pick_device(hardware.device))
        if hardware.device == "auto" and hardware.min_gpu_memory_gb:
            if not device.startswith("cuda"):
                missing.append(f"device: needs a CUDA GPU with {hardware.min_gpu_memory_gb:g} GB, "
                               "this machine has none")
            elif (torch.cuda.get_device_properties(device).total_memory
                  < hardware.min_gpu_memory_gb * GIB * 0.93):
                there = torch.cuda.get_device_properties(device).total_memory / GIB
                missing.append(f"device: needs {hardware.min_gpu_memory_gb:g} GB of GPU memory, "
                               f"there are {there:.0f} GB")
            elif hardware.needs_bf16 and not torch.cuda.is_bf16_supported():
                missing.append(
                    f"device: needs bf16, which {torch.cuda.get_device_name(device)} has not")
        local, there = (int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
                        torch.cuda.device_count() if device.startswith("cuda") else 0)
        if hardware.ranks > 1 and device.startswith("mps"):
            missing.append(f"device: hardware.ranks={hardware.ranks} need a GPU each, and there is "
                           "one: say hardware.ranks=1, or device=cpu")
        elif hardware.ranks > 1 and there and local > there:
            missing.append(f"device: {local} ranks on this machine need a GPU each, and there are "
                           f"{there}: say hardware.ranks={there}, or device=cpu")
    except ValueError as error:
        missing.append(f"device: {error}")
    return device, missing


def free_memory(device: str) -> int:
    """Bytes that can be had now, of the memory that a device works in."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()


def preflight(config: PipelineConfig, stage: str) -> tuple[PipelineConfig, str]:
    """Check device, memory and the data the stage reads before anything is written; returns the
    fitted config and the device.

    Raises StageError that lists everything missing at once and says what to run instead.
    """
    device, missing = device_for(config)
    memory = free_memory(device)
    fitted = config
    try:
        fitted = fit_to_memory(settle(config, stage, device), stage, memory)
        if missing:
            missing.append(f"memory: estimated {memory_needed(fitted, stage) / GIB:.1f} GB, "
                           f"{memory / GIB:.1f} GB free on {device}")
    except StageError as error:
        missing.append(str(error))
    missing += missing_data(config, [stage])
    if missing:
        raise StageError(
            f"preset {config.name!r} cannot run here:\n  - "
            + "\n  - ".join(missing) + "\nInstead: "
            + "preset=local-cpu (real text on a CPU) or " * (config.name != "local-cpu")
            + "preset=local-smoke (built-in data, needs nothing)." + _forced(config, stage))
    if unusable := check_splits(config, stage)[1]:
        raise StageError("\n".join(unusable))
    return fitted, device


def _forced(config: PipelineConfig, stage: str) -> str:
    """How to try the stage all the same, on another device and built-in data."""
    words = ([f"{path}=synthetic" for path in STAGES[stage].data if path != "dpo.replay_sources"]
             + ["dpo.replay_sources=text"] * ("dpo.replay_sources" in STAGES[stage].data))
    if "sft.sources=synthetic" in words:
        words.append("sft.weights=1")
    if STAGES[stage].first:
        words += ["data.tokenizer=bpe", "data.max_validation_tokens=2000"]
    steps = ""
    if isinstance(settings_of(config, stage), TrainConfig):
        words = [f"{stage}.batch_size=2", f"{stage}.micro_batch_size=1",
                 f"{stage}.compile=false", *words]
        steps = "max_steps=2 and "
    return (f" To force the device, say device=cpu, with {steps}overrides such as "
            f"'{' '.join(words)}'." if words else "")
