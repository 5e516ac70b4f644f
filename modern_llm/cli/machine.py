"""What this machine is, and what each preset can do on it: what `modern-llm doctor` finds out.

Imports no torch before it looks for it, and goes on without one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from modern_llm.cluster.duration import CPU_FLOPS, estimate
from modern_llm.cluster.submit import partitions
from modern_llm.config import (
    DATASET_REGISTRY, PRESETS, STAGES, PipelineConfig, TrainConfig, get_pipeline_preset, override,
)
from modern_llm.config.machines import gpu_peaks
from modern_llm.files import IN_CHECKOUT
from modern_llm.messages import StageError
from modern_llm.runs.data_files import data_names
from modern_llm.runs.parameters import runs_folder
from modern_llm.runs.pipeline import chosen_stages
from modern_llm.runs.preflight import (
    GIB, can_compile, device_for, fit_to_memory, free_memory, memory_needed, settings_of,
)

NOWHERE = Path(os.devnull)  # a stage's folder that has no metrics
LEAST_DISK = 1e9  # bytes: a run of local-smoke leaves a third of that
# rows and columns of the matrices that are multiplied, by the kind of device
MATRIX = {"cuda": 8192, "mps": 2048, "cpu": 1024}
ELSEWHERE = "on a cluster: modern-llm submit --preset PRESET"
MORE_MEMORY = "close what else is open, or use a machine with more"
GET_DATA = ("set MODERN_LLM_DATA to a folder of plain files that has them (modern-llm datasets "
            "--help), or, where there is a network: modern-llm prefetch --preset PRESET")


# ---- what is installed ---------------------------------------------------------------------------


def unmet(extra: str = "") -> list[str]:
    """What the package, or one of its extras, requires that is not installed, or not in such a
    version: "sphinx>=8.1 (not installed)".
    """
    from packaging.requirements import Requirement

    found = []
    for wanted in map(Requirement, requires("modern_llm") or ()):
        of_extra = "extra" in str(wanted.marker)
        if of_extra != bool(extra) or wanted.marker and not wanted.marker.evaluate(
                {"extra": extra}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            there = ""
        if not there or not wanted.specifier.contains(there, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier} ({there or 'not installed'})")
    return found


def how_to_install(extra: str = "") -> str:
    """The command that installs what the package or an extra of it requires."""
    if IN_CHECKOUT:
        return f"bash scripts/environment.sh {extra}".strip()
    return f"pip install 'modern_llm{f'[{extra}]' * bool(extra)}'"


def find_torch() -> dict:
    """Version of torch, what it is built for and which devices it sees; with `error` where it
    cannot be imported.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it does not load
        return {"error": str(error).splitlines()[0], "devices": []}
    built = (f"CUDA {torch.version.cuda}" if torch.version.cuda
             else f"ROCm {torch.version.hip}" if torch.version.hip
             else "CPU and MPS" if torch.backends.mps.is_built() else "CPU alone")
    devices = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(number)
        devices.append({"device": f"cuda:{number}", "name": facts.name,
                        "gb": facts.total_memory / GIB,
                        "capability": f"{facts.major}.{facts.minor}",
                        "bf16": torch.cuda.is_bf16_supported(including_emulation=False)})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.machine()})
    return {"version": torch.__version__, "built_for": built, "devices": devices}


# ---- the processor and the GPU -------------------------------------------------------------------


def processor() -> str:
    """The processor's name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def product_speed(device: str, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of products of large square matrices: the fastest of those that fit into the seconds.
    """
    import torch

    size = MATRIX[device.partition(":")[0]]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    wait = torch.get_device_module(device).synchronize
    a @ b  # the first one is slower
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def attention_kernels(device: str) -> list[str]:
    """The kernels with which torch computes causal attention on a device, each tried alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
               "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, found = torch.randn(1, 2, 128, 64, device=device, dtype=dtype), []
    for name, kernel in kernels.items():
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError), sdpa_kernel(kernel):
            warnings.simplefilter("ignore")  # why a kernel cannot be had
            scaled_dot_product_attention(q, q, q, is_causal=True)
            found.append(name)
    return found


# ---- what a preset needs -------------------------------------------------------------------------


@lru_cache
def place_of(name: str) -> str:
    """Where a data set is: "built-in", "mirror", "file", "hub (cached)", "hub", or "" if it cannot
    be had.
    """
    from modern_llm.data.sources import DatasetNotFound, find_source, hub_state

    try:
        source = find_source(name)
    except DatasetNotFound:
        return ""
    cached = source.where == "hub" and hub_state(source.info) == "cached"
    return "hub (cached)" if cached else source.where


@lru_cache
def has_tokenizer() -> bool:
    """Whether GPT-2's tokenizer is here, or can be fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    from modern_llm.data.sources import hub_reachable, mirror_root

    root = mirror_root()
    return (any((root / folder / f"tokenizer.json{packed}").is_file() for packed in ("", ".gz")
                for folder in ("gpt2_tokenizer", "gpt2")) if root else False) or any(
        isinstance(try_to_load_from_cache(repo, "tokenizer.json"), str)
        for repo in ("gpt2", "openai-community/gpt2")) or (
            not constants.HF_HUB_OFFLINE and hub_reachable())


@lru_cache
def has_model(name: str) -> bool:
    """Whether a third-party model is here."""
    from modern_llm.interchange.hub import find_model

    with contextlib.suppress(FileNotFoundError):
        return bool(find_model(name))
    return False


def stages_of(config: PipelineConfig) -> list[str]:
    """The stages that `modern-llm run` runs of a preset, but for the report."""
    return chosen_stages("all", config.start_from, config)[:-1]


def data_of(config: PipelineConfig) -> list[str]:
    """The data sets that the stages of a preset read."""
    return list(dict.fromkeys(name for stage in stages_of(config)
                              for name in data_names(config, stage)))


def missing_of(config: PipelineConfig) -> list[str]:
    """What the stages of a preset read and that can neither be found here nor fetched."""
    tokenizer = (config.data.tokenizer == "gpt2"
                 and any(STAGES[name].first for name in stages_of(config)))
    return [*(name for name in data_of(config) if not place_of(name)),
            *["GPT-2's tokenizer"] * (tokenizer and not has_tokenizer()),
            *[config.start_from] * bool(config.start_from and not has_model(config.start_from))]


def prospect(name: str, speeds: dict[str, dict[str, float]]) -> dict:
    """What a preset can do here: memory it needs and there is, data that are missing, minutes if it
    runs, and for each thing in the way its kind (device, memory or data), what it is, and a remedy.

    Args:
        speeds: FLOP/s as measured, by device and dtype; empty where nothing was.
    """
    import torch

    from modern_llm.training.training_state import training_precision

    config = get_pipeline_preset(name)
    device, lacks = device_for(config)
    problems = [{"kind": "device", "what": each.removeprefix("device: "), "remedy": ELSEWHERE}
                for each in lacks]
    gpu = None
    if device.startswith("cuda"):
        called = torch.cuda.get_device_name(device)
        gpu = next((known for known in gpu_peaks() if known in called), "")
    measured = {} if gpu else speeds.get(device, {})  # a known GPU has its data sheet
    free, need, minutes = free_memory(device), 0, 0.0
    for stage in stages_of(config):
        train, own, dtype = settings_of(config, stage), config, "float32"
        if isinstance(train, TrainConfig):
            precision = training_precision(train.precision, torch.device(device))
            own = override(config, {stage: {"precision": precision}})
            dtype = "float32" if precision == "fp32" else "bfloat16"
        minutes += estimate(config, stage, NOWHERE, gpu, peak=measured.get(dtype)).minutes
        try:
            need = max(need, memory_needed(fit_to_memory(own, stage, free), stage))
        except StageError as error:
            if isinstance(train, TrainConfig):
                own = replace(own, **{stage: replace(getattr(own, stage), micro_batch_size=1)})
            need = max(need, memory_needed(own, stage))
            if not problems:
                problems.append({"kind": "memory", "what": f"{stage}, {error}",
                                 "remedy": MORE_MEMORY})
    if missing := missing_of(config):
        problems.append({"kind": "data", "what": f"not here: {', '.join(missing)}",
                         "remedy": GET_DATA})
    return {"preset": name, "runs": not problems, "device": device, "needs_gb": need / GIB,
            "free_gb": free / GIB, "missing": missing,
            "to_download": [one for one in data_of(config) if place_of(one) == "hub"],
            "minutes": None if problems else minutes, "problems": problems}


# ---- all of it -----------------------------------------------------------------------------------


def examine(quick: bool = False, note: Callable[[str], None] = lambda text: None) -> dict:
    """Everything about this machine: `machine` (its facts by name), `presets` (a `prospect` each),
    `problems` (a line each, with a remedy) and `ok`, whether local-smoke can run.

    Args:
        quick: measure no speed.
        note: told what is being measured.
    """
    torch_facts, problems, speeds = find_torch(), [], {}
    if "error" in torch_facts:
        problems.append(f"torch cannot be imported ({torch_facts['error']}): {how_to_install()}")
    elif shutil.which("nvidia-smi") and not torch_facts["devices"]:
        problems.append(
            f"nvidia-smi is here, and torch {torch_facts['version']} sees no GPU: it is built for "
            f"{torch_facts['built_for']}; install a build for CUDA (pytorch.org), or see whether "
            "nvidia-smi itself finds the GPU")
    try:
        lacking = unmet()
        extras = {name: unmet(name) for name in metadata("modern_llm").get_all("Provides-Extra")
                  or ()}
    except PackageNotFoundError:  # run from a folder, not installed
        lacking, extras = [], {}
    if lacking := [name for name in lacking if "error" not in torch_facts
                   or not name.startswith("torch>")]:
        problems.append(f"required and not here: {', '.join(lacking)}: {how_to_install()}")
    root = runs_folder().absolute()
    there = next(place for place in (root, *root.parents) if place.is_dir())
    disk = shutil.disk_usage(there)
    if not os.access(there, os.W_OK):
        problems.append(f"{there} cannot be written to, where runs go: set MODERN_LLM_RUNS to "
                        "another folder")
    elif disk.free < LEAST_DISK:
        problems.append(f"{disk.free / 1e9:.1f} GB are free in {there}, where runs go: make room, "
                        "or set MODERN_LLM_RUNS to a folder on another disk")
    blocked, hints = bool(problems), []
    compiles = can_compile()
    if not compiles:
        hints.append("no C++ compiler, or no headers of Python: what a preset compiles on the "
                     "processor runs uncompiled and slower (on Debian: apt install g++ "
                     "python3-dev)")
    attention, memory, bf16 = {}, None, None
    if "error" not in torch_facts:
        import torch

        from modern_llm.training.training_state import has_bf16_units

        bf16, memory = has_bf16_units(), free_memory("cpu")
        for device in ["cpu", *(facts["device"] for facts in torch_facts["devices"])]:
            attention[device] = attention_kernels(device)
            if not quick:
                note(f"measuring {device} …")
                speeds[device] = {dtype: product_speed(device, dtype)
                                  for dtype in ("float32", "bfloat16")}
        torch_facts["threads"] = torch.get_num_threads()
        # the first GPU is the one that "auto" means
        speeds |= {"cuda": speeds["cuda:0"]} if "cuda:0" in speeds else {}
    presets = ([prospect(name, speeds) for name in PRESETS] if "error" not in torch_facts else [])
    speeds.pop("cuda", None)
    found, _ = partitions() if shutil.which("sinfo") else ({}, None)
    machine = {
        "python": platform.python_version(), "executable": sys.executable,
        "platform": platform.platform(), "torch": torch_facts, "processor": processor(),
        "cores": cores(), "bf16_units": bf16, "compiles": compiles, "flops": speeds,
        "assumed_flops": None if speeds else CPU_FLOPS, "attention": attention,
        "free_memory_gb": memory and memory / GIB, "runs_folder": str(root),
        "free_disk_gb": disk.free / GIB, "MODERN_LLM_DATA": os.environ.get("MODERN_LLM_DATA"),
        "datasets": {name: place_of(name) for name in DATASET_REGISTRY},
        "slurm": {program: shutil.which(program) for program in ("sinfo", "sbatch")},
        "partitions": list(found),
        "extras": {name: {"missing": lacks, "install": how_to_install(name)}
                   for name, lacks in extras.items()}}
    smoke = next((row for row in presets if row["preset"] == "local-smoke"), None)
    return {"ok": bool(smoke and smoke["runs"] and not blocked), "machine": machine,
            "presets": presets, "problems": problems + hints}
