"""Plan and run stages: each is its notebook, executed by papermill into the run's folder. Imports no torch."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from modern_llm.config import ConfigError, PipelineConfig, get_pipeline_preset, nearest, to_dict
from modern_llm.files import read_json
from modern_llm.stage import StageError, choose_folder, refuse_unknown, resolve

STAGES = {"pretrain": "03_pretrain.ipynb"}  # in the order of the pipeline
STOP_FILE = "STOP"  # the trainer looks for it after every step


@dataclass(frozen=True)
class Step:
    """One stage of a plan: what will be executed, where its record goes, and why it may be skipped."""

    stage: str
    notebook: Path
    folder: Path
    parameters: dict
    action: str  # "run", "resume" or "skip"


def notebooks_folder() -> Path:
    """`nbs/` of the checkout. FileNotFoundError if the package was installed without it."""
    folder = Path(__file__).resolve().parent.parent / "nbs"
    if not folder.is_dir():
        raise FileNotFoundError(f"no notebooks at {folder}: run from a checkout installed with `pip install -e .`")
    return folder


def declared_parameters(notebook: Path) -> dict:
    """Names and defaults in the notebook's `parameters` cell."""
    import papermill

    return {name: ast.literal_eval(found["default"]) for name, found in papermill.inspect_notebook(str(notebook)).items()}


def plan(stage: str = "all", **parameters) -> list[Step]:
    """The stages to execute, with their state on disk taken into account; nothing is written.

    A stage that is finished with the same parameters and settings is skipped, one that was begun is resumed. Raises
    ConfigError for an unknown stage, preset or parameter; a run that exists with other settings is refused by the stage.
    """
    if stage != "all" and stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}{nearest(stage, [*STAGES, 'all'])}")
    steps = []
    for name in STAGES if stage == "all" else (stage,):
        notebook = notebooks_folder() / STAGES[name]
        declared = declared_parameters(notebook)
        refuse_unknown(parameters, declared)
        given = {**parameters, "run": parameters.get("run") or get_pipeline_preset(parameters["preset"]).name}
        config = resolve(name, {**declared, **given})
        _, folder, _ = choose_folder(name, {**given, "force": True})
        action = "run" if given.get("force") else decide(name, folder, config)
        steps.append(Step(name, notebook, folder, {**given, "resume": True} if action == "resume" else given, action))
    return steps


def decide(stage: str, folder: Path, config: PipelineConfig) -> str:
    """"run", "resume" or "skip": what to do about a stage whose folder may hold an earlier attempt.

    With other settings than that attempt's the answer is "run", which the stage itself refuses, saying why.
    """
    if not (folder / "params.json").exists():
        return "run"
    former, wanted = read_json(folder.parent / "run.json")["config"], to_dict(config)
    for settings in (former, wanted):
        settings[stage].pop("micro_batch_size")  # fitted to the memory there was
    if former != wanted:
        return "run"
    return "skip" if (folder / "results.json").exists() else "resume"


def execute(step: Step) -> int:
    """Run one stage through papermill with its output shown live; returns the exit code.

    Ctrl-C asks the stage to stop: it finishes its optimizer step, writes a checkpoint and ends. A second one kills it.
    """
    try:
        step.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(f"cannot write to {step.folder}: {error.strerror}; choose another --output-dir") from error
    command = [sys.executable, "-m", "papermill", str(step.notebook), str(step.folder / "notebook.ipynb"),
               "--log-output", "--no-progress-bar", "--log-level", "WARNING"]
    for name, value in step.parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]  # -r: "123" stays a name
    process = subprocess.Popen(command, start_new_session=True)  # out of reach of the terminal's Ctrl-C
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if (step.folder / STOP_FILE).exists():
                os.killpg(process.pid, signal.SIGKILL)
                raise
            (step.folder / STOP_FILE).touch()
            print("stopping after this step, with a checkpoint; Ctrl-C again kills", file=sys.stderr, flush=True)


def status(step: Step) -> str:
    """What `run.json` says of the stage: "running", "finished", "stopped", …; "unknown" if it never began."""
    path = step.folder.parent / "run.json"
    stages = read_json(path)["stages"] if path.exists() else {}
    return stages.get(step.stage, {}).get("status", "unknown")


def summary(step: Step) -> str:
    """The stage's headline figures, from its `results.json`."""
    results = read_json(step.folder / "results.json")
    lines = [f"{step.stage}: finished, record in {step.folder}"]
    for row in results["table"]:
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
        lines.append(f"  {row['metric']:34} {row['value']:.3f}{interval}  {row['protocol']}")
    return "\n".join(lines)
