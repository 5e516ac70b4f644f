"""What a stage is told: its parameters, refused when they are wrong, and the config and the folder
that they come to.

Shared by the stages, which get them from papermill, and the pipeline, which gets them from the
command line. Imports no torch.
"""

from __future__ import annotations

import ast
import datetime
import os
import re
from collections.abc import Iterable
from pathlib import Path

from modern_llm.config import (
    ConfigError, PipelineConfig, get_pipeline_preset, nearest, override, preset_with, steps_wanted,
)
from modern_llm.files import CHECKOUT, IN_CHECKOUT
from modern_llm.messages import StageError
from modern_llm.runs.locks import COMMAND_LOCK, STAGE_LOCK, owner_of
from modern_llm.runs.resume import begun, changed_settings, params_of, run_record

# letters of a run's name: file systems allow 255, and reports and figures have longer ones
LONGEST_NAME = 100
# bytes of a run's folder: Linux allows 4096 for a whole path, and the files inside have longer ones
LONGEST_PATH = 3800
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
KINDS = {"preset": (str,), "run": (str, int), "overrides": (str,), "device": (str,),
         "output_dir": (str,), "checkpoint": (str,), "resume": (bool,), "force": (bool,)}


def injected_parameters(cells: list[str]) -> list[str]:
    """The names assigned in papermill's injected cell, found among the executed cells (IPython's
    `In`).
    """
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
            raise ConfigError(f"unknown parameter {name!r}{nearest(name, declared)}")


def resolve(stage: str, parameters: dict) -> PipelineConfig:
    """The preset with the notebook's parameters put in: overrides, seed, device, and the stage's
    max_steps/minutes.
    """
    for name, kind in KINDS.items():
        if not isinstance(value := parameters.get(name), (*kind, type(None))):
            wanted = "True or False" if bool in kind else "text"
            raise ConfigError(
                f"parameters: {name}={value!r} is {type(value).__name__}, should be {wanted}")
    if parameters.get("resume") and parameters.get("force"):
        raise ConfigError("parameters: resume=True goes on with what is there, force=True deletes "
                          "it: say one of them")
    resolved = preset_with(parameters["preset"], parameters.get("overrides"))
    train = {k: parameters[k] for k in ("max_steps", "max_minutes")
             if parameters.get(k) is not None}
    values: dict = {stage: train} if train else {}
    if parameters.get("seed") is not None:
        values["seed"] = parameters["seed"]
    if parameters.get("device"):
        values["hardware"] = {"device": parameters["device"]}
    resolved = override(resolved, values, "parameters")
    if (steps := steps_wanted(resolved)) != resolved.pretrain.max_steps:
        raise ConfigError(f"data.tokens_target={resolved.data.tokens_target} makes {steps:,} steps,"
                          f" and max_steps={resolved.pretrain.max_steps} was asked for: say one of "
                          "them")
    return resolved


# ---- folders -------------------------------------------------------------------------------------


def runs_folder() -> Path:
    """`$MODERN_LLM_RUNS`, else `runs/` of the checkout the package is installed from, else `runs/`
    here. ConfigError for an unknown `~name`.
    """
    if chosen := os.environ.get("MODERN_LLM_RUNS"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"MODERN_LLM_RUNS={chosen!r} is not a folder: {error}") from error
    return (CHECKOUT if IN_CHECKOUT else Path.cwd()) / "runs"


def chosen_folder(run: str | None, checkpoint: str | None, output_dir: str | None) -> Path:
    """The folder of the run that the words name, or the one they give; StageError says which runs
    there are.
    """
    root = Path(output_dir or runs_folder()).expanduser()
    if run and checkpoint:
        raise StageError("say either --run or --checkpoint, not both")
    if checkpoint:
        return Path(checkpoint).expanduser()
    there = sorted(path.parent.name for path in root.glob("*/run.json"))
    if not run:
        raise StageError(f"which model? Say --run NAME or --checkpoint PATH; runs in {root}: "
                         f"{', '.join(there) or 'none'}")
    if run not in there and not _is_folder(root / run):
        raise StageError(
            f"no run {run!r} in {root}{nearest(run, there) if there else ', nor any other'}. "
            f"Tried {root / run}")
    return root / run


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file can have
        return False


def report_folder(run_folder: Path) -> Path:
    """`report/` of the checkout for a run that is kept in its `runs/`; a run elsewhere keeps its
    report with it.
    """
    inside = IN_CHECKOUT and run_folder.resolve().parent == CHECKOUT / "runs"
    return CHECKOUT / "report" if inside else run_folder / "report"


def preempted(folder: Path, wanted: PipelineConfig) -> bool:
    """Whether a scheduler ended this stage, and it was begun with the settings that are wanted now.
    """
    if not (folder / "params.json").is_file():
        return False
    ended = run_record(folder.parent)["stages"].get(folder.name, {}).get("status")
    return ended == "preempted" and not changed_settings(params_of(folder), folder.name, wanted)


def choose_folder(stage: str, parameters: dict,
                  wanted: PipelineConfig | None = None) -> tuple[str, Path, bool]:
    """Run name, stage folder and whether to resume. A run is called as its preset calls itself; an
    existing stage is never touched without `resume` or `force`.

    With `wanted`, the config asked for, a stage that was preempted under the same settings is
    resumed without being told.
    """
    given = parameters.get("run")
    name = (str(given) if given not in (None, "")
            else (wanted or get_pipeline_preset(parameters["preset"])).name)
    if (not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?", name)
            or RESERVED.fullmatch(name)):
        raise ConfigError(f"run={name!r:.80} is not a folder name everywhere: use letters, digits, "
                          "'.', '_' and '-', begin with one of the first two, do "
                          "not end with a dot, and leave out what Windows reserves (con, nul, …)")
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"run={name[:20]!r}… has {len(name)} letters, and files are named after "
                          f"it: use at most {LONGEST_NAME}")
    root = place_for_runs(parameters.get("output_dir") or runs_folder(), name)
    folder, resume, force = root / name / stage, parameters.get("resume"), parameters.get("force")
    resume = resume or (wanted is not None and not force and preempted(folder, wanted))
    there, named = begun(folder), parameters.get("run") not in (None, "")
    if there and named and not (resume or force):
        params_of(folder)  # whose error is the better one
        how = "is finished" if (folder / "results.json").exists() else "was begun"
        raise StageError(
            f"run {name!r} exists: stage {stage} {how} in {folder}; say resume=True to go on, "
            "force=True to delete it and start over, or choose another run name")
    if not (named or resume or force) and (there or is_in_use(root / name)):
        name += datetime.datetime.now().strftime("-%Y%m%d-%H%M%S")
        folder = root / name / stage
    return name, folder, bool(resume and there)


def place_for_runs(given: str | Path, name: str) -> Path:
    """The folder that runs are kept in, as a whole path. ConfigError or StageError if `name` cannot
    lie in it.
    """
    try:
        root = Path(given).expanduser().resolve()
        for place in (root, root / name):
            if place.exists() and not place.is_dir():
                raise StageError(
                    f"cannot write to {place}: it is a file, where the "
                    f"folder {'of the runs' if place == root else 'of the run'} should "
                    "be; choose another run name, or choose another place with output_dir=…")
        if len(os.fsencode(root / name)) > LONGEST_PATH:
            raise ConfigError(f"output_dir={str(given)!r:.80} makes a path of over {LONGEST_PATH} "
                              "letters: choose another")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, (ConfigError, StageError)):
            raise
        raise ConfigError(f"output_dir={str(given)!r:.80} cannot hold a run: "
                          f"{getattr(error, 'strerror', None) or error}; choose another") from error
    return root


def is_in_use(run_folder: Path) -> bool:
    """Whether another process works on a run: a stage, or a command that is between two of them or
    writes the report.
    """
    owners = (owner_of(run_folder, name) for name in (STAGE_LOCK, COMMAND_LOCK))
    return any(owner is not None and owner["pid"] != os.getpid() for owner in owners)
