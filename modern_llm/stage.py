"""What every stage notebook does before and after its own work: resolve the preset, check the machine, keep the record.

Plain plumbing shared by chapters 03–08. It stands beside the modules of the design so that a stage's first cells stay
three lines long. torch and the data registry are imported where they are needed, not at the top.
"""

from __future__ import annotations

import ast
import atexit
import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modern_llm import config as configs
from modern_llm import counts
from modern_llm.config import ConfigError, PipelineConfig
from modern_llm.files import read_json, write_json

GIB = 2**30
RECORDED_PACKAGES = ("torch", "datasets", "tokenizers", "safetensors", "papermill", "pandas", "modern_llm")


class StageError(RuntimeError):
    """The stage cannot start. The message names the value, the place and the remedy."""


def runs_folder() -> Path:
    """`$MODERN_LLM_RUNS`, else `runs/` of the checkout the package is installed from, else `runs/` here."""
    if chosen := os.environ.get("MODERN_LLM_RUNS"):
        return Path(chosen).expanduser()
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "settings.ini").is_file() else Path.cwd()) / "runs"


# ---- parameters ------------------------------------------------------------------------------------------------------


def injected_parameters(cells: list[str]) -> list[str]:
    """The names assigned in papermill's injected cell, found among the executed cells (IPython's `In`)."""
    found = []
    for source in cells:
        if source.startswith("# Parameters\n"):
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    found.append(node.targets[0].id)
    return found


def refuse_unknown(given: Iterable[str], declared: Iterable[str]) -> None:
    """Raise ConfigError for a parameter the stage does not have: papermill itself only warns."""
    for name in given:
        if name not in declared and not name.startswith("PAPERMILL_"):
            raise ConfigError(f"unknown parameter {name!r}{configs.nearest(name, declared)}")


def parse_overrides(text: str) -> dict:
    """`"model.num_experts=4 data.sources=synthetic"` as the nested dict that `config.override` takes.

    Values are JSON where they parse as JSON, else strings; a comma makes a list.
    """
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"overrides={text!r} cannot be read: {error}") from error
    nested: dict = {}
    for item in items:
        path, equals, raw = item.partition("=")
        *parents, leaf = path.split(".")
        if not equals or not leaf:
            raise ConfigError(f"overrides: {item!r} must look like model.width=256")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"overrides: {path!r} is set both as a value and as a section")
        value = _json_or_text(raw) if raw[:1] in '[{"' or "," not in raw else [_json_or_text(r) for r in raw.split(",")]
        place[leaf] = [value] if path == "data.sources" and isinstance(value, str) else value
    return nested


def _json_or_text(raw: str) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return raw


KINDS = {"preset": (str,), "run": (str, int), "overrides": (str,), "device": (str,), "output_dir": (str,),
         "resume": (bool,), "force": (bool,)}


def resolve(stage: str, parameters: dict) -> PipelineConfig:
    """The preset with the notebook's parameters put in: overrides, seed, device, and the stage's max_steps/minutes."""
    for name, kind in KINDS.items():
        if not isinstance(value := parameters.get(name), (*kind, type(None))):
            wanted = "True or False" if bool in kind else "text"
            raise ConfigError(f"parameters: {name}={value!r} is {type(value).__name__}, should be {wanted}")
    resolved = configs.get_pipeline_preset(parameters["preset"])
    resolved = configs.override(resolved, parse_overrides(parameters.get("overrides") or ""), "overrides")
    train = {k: parameters[k] for k in ("max_steps", "max_minutes") if parameters.get(k) is not None}
    values: dict = {stage: train} if train else {}
    if parameters.get("seed") is not None:
        values["seed"] = parameters["seed"]
    if parameters.get("device"):
        values["hardware"] = {"device": parameters["device"]}
    return configs.override(resolved, values, "parameters")


# ---- the machine -----------------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes of main memory that can be had now."""
    try:
        import psutil

        return psutil.virtual_memory().available
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_micro_batch(config: PipelineConfig, stage: str, memory: int) -> PipelineConfig:
    """The config with the largest micro-batch whose training memory fits in `memory` bytes (the result is the same)."""
    train = getattr(config, stage)
    sizes = [m for m in range(train.micro_batch, 0, -1) if train.batch_size % m == 0]
    for size in sizes:
        smaller = dataclasses.replace(train, micro_batch_size=size)
        if counts.training_memory(config.model, smaller)["total"] <= 0.9 * memory:
            return config if size == train.micro_batch else dataclasses.replace(config, **{stage: smaller})
    need = counts.training_memory(config.model, dataclasses.replace(train, micro_batch_size=1))["total"]
    raise StageError(f"memory: even one sequence at a time needs {need / GIB:.1f} GB, there are {memory / GIB:.1f} GB")


def preflight(config: PipelineConfig, stage: str) -> tuple[PipelineConfig, str]:
    """Check device, memory and data before anything is written; returns the fitted config and the device.

    Raises StageError that lists everything missing at once and says what to run instead. A device named by hand
    (not "auto") lifts the preset's demands on the GPU.
    """
    import torch

    from modern_llm.checkpoints import pick_device
    from modern_llm.sources import DatasetNotFound, find_source
    from modern_llm.tokens import gpt2_tokenizer

    missing = []
    device, hardware = "cpu", config.hardware
    try:
        device = str(pick_device(hardware.device))
        if hardware.device == "auto" and hardware.min_gpu_memory_gb:
            if not device.startswith("cuda"):
                missing.append(f"device: needs a CUDA GPU with {hardware.min_gpu_memory_gb:g} GB, this machine has none")
            elif torch.cuda.get_device_properties(device).total_memory < hardware.min_gpu_memory_gb * GIB * 0.93:
                there = torch.cuda.get_device_properties(device).total_memory / GIB
                missing.append(f"device: needs {hardware.min_gpu_memory_gb:g} GB of GPU memory, there are {there:.0f} GB")
            elif hardware.needs_bf16 and not torch.cuda.is_bf16_supported():
                missing.append(f"device: needs bf16, which {torch.cuda.get_device_name(device)} has not")
    except ValueError as error:
        missing.append(f"device: {error}")
    memory = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()
    try:
        fitted = fit_micro_batch(config, stage, memory)
    except StageError as error:
        missing.append(str(error))
    else:
        need = counts.training_memory(fitted.model, getattr(fitted, stage))["total"] / GIB
        if missing:
            missing.append(f"memory: estimated {need:.1f} GB to train, {memory / GIB:.1f} GB free on {device}")
    for name in config.data.sources:
        try:
            find_source(name)
        except DatasetNotFound as error:
            missing.append(f"data: {error}")
    if config.data.tokenizer == "gpt2":
        try:
            gpt2_tokenizer()
        except DatasetNotFound as error:
            missing.append(f"data: {error}")
    if missing:
        raise StageError(
            f"preset {config.name!r} cannot run here:\n  - " + "\n  - ".join(missing) + "\nInstead: preset=local-cpu "
            "(real text on a CPU) or preset=local-smoke (built-in data, needs nothing). To force the device, say "
            f"device=cpu, with max_steps=2 and overrides such as '{stage}.batch_size=2 {stage}.micro_batch_size=1 "
            f"{stage}.compile=false data.sources=synthetic data.tokenizer=bpe data.max_validation_tokens=2000'."
        )
    return fitted, device


def git_commit() -> str:
    """The checkout's commit, with `+changes` if the tree is not clean; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    ask = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
    commit = ask("rev-parse", "HEAD")
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("+changes" if ask("status", "--porcelain", "--untracked-files=no").stdout else "")


def machine(device: str) -> dict:
    """Versions and hardware, as they go into `run.json`."""
    import torch

    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"versions": versions, "device": device, "device_name": name, "threads": torch.get_num_threads(),
            "platform": platform.platform()}


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class StageRun:
    """A stage under way: its config, its device, its folder, and whether it goes on where it was."""

    stage: str
    run: str
    config: PipelineConfig
    device: str
    folder: Path  # runs/<run>/<stage>
    resume: bool
    started: float

    def finish(self, results: dict) -> dict:
        """Write `results.json`, mark the stage finished in `run.json`, and return the results."""
        write_json(self.folder / "results.json", results)
        self._record("finished")
        return results

    def require(self, stopped: str) -> None:
        """Go on only if training came to its end; else record how it stopped and raise StageError saying how to resume."""
        if stopped not in ("finished", "max_minutes"):
            self._record(stopped)
            raise StageError(f"training was {stopped} and checkpointed in {self.folder}; run again with run={self.run!r} "
                             "and resume=True to go on")

    def _record(self, status: str) -> None:
        path = self.folder.parent / "run.json"
        record = read_json(path)
        record["stages"][self.stage] = {"status": status, "started": _clock(self.started),
                                        "seconds": round(time.time() - self.started, 1)}
        write_json(path, record)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def choose_folder(stage: str, parameters: dict) -> tuple[str, Path, bool]:
    """Run name, stage folder and whether to resume. An existing stage is never touched without `resume` or `force`."""
    root = Path(parameters.get("output_dir") or runs_folder()).expanduser().resolve()
    name = str(parameters.get("run") or Path(parameters["preset"]).stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"run={name!r} is no folder name: use letters, digits, '.', '_' and '-'")
    folder, resume, force = root / name / stage, parameters.get("resume"), parameters.get("force")
    if (folder / "params.json").exists() and not (resume or force):
        if parameters.get("run"):
            how = "is finished" if (folder / "results.json").exists() else "was begun"
            raise StageError(f"run {name!r} exists: stage {stage} {how} in {folder}; say resume=True to go on, "
                             "force=True to delete it and begin anew, or choose another run name")
        name += datetime.datetime.now().strftime("-%Y%m%d-%H%M%S")
        folder = root / name / stage
    return name, folder, bool(resume and (folder / "params.json").exists())


def begin(stage: str, namespace: dict, declared: list[str]) -> StageRun:
    """Start a stage from a notebook: `begin("pretrain", globals(), [names of the parameters])`.

    Resolves the preset, refuses unknown parameters, checks the machine, makes `runs/<run>/<stage>/`, and writes
    `params.json` and `run.json`. Nothing is written when a check fails.
    """
    refuse_unknown(injected_parameters(namespace.get("In", [])), declared)
    parameters = {name: namespace[name] for name in declared}
    config = resolve(stage, parameters)
    name, folder, resume = choose_folder(stage, parameters)
    if resume:  # another micro-batch would round differently
        former = read_json(folder.parent / "run.json")["config"][stage]["micro_batch_size"]
        config = configs.override(config, {stage: {"micro_batch_size": former}})
    config, device = preflight(config, stage)
    now = time.time()
    try:
        if parameters.get("force") and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run_file = folder.parent / "run.json"
        former = read_json(run_file)["stages"] if run_file.exists() else {}
        write_json(run_file, {"run": name, "preset": config.name, "config": configs.to_dict(config),
                              "git_commit": git_commit(), "seed": config.seed, **machine(device), "stages": former})
        write_json(folder / "params.json", {"stage": stage, **parameters, "run": name})
    except OSError as error:
        raise StageError(f"cannot write to {folder}: {error.strerror}; choose another place with output_dir=…") from error
    result = StageRun(stage, name, config, device, folder, resume, now)
    result._record("running")
    _mark_failures(result, namespace)
    _keep_notebook(folder / "notebook.ipynb", namespace)
    return result


def _mark_failures(stage: StageRun, namespace: dict) -> None:
    """From now on a cell that raises marks the stage as failed in `run.json` (unless it says how it ended)."""
    def after_cell(result) -> None:
        if result.error_in_exec is not None and not isinstance(result.error_in_exec, StageError):
            stage._record("failed")

    if shell := namespace.get("get_ipython", lambda: None)():
        shell.events.register("post_run_cell", after_cell)


def notebook_path(namespace: dict) -> Path | None:
    """Where the executing notebook is being saved: by papermill (its output), or by Jupyter; None if nobody says."""
    if path := namespace.get("PAPERMILL_OUTPUT_PATH") or os.environ.get("JPY_SESSION_NAME"):
        return Path(path)
    try:
        import psutil
        from papermill.cli import papermill

        parent = psutil.Process().parent()
        words = parent.cmdline()
        start = next(i for i, word in enumerate(words) if Path(word).name in ("papermill", "__main__.py"))
        output = papermill.make_context("papermill", words[start + 1:], resilient_parsing=True).params["output_path"]
        return Path(parent.cwd()) / output if output and output != "-" else None
    except (ImportError, StopIteration, psutil.Error, ValueError):
        return None


def _keep_notebook(target: Path, namespace: dict) -> None:
    """When the kernel ends, copy the executed notebook into the run's folder (papermill saves after every cell)."""
    source = notebook_path(namespace)
    if source is None or "ipykernel" not in sys.modules:
        return

    def copy() -> None:
        if source.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)

    atexit.register(copy)


def config_table(config: PipelineConfig, stage: str):
    """What the stage will do, as a table: sizes, closed-form estimates, data and the optimisation settings."""
    import pandas as pd

    model, train = config.model, getattr(config, stage)
    parameters = counts.parameter_count(model)
    tokens = train.max_steps * train.batch_size * model.context_length
    memory = counts.training_memory(model, train)["total"]
    rows = [
        ("preset", config.name, config.description),
        ("parameters", f"{parameters['total']:,}", f"{parameters['active']:,} active for a token"),
        ("shape", f"{model.num_layers} layers × {model.width}", f"{model.num_heads} heads, {model.num_kv_heads} key/value "
         f"groups, feed-forward {model.ffn_width}, context {model.context_length}"),
        ("data", ", ".join(config.data.sources), f"tokenizer {config.data.tokenizer}, vocabulary {model.vocab_size}"),
        ("batch", f"{train.batch_size} × {model.context_length} tokens", f"in micro-batches of {train.micro_batch}"),
        ("budget", f"{train.max_steps:,} steps = {tokens / 1e6:,.1f}M tokens",
         f"{tokens * counts.flops_per_token(model):.1e} FLOPs"
         + (f", at most {train.max_minutes:g} minutes" if train.max_minutes else "")),
        ("optimizer", train.optimizer, f"lr {train.lr:g}" + (f", Muon {train.muon_lr:g}" if train.optimizer == "muon"
         else "") + f", weight decay {train.weight_decay:g}, {train.schedule}"),
        ("memory", f"{memory / GIB:.2f} GB", "estimated, to train"),
    ]
    return pd.DataFrame(rows, columns=["", "value", "detail"]).set_index("")
