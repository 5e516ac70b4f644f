"""What a stage leaves on disk: `run.json` of its run, and `params.json` and `results.json` of its
own.

torch is imported where it is needed, not at the top.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import PipelineConfig, TrainConfig, to_dict
from modern_llm.files import read_json, write_json
from modern_llm.messages import StageError
from modern_llm.models.counts import flops_per_token
from modern_llm.runs.lineage import described, start_of
from modern_llm.runs.locks import RunLock, this_process
from modern_llm.runs.parameters import report_folder
from modern_llm.runs.preflight import settings_of
from modern_llm.runs.scheduler import PREEMPTION_SIGNALS
from modern_llm.runs.spec import sections
from modern_llm.training.ranks import TrainingEnded
from modern_llm.training.tracking import Mirror

if TYPE_CHECKING:
    from torch import nn

    from modern_llm.training.recipe import Recipe
    from modern_llm.training.train_step import Batch, LossFunction
    from modern_llm.training.trainer import Trainer

RECORDED_PACKAGES = ("torch", "datasets", "tokenizers", "safetensors", "papermill", "pandas",
                     "modern_llm")


@contextlib.contextmanager
def writes_to(folder: Path, remedy: str) -> Iterator[None]:
    """Turn a full or read-only disk into a StageError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise StageError(f"cannot write to {folder}: {error.strerror or error}; make room or make "
                         f"it writable, {remedy}") from error


@dataclasses.dataclass
class StageRun:
    """A stage under way: its config, its device, its folder, what it starts from, and whether it
    goes on where it was.
    """

    stage: str
    run: str
    config: PipelineConfig
    device: str
    folder: Path  # runs/<run>/<stage>
    resume: bool
    started: float
    # checkpoints, by the stage that made them
    inputs: dict[str, Path] = dataclasses.field(default_factory=dict)
    # the ranks that train together (distributed.World); None where nothing is trained
    world: object = None
    earlier_seconds: float = 0.0  # of the sessions before this one
    # on the run's folder, until the stage is finished or the process ends
    lock: RunLock | None = None

    @property
    def start(self) -> Path | None:
        """The checkpoint to start from; None for pretraining."""
        return start_of(self.inputs)

    @property
    def report(self) -> Path:
        """The folder of the run's report and figures."""
        return report_folder(self.folder.parent)

    def trainer(self, model: nn.Module, loss: LossFunction, batches: Callable[[int], Batch],
                recipe: Recipe, **others) -> Trainer:
        """A Trainer with this stage's settings, folder and device, evaluated and saved by the
        recipe; `others` are arguments of Trainer that differ.
        """
        from modern_llm.training.trainer import Trainer

        cfg, tracker = settings_of(self.config, self.stage), self.config.tracker
        given = {"cfg": cfg, "folder": self.folder,
                 "evaluate": recipe.evaluate, "save_model": recipe.save, "device": self.device,
                 "flops_per_token": flops_per_token(self.config.model, lora_rank=cfg.lora_rank),
                 "seed": self.config.seed, "resume": self.resume, "world": self.world}
        given |= others
        if tracker:
            given["on_row"] = Mirror(tracker, self.folder.parent, given["folder"]).update
        return Trainer(model, loss, batches, **given)

    def finish(self, results: dict) -> dict:
        """Write `results.json`, mark the stage finished in `run.json`, release the run's lock, and
        return the results.
        """
        with writes_to(self.folder,
                       "then run again with resume=True: nothing that was kept is lost"):
            write_json(self.folder / "results.json", results)
            self.mark("finished")
        for number in (PREEMPTION_SIGNALS if threading.current_thread() is threading.main_thread()
                       else ()):
            if getattr(signal.getsignal(number), "stage", None) is self:
                signal.signal(number, signal.SIG_DFL)
        if self.lock:
            self.lock.release()
        return results

    def require(self, stopped: str) -> None:
        """Go on only if training came to its end; else record how it stopped and raise StageError
        saying how to resume.

        Of several ranks only the first goes on; on the others this raises TrainingEnded.
        """
        if self.world:
            self.world.leave()
            if not self.world.is_main_process:
                raise TrainingEnded(stopped)
        if stopped not in ("finished", "max_minutes"):
            self.mark(stopped)
            raise StageError(f"training was {stopped} and checkpointed in {self.folder}; run again "
                             f"with run={self.run!r} and resume=True to go on")

    def mark(self, status: str) -> None:
        """Note in `run.json` how the stage stands."""
        path = self.folder.parent / "run.json"
        record = read_json(path)
        seconds = self.earlier_seconds + time.time() - self.started
        record["stages"][self.stage] = {
            "status": status, "started": _clock(self.started),
            "seconds": round(seconds, 1), **(this_process() if status == "running" else {})}
        write_json(path, record)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


# ---- what is written at the start ----------------------------------------------------------------


def git_commit() -> str:
    """The checkout's commit, with `+changes` if the tree is not clean; "unknown" outside a
    checkout.
    """
    here = Path(__file__).resolve().parent
    ask = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True,
                                        text=True)
    commit = ask("rev-parse", "HEAD")
    if commit.returncode:
        return "unknown"
    return (commit.stdout.strip()
            + ("+changes" if ask("status", "--porcelain", "--untracked-files=no").stdout else ""))


@functools.cache
def installed(package: str) -> str:
    """The version of a package; it stays the same while a process runs."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine(device: str) -> dict:
    """Versions and hardware, as they go into `run.json`."""
    import torch

    versions = {"python": platform.python_version(),
                **{package: installed(package) for package in RECORDED_PACKAGES}}
    name = (torch.cuda.get_device_name(device) if device.startswith("cuda")
            else platform.processor() or platform.machine())
    return {"versions": versions, "device": device, "device_name": name,
            "threads": torch.get_num_threads(), "platform": platform.platform()}


def write_record(run: StageRun, parameters: dict, resolved: PipelineConfig, former: dict,
                 data: dict, under_way: list[dict]) -> None:
    """`params.json` of the stage, and `run.json`, which keeps what the `former` one says of the
    other stages.

    `params.json` holds the settings as asked for (`resolved`), to be compared with those asked for
    the next time, and those that were changed `under_way`.
    """
    import torch

    from modern_llm.training.training_state import inference_precision

    path = run.folder.parent / "run.json"
    config = to_dict(run.config)
    config |= {name: former["config"][name] for name in former["stages"]
               if name != run.stage and name in former["config"]}
    if run.resume:
        run.earlier_seconds = former["stages"].get(run.stage, {}).get("seconds") or 0.0
    write_json(path, {"run": run.run, "preset": run.config.name, "config": config,
                      "git_commit": git_commit(), "seed": run.config.seed,
                      **machine(run.device),
                      "inference_precision": inference_precision(
                          run.config.hardware.inference_precision, torch.device(run.device)),
                      "stages": former["stages"]})
    wanted = sections(resolved, run.stage)
    if isinstance(fitted := settings_of(run.config, run.stage), TrainConfig):
        wanted[run.stage] |= {"micro_batch_size": fitted.micro_batch_size,
                              "precision": fitted.precision}
    write_json(run.folder / "params.json",
               {"stage": run.stage, **parameters, "run": run.run, "config": wanted,
                "context_length": resolved.model.context_length, "inputs": described(run.inputs),
                "data_files": data, **({"changed_under_way": under_way} if under_way else {})})
    run.mark("running")
