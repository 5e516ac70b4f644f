"""What every stage notebook does before and after its own work: resolve the preset, check the machine, keep the record.

Plain plumbing shared by chapters 03–08. It stands beside the modules of the design so that a stage's first cells stay
three lines long. torch and the data registry are imported where they are needed, not at the top.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modern_llm import config as configs
from modern_llm import counts
from modern_llm.config import ConfigError, PipelineConfig, TrainConfig
from modern_llm.files import read_json, write_json
from modern_llm.inputs import (
    DATA, NOTEBOOKS, SLOW_AND_UNUSED, WARNINGS, Preempted, StageError, changed_data, changes, data_files, described, find_checkpoint,
    found_inputs, is_model, make_bases, missing_data, no_inputs, notebooks_folder, own_inputs, say, sections, setting, start_of,
)
from modern_llm.locks import RunLock, owner_of, this_process
from modern_llm.ranks import TrainingEnded, launched

GIB = 2**30
RECORDED_PACKAGES = ("torch", "datasets", "tokenizers", "safetensors", "papermill", "pandas", "modern_llm")


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

    Values are JSON where they parse as JSON, else strings; a comma makes a list, nothing behind the sign an empty one.
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
        place[leaf] = [value] * (raw != "") if leaf in LISTS and not isinstance(value, list) else value
    return nested


# Settings where one value stands for a list of one.
LISTS = ("sources", "replay_sources", "weights", "levels", "sampled_levels", "shots", "protocol_sources", "baselines")


def _json_or_text(raw: str) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return raw


KINDS = {"preset": (str,), "run": (str, int), "overrides": (str,), "device": (str,), "output_dir": (str,),
         "checkpoint": (str,), "resume": (bool,), "force": (bool,)}


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


def settings_of(config: PipelineConfig, stage: str) -> object | None:
    """The config section named after the stage; the attention stage has none."""
    return getattr(config, stage, None)


def memory_needed(config: PipelineConfig, stage: str) -> int:
    """Bytes to train in this stage, or to run the model where it does not train: a closed-form estimate."""
    if isinstance(train := settings_of(config, stage), TrainConfig):
        return counts.training_memory(config.model, train)["total"]
    return counts.inference_memory(config.model, batch=16, bytes_per_value=4)["total"]


def fit_to_memory(config: PipelineConfig, stage: str, memory: int) -> PipelineConfig:
    """The config with a micro-batch that fits; StageError if not even one row does."""
    if isinstance(settings_of(config, stage), TrainConfig):
        return fit_micro_batch(config, stage, memory)
    if (need := memory_needed(config, stage)) > 0.9 * memory:
        raise StageError(f"memory: the model needs {need / GIB:.1f} GB, there are {memory / GIB:.1f} GB")
    return config


def preflight(config: PipelineConfig, stage: str) -> tuple[PipelineConfig, str]:
    """Check device, memory and the data the stage reads before anything is written; returns the fitted config and the device.

    Raises StageError that lists everything missing at once and says what to run instead. A device named by hand
    (not "auto") lifts the preset's demands on the GPU.
    """
    import torch

    from modern_llm.checkpoints import pick_device

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
    fitted = config
    try:
        fitted = fit_to_memory(config, stage, memory)
        if missing:
            missing.append(f"memory: estimated {memory_needed(fitted, stage) / GIB:.1f} GB, {memory / GIB:.1f} GB free on {device}")
    except StageError as error:
        missing.append(str(error))
    missing += missing_data(config, [stage])
    if missing:
        raise StageError(f"preset {config.name!r} cannot run here:\n  - " + "\n  - ".join(missing) + "\nInstead: "
                         + "preset=local-cpu (real text on a CPU) or " * (config.name != "local-cpu")
                         + "preset=local-smoke (built-in data, needs nothing)." + _forced(config, stage))
    return fitted, device


def _forced(config: PipelineConfig, stage: str) -> str:
    """How to try the stage all the same, on another device and built-in data."""
    words = [f"{path}=synthetic" for path in DATA[stage] if path != "dpo.replay_sources"] + ["dpo.replay_sources=text"] * (stage == "dpo")
    if "sft.sources=synthetic" in words:
        words.append("sft.weights=1")
    if stage == "pretrain":
        words += ["data.tokenizer=bpe", "data.max_validation_tokens=2000"]
    steps = ""
    if isinstance(settings_of(config, stage), TrainConfig):
        words = [f"{stage}.batch_size=2", f"{stage}.micro_batch_size=1", f"{stage}.compile=false", *words]
        steps = "max_steps=2 and "
    return f" To force the device, say device=cpu, with {steps}overrides such as '{' '.join(words)}'." if words else ""


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
    """A stage under way: its config, its device, its folder, what it starts from, and whether it goes on where it was."""

    stage: str
    run: str
    config: PipelineConfig
    device: str
    folder: Path  # runs/<run>/<stage>
    resume: bool
    started: float
    inputs: dict[str, Path] = dataclasses.field(default_factory=dict)  # checkpoints, by the stage that made them
    world: object = None  # the ranks that train together (distributed.World); None where nothing is trained
    earlier_seconds: float = 0.0  # of the sittings before this one
    lock: RunLock | None = None  # on the run's folder, until the stage is finished or the process ends

    @property
    def start(self) -> Path | None:
        """The checkpoint to start from; None for pretraining."""
        return start_of(self.inputs)

    @property
    def report(self) -> Path:
        """The folder of the run's report and figures."""
        return report_folder(self.folder.parent)

    def finish(self, results: dict) -> dict:
        """Write `results.json`, mark the stage finished in `run.json`, let go of the run, and return the results."""
        with writes_to(self.folder, "then run again with resume=True: nothing that was kept is lost"):
            write_json(self.folder / "results.json", results)
            self._record("finished")
        for number in WARNINGS if threading.current_thread() is threading.main_thread() else ():
            if getattr(signal.getsignal(number), "stage", None) is self:
                signal.signal(number, signal.SIG_DFL)
        if self.lock:
            self.lock.release()
        return results

    def require(self, stopped: str) -> None:
        """Go on only if training came to its end; else record how it stopped and raise StageError saying how to resume.

        Of several ranks only the first goes on; on the others this raises TrainingEnded.
        """
        if self.world:
            self.world.leave()
            if not self.world.main:
                raise TrainingEnded(stopped)
        if stopped not in ("finished", "max_minutes"):
            self._record(stopped)
            raise StageError(f"training was {stopped} and checkpointed in {self.folder}; run again with run={self.run!r} "
                             "and resume=True to go on")

    def _record(self, status: str) -> None:
        path = self.folder.parent / "run.json"
        record = read_json(path)
        seconds = self.earlier_seconds + time.time() - self.started
        record["stages"][self.stage] = {"status": status, "started": _clock(self.started), "seconds": round(seconds, 1),
                                        **(this_process() if status == "running" else {})}
        write_json(path, record)


@contextlib.contextmanager
def writes_to(folder: Path, remedy: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StageError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise StageError(f"cannot write to {folder}: {error.strerror or error}; make room or make it writable, {remedy}") from error


def report_folder(run_folder: Path) -> Path:
    """`report/` of the checkout for a run that is kept in its `runs/`; a run elsewhere keeps its report with it."""
    checkout = Path(__file__).resolve().parent.parent
    inside = (checkout / "settings.ini").is_file() and run_folder.resolve().parent == checkout / "runs"
    return checkout / "report" if inside else run_folder / "report"


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def preempted(folder: Path, wanted: dict) -> bool:
    """Whether a scheduler ended this stage, and it was begun with the settings that are wanted now."""
    record, params = folder.parent / "run.json", folder / "params.json"
    if not (record.is_file() and params.is_file()):
        return False
    ended = read_json(record)["stages"].get(folder.name, {}).get("status")
    return ended == "preempted" and not changes(read_json(params).get("config", {}), wanted)


def choose_folder(stage: str, parameters: dict, wanted: dict | None = None) -> tuple[str, Path, bool]:
    """Run name, stage folder and whether to resume. An existing stage is never touched without `resume` or `force`.

    With `wanted`, the settings asked for, a stage that was preempted under the same settings is resumed without being told.
    """
    root = Path(parameters.get("output_dir") or runs_folder()).expanduser().resolve()
    name = str(parameters.get("run") or Path(parameters["preset"]).stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"run={name!r} is no folder name: use letters, digits, '.', '_' and '-'")
    folder, resume, force = root / name / stage, parameters.get("resume"), parameters.get("force")
    resume = resume or (wanted is not None and not force and preempted(folder, wanted))
    begun, named = (folder / "params.json").exists(), parameters.get("run")
    if begun and named and not (resume or force):
        how = "is finished" if (folder / "results.json").exists() else "was begun"
        raise StageError(f"run {name!r} exists: stage {stage} {how} in {folder}; say resume=True to go on, "
                         "force=True to delete it and begin anew, or choose another run name")
    if not (named or resume or force) and (begun or is_in_use(root / name)):
        name += datetime.datetime.now().strftime("-%Y%m%d-%H%M%S")
        folder = root / name / stage
    return name, folder, bool(resume and (folder / "params.json").exists())


def is_in_use(run_folder: Path) -> bool:
    """Whether another process works on a run."""
    owner = owner_of(run_folder)
    return owner is not None and owner["pid"] != os.getpid()


def begin(stage: str, namespace: dict, declared: list[str]) -> StageRun:
    """Start a stage from a notebook: `begin("pretrain", globals(), [names of the parameters])`.

    Resolves the preset, refuses unknown parameters, takes the run's lock, finds the checkpoints to start from, checks the machine and
    the data, makes `runs/<run>/<stage>/`, and writes `params.json` and `run.json`. Nothing is written when a check fails.
    From then until `finish`, SIGTERM and SIGUSR1 end the stage: with a checkpoint while it trains, at once where it does not.
    """
    refuse_unknown(injected_parameters(namespace.get("In", [])), declared)
    parameters = {name: namespace[name] for name in declared}
    config = resolve(stage, parameters)
    if task := namespace.get("TASK"):
        return follow_stage(stage, config, task)
    wanted = sections(config, stage)
    name, folder, _ = choose_folder(stage, parameters, wanted)
    lock = None
    try:
        if os.environ.get("RANK", "0") == "0":  # the other ranks of a job write nothing
            with writes_to(folder, "or choose another place with output_dir=…"):
                lock = RunLock(folder.parent, f"stage {stage}").take()
        _, _, resume = choose_folder(stage, {**parameters, "run": name}, wanted)  # again: another process may just have finished it
        stage_run = _begin(stage, name, folder, resume, parameters, config, lock)
    except BaseException:
        if lock:
            lock.release()
        raise
    _mark_failures(stage_run, namespace)
    _keep_notebook(folder / "notebook.ipynb", namespace)
    return stage_run


def _begin(stage: str, name: str, folder: Path, resume: bool, parameters: dict, resolved: PipelineConfig, lock: RunLock | None) -> StageRun:
    """The checks of `begin`, and the stage's record, once nobody else works on the run."""
    config, former = resolved, read_json(folder / "params.json") if resume else {}
    if resume and not parameters.get("resume"):
        say(f"{stage}: was preempted, goes on")
    inputs = choose_inputs(stage, config, parameters, folder, former)
    if start := start_of(inputs):
        config = with_model_of(config, start)
    if resume and isinstance(settings_of(config, stage), TrainConfig):  # another micro-batch would round differently
        config = configs.override(config, {stage: {"micro_batch_size": former_micro_batch(folder, stage)}})
    config, device = preflight(config, stage)
    if changed := changed_data(config, stage, former.get("data_files", {})):
        raise StageError(f"stage {stage} was begun with other data: {'; '.join(changed)}. Put the former file back, or say force=True to "
                         "delete the stage and begin anew, or choose another run name")
    stage_run = StageRun(stage, name, config, device, folder, resume, time.time(), inputs, lock=lock)
    stage_run.world = first_rank(stage_run, parameters)
    with writes_to(folder, "or choose another place with output_dir=…"):
        if parameters.get("force") and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(stage_run, parameters, resolved, data_files(config, stage, former.get("data_files")))
    return stage_run


def first_rank(run: StageRun, parameters: dict):
    """The ranks that will train with this process (hardware.ranks), and what they have to run for it; None if nothing is trained.

    StageError if they were not started.
    """
    if not isinstance(settings_of(run.config, run.stage), TrainConfig):
        return None
    from modern_llm.distributed import World

    hardware, (_, size, _) = run.config.hardware, launched()
    if hardware.ranks > 1 and size != hardware.ranks:
        raise StageError(f"hardware.ranks={hardware.ranks}, but {size} process{'es were' if size > 1 else ' was'} started: run "
                         f"`modern-llm run --stage {run.stage} -p hardware.ranks={hardware.ranks} …`, or set hardware.ranks={size}")
    task = {"notebook": str(notebooks_folder() / NOTEBOOKS[run.stage]), "run": run.run, "folder": str(run.folder),
            "resume": run.resume, "parameters": parameters}
    return World(0, hardware.ranks, hardware.strategy, task)


def follow_stage(stage: str, config: PipelineConfig, task: dict) -> StageRun:
    """The stage as rank 0 began it, for another rank; nothing is written."""
    from modern_llm.checkpoints import pick_device
    from modern_llm.distributed import World

    folder = Path(task["folder"])
    inputs = {name: Path(entry["path"]) for name, entry in read_json(folder / "params.json")["inputs"].items()}
    if start := start_of(inputs):
        config = with_model_of(config, start)
    config = configs.override(config, {stage: {"micro_batch_size": former_micro_batch(folder, stage)}})
    world = World(launched()[0], config.hardware.ranks, config.hardware.strategy)
    return StageRun(stage, task["run"], config, str(pick_device(config.hardware.device)), folder, task["resume"], time.time(), inputs, world)


def choose_inputs(stage: str, config: PipelineConfig, parameters: dict, folder: Path, former: dict) -> dict[str, Path]:
    """The checkpoints a stage starts from; a line says which. `former` is its `params.json` when it is resumed."""
    if stage == "pretrain":
        return {}
    run_folder = folder.parent
    named = run_folder.parent / str(parameters.get("run") or Path(parameters["preset"]).stem)  # run_folder may carry a time
    if parameters.get("checkpoint"):
        inputs = {"checkpoint": find_checkpoint(parameters["checkpoint"])}
    elif not (inputs := own_inputs(stage, run_folder) or own_inputs(stage, named) or found_inputs(stage, run_folder, config)):
        if config.name != "lesson":
            raise no_inputs(stage, run_folder, config.name)
        inputs = {name: Path(entry["path"]) for name, entry in former.get("inputs", {}).items()}
        if not inputs or not all(map(is_model, inputs.values())):
            _, device = preflight(config, stage)
            inputs = make_bases(stage, config, parameters, device)
    now = described(inputs)
    if changed := changes(*({n: e["sha256"][:12] for n, e in side.items()} for side in (former.get("inputs", now), now))):
        raise StageError(f"stage {stage} was begun from other weights ({'; '.join(changed)}): say force=True to delete it and "
                         "begin anew, or choose another run name")
    say(f"{stage}: starts from {start_of(inputs)}" + (f"; uses {', '.join(inputs)}" if len(inputs) > 1 else ""))
    return inputs


def with_model_of(config: PipelineConfig, checkpoint: Path) -> PipelineConfig:
    """The config with the architecture of a checkpoint in place of the preset's, but rows no longer than the preset's; a line says what differs."""
    from modern_llm.models import read_config

    own = read_config(checkpoint)
    model = dataclasses.replace(own, context_length=min(own.context_length, config.model.context_length))
    if model != own:
        say(f"  rows of {model.context_length} tokens, as the preset says; the model itself keeps its context of {own.context_length}")
    if differing := changes(configs.to_dict(config.model), configs.to_dict(model), "model."):
        say("  the model is the checkpoint's, not the preset's: " + "; ".join(differing))
    data = config.data  # later stages read the checkpoint's tokenizer, not these two settings; they must only fit each other
    if data.tokenizer == "bpe" or model.vocab_size < configs.GPT2_VOCAB_SIZE:
        data = dataclasses.replace(data, tokenizer="bpe", tokenizer_vocab_size=min(data.tokenizer_vocab_size, model.vocab_size))
    return dataclasses.replace(config, model=model, data=data)


def former_micro_batch(folder: Path, stage: str) -> int | None:
    """The micro-batch that an earlier sitting of the stage was fitted to."""
    record = read_json(folder / "params.json").get("config") or read_json(folder.parent / "run.json")["config"]
    return record[stage]["micro_batch_size"]


def _write_record(run: StageRun, parameters: dict, resolved: PipelineConfig, data: dict) -> None:
    """`params.json` of the stage, and `run.json`, which keeps what it says of the other stages.

    `params.json` holds the settings as asked for (`resolved`), to be compared with those asked for the next time.
    """
    path = run.folder.parent / "run.json"
    former = read_json(path) if path.exists() else {"stages": {}, "config": {}}
    config = configs.to_dict(run.config)
    config |= {name: former["config"][name] for name in former["stages"] if name != run.stage and name in former["config"]}
    if run.resume:
        run.earlier_seconds = former["stages"].get(run.stage, {}).get("seconds", 0.0)
    write_json(path, {"run": run.run, "preset": run.config.name, "config": config, "git_commit": git_commit(), "seed": run.config.seed,
                      **machine(run.device), "stages": former["stages"]})
    wanted = sections(resolved, run.stage)
    if isinstance(fitted := settings_of(run.config, run.stage), TrainConfig):
        wanted[run.stage]["micro_batch_size"] = fitted.micro_batch_size
    write_json(run.folder / "params.json", {"stage": run.stage, **parameters, "run": run.run, "config": wanted,
                                            "inputs": described(run.inputs), "data_files": data})
    run._record("running")


def _mark_failures(stage: StageRun, namespace: dict) -> None:
    """From now on a cell that raises marks the stage as failed in `run.json` (unless it says how it ended), a scheduler's warning as preempted."""
    shell = namespace.get("get_ipython", lambda: None)()
    if shell is None:
        return
    busy = threading.Event()
    busy.set()  # this very cell

    def after_cell(result) -> None:
        busy.clear()
        error = result.error_in_exec
        if error is None or isinstance(error, (StageError, Preempted)):
            return
        if isinstance(error, getattr(sys.modules.get("torch"), "AcceleratorError", ())):
            say(f"{stage.stage}: the device {stage.device} is lost. What {stage.folder} holds is whole: run again with run={stage.run!r} and "
                "resume=True, here, on another machine or with device=cpu")
        stage._record("failed")

    def end(number: int, frame) -> None:
        for other in WARNINGS:
            signal.signal(other, signal.SIG_IGN)  # once is enough
        stage._record("preempted")
        name = signal.Signals(number).name
        if busy.is_set():
            raise Preempted(f"{name}: stage {stage.stage} was ended between two of its results; what it has kept in {stage.folder} stays, "
                            "and the same start goes on there")
        say(f"{stage.stage}: ended by {name}")
        os._exit(1)  # between two cells nobody would see an exception

    shell.events.register("pre_run_cell", lambda info: busy.set())
    shell.events.register("post_run_cell", after_cell)
    if type(shell).__name__ == "ZMQInteractiveShell" and threading.current_thread() is threading.main_thread():  # a kernel of its own
        end.stage = stage
        for number in WARNINGS:
            signal.signal(number, end)


def notebook_path(namespace: dict) -> Path | None:
    """Where the executing notebook is being saved: by papermill (its output), or by Jupyter; None if nobody says."""
    if path := namespace.get("PAPERMILL_OUTPUT_PATH") or os.environ.get("MODERN_LLM_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME"):
        return Path(path)
    try:
        import psutil

        sys.modules.setdefault(SLOW_AND_UNUSED, None)
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
    """What the stage will do, as a table: the model, the data it reads, its optimisation, and its own settings."""
    import pandas as pd

    model, settings = config.model, settings_of(config, stage)
    parameters = counts.parameter_count(model)
    data = {name: None for path in DATA[stage] for value in [setting(config, path)]
            for name in ([value] if isinstance(value, str) else value) if name != "text"}
    rows = [
        ("preset", config.name, config.description),
        ("parameters", f"{parameters['total']:,}", f"{parameters['active']:,} active for a token"),
        ("shape", f"{model.num_layers} layers × {model.width}", f"{model.num_heads} heads, {model.num_kv_heads} key/value "
         f"groups, feed-forward {model.ffn_width}, context {model.context_length}"),
    ]
    if stage == "pretrain":
        rows.append(("data", ", ".join(data), f"tokenizer {config.data.tokenizer}, vocabulary {model.vocab_size}"))
    elif data:
        rows.append(("data", ", ".join(data), ""))
    if isinstance(settings, TrainConfig):
        rows += _optimisation(config, stage, settings)
    rows.append(("memory", f"{memory_needed(config, stage) / GIB:.2f} GB",
                 "estimated, to train" if isinstance(settings, TrainConfig) else "estimated, to run the model"))
    if settings is not None:
        shared = {field.name for field in dataclasses.fields(TrainConfig)} | {path.split(".")[1] for path in DATA[stage]}
        own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name not in shared}
        rows += [(name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, tuple) else str(value), "")
                 for name, value in own.items()]
    return pd.DataFrame(rows, columns=["", "value", "detail"]).set_index("")


def _optimisation(config: PipelineConfig, stage: str, train: TrainConfig) -> list[tuple[str, str, str]]:
    """Batch, budget and optimizer; only in pretraining is every row as long as the context."""
    limit = f"at most {train.max_minutes:g} minutes" if train.max_minutes else ""
    batch, budget, detail = f"{train.batch_size} rows", f"{train.max_steps:,} steps", limit
    if stage == "pretrain":
        tokens = train.max_steps * train.batch_size * config.model.context_length
        batch = f"{train.batch_size} × {config.model.context_length} tokens"
        budget += f" = {tokens / 1e6:,.1f}M tokens"
        detail = f"{tokens * counts.flops_per_token(config.model):.1e} FLOPs" + (f", {limit}" if limit else "")
    return [
        ("batch", batch, f"in micro-batches of {train.micro_batch}" + (
            f", shared by {config.hardware.ranks} ranks ({config.hardware.strategy})" if config.hardware.ranks > 1 else "")),
        ("budget", budget, detail),
        ("optimizer", train.optimizer, f"lr {train.lr:g}" + (f", Muon {train.muon_lr:g}" if train.optimizer == "muon" else "")
         + f", weight decay {train.weight_decay:g}, {train.schedule}"),
    ]
