"""The plan of a command: what is to be done about each stage, read from the disk alone, so that the
same command goes on after any stop. Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modern_llm.config import (
    NOTEBOOKS, STAGES, ConfigError, PipelineConfig, is_part_of_all, nearest, preset_with,
)
from modern_llm.files import read_json
from modern_llm.interchange.hub import find_checkpoint
from modern_llm.messages import StageError
from modern_llm.runs.data_files import changed_data, check_splits, missing_data
from modern_llm.runs.lineage import described, found_inputs, no_inputs
from modern_llm.runs.parameters import choose_folder, refuse_unknown, resolve
from modern_llm.runs.preflight import check_tracker
from modern_llm.runs.resume import begun, changed_settings, params_of, resume_blocker, run_record
from modern_llm.runs.scheduler import this_job
from modern_llm.runs.spec import changes, notebook_of


@dataclass(frozen=True)
class Step:
    """One stage: where its record goes, with which parameters, and what is to be done about it."""

    stage: str
    folder: Path
    parameters: dict
    # "run", "resume", "skip", or "look again" in a plan where an earlier stage is still to run
    action: str
    why: str = ""


def chosen_stages(stage: str, given: object, config: PipelineConfig) -> list[str]:
    """The stages that `stage` ("all" or one name) stands for. Where a checkpoint is `given`, "all"
    begins behind pretraining; an optional stage is among them if the config says so.
    """
    if stage not in (*STAGES, "all"):
        raise ConfigError(f"unknown stage {stage!r}{nearest(stage, [*STAGES, 'all'])}")
    if stage != "all":
        return [stage]
    there = [name for name in NOTEBOOKS
             if declared_parameters(name) and not (given and STAGES[name].first)
             and is_part_of_all(name, config)]
    return [*there, "report"]


def declared_parameters(stage: str) -> dict:
    """Names and defaults in the `parameters` cell of the stage's notebook; empty if there is none.
    """
    if not STAGES[stage].notebook:
        return {"preset": "", "run": "", "output_dir": "", "force": False}
    path = notebook_of(stage)
    if not path.is_file():
        return {}
    cells = [cell for cell in read_json(path)["cells"]
             if "parameters" in cell.get("metadata", {}).get("tags", [])]
    body = ast.parse("".join(cells[0]["source"])).body if cells else []
    return {node.targets[0].id: ast.literal_eval(node.value)
            for node in body if isinstance(node, ast.Assign)}


class Plan:
    """What a command asks for: its stages, each with the parameters it declares. Wrong ones are
    refused here, at once.

    Raises ConfigError for an unknown stage, preset or parameter, StageError for data that is not
    here.
    """

    def __init__(self, stage: str = "all", no_overwrite: bool = False, **parameters):
        preset = preset_with(parameters["preset"], parameters.get("overrides"))
        self.start = parameters.get("checkpoint") or preset.start_from
        self.stages, self.alone, self.no_overwrite = (
            chosen_stages(stage, self.start, preset), stage != "all", no_overwrite)
        spec = STAGES.get(stage)  # none for "all"
        if spec and spec.first and parameters.get("checkpoint"):
            raise ConfigError(f"stage {stage} does not start from a checkpoint; leave --checkpoint "
                              "out, or choose a later stage")
        if spec and spec.first and spec.notebook and preset.start_from:
            raise ConfigError(f"preset {preset.name!r} starts from {preset.start_from!r} and "
                              "pretrains nothing; choose a later stage")
        if self.stages == ["report"] and parameters.get("overrides"):
            raise ConfigError(f"stage report has no settings: {parameters['overrides']} would "
                              "change nothing in it, as it is made from the files of the other "
                              "stages; leave that out, or run the stage that it belongs to")
        run = parameters.get("run")
        given = {**parameters, "run": preset.name if run in (None, "") else str(run)}
        if given.get("checkpoint"):
            given["checkpoint"] = str(find_checkpoint(given["checkpoint"]))
        declared = {name: declared_parameters(name) for name in self.stages}
        common = {"resume", "force", "run"} if self.stages == ["report"] else {"run"}
        refuse_unknown(given, {*common, *(name for names in declared.values() for name in names)})
        self.parameters, self.configs = {}, {}
        for name in self.stages:
            own = {key: value for key, value in given.items() if key in declared[name]}
            if name != self.stages[0]:
                # "all" from a checkpoint: only its first stage starts there
                own.pop("checkpoint", None)
            self.parameters[name] = own
            self.configs[name] = (preset if name == "report"
                                  else resolve(name, {**declared[name], **own}))
            check_tracker(self.configs[name], name)
        _, folder, _ = choose_folder(self.stages[0], {**given, "force": True})
        self.run_folder = folder.parent

    def steps(self) -> Iterator[Step]:
        """What would be done about each stage, as far as it can be told before the earlier ones
        have run. StageError if one is refused.
        """
        pending = False
        for name in self.stages:
            yield (step := self.step(name, pending))
            pending = pending or step.action != "skip"

    def step(self, stage: str, pending: bool = False) -> Step:
        """What to do about a stage, given what is on disk now; `pending` if an earlier stage of the
        plan is still to run.
        """
        folder, given = self.run_folder / stage, self.parameters[stage]
        if stage == "report":
            return self._report_step(pending)
        done = (folder / "results.json").is_file()
        if done and self.no_overwrite:
            return Step(stage, folder, given, "skip", "has results, which --no-overwrite keeps")
        if not begun(folder):
            self._need_inputs(stage, pending)
            return Step(stage, folder, given, "run")
        try:
            settings, inputs = self._changed(stage, folder, pending)
            against = resume_blocker(folder, self.configs[stage], settings)
        except StageError as error:  # nobody knows what it was begun with
            settings, inputs, against = [], [str(error)], ""
        changed = settings + inputs
        if (given.get("force") and (self.alone or changed)
                and not (not changed and begun_by_this_job(folder))):
            return Step(stage, folder, given, "run",
                        "started over" + (f": {'; '.join(changed)}" if changed else ""))
        kept = {name: value for name, value in given.items() if name != "force"}
        if not changed:
            if pending:
                return Step(stage, folder, kept, "look again", "its inputs may change")
            action = "skip" if done else "resume"
            return Step(stage, folder, {**kept, "resume": True}, action,
                        "finished before, nothing has changed" if done else "")
        if given.get("resume") and not inputs and not against:
            return Step(stage, folder, {**kept, "resume": True}, "resume", "; ".join(settings))
        raise StageError(
            f"stage {stage} {'is finished' if done else 'was begun'} in {folder}, and since then "
            "this has changed:\n  - " + "\n  - ".join(changed)
            + "\n" + f"To go on with that cannot be: {against}. " * bool(against)
            + "Say --force to delete it and start over"
            + (" (with --stage all: only what has changed)" if not self.alone else "")
            + ", or --run NAME for another run"
            + (", or --resume to go on with the new settings" if not inputs and not against else "")
            + (", or --no-overwrite to keep it" if done else "") + ".")

    def _inputs(self, stage: str) -> dict[str, Path]:
        given = self.parameters[stage].get("checkpoint")
        return ({"checkpoint": Path(given)} if given
                else found_inputs(stage, self.run_folder, self.configs[stage]))

    def _need_inputs(self, stage: str, pending: bool) -> None:
        if (not STAGES[stage].first and not pending
                and not self._inputs(stage) and self.configs[stage].name != "lesson"):
            raise no_inputs(stage, self.run_folder, self.configs[stage].name)

    def _changed(self, stage: str, folder: Path, pending: bool) -> tuple[list[str], list[str]]:
        """What differs from what the stage was begun with: its settings, and the data it reads and
        the weights it starts from.
        """
        record = params_of(folder)
        settings = changed_settings(record, stage, self.configs[stage])
        data = changed_data(self.configs[stage], stage, record.get("data_files", {}))
        now, former = described(self._inputs(stage)), record.get("inputs", {})
        # not made yet, or a base from the cache
        if pending or (not now and self.configs[stage].name == "lesson"):
            return settings, data
        digests = [{name: entry["sha256"][:12] for name, entry in side.items()}
                   for side in (former, now)]
        return settings, data + changes(*digests, "weights of ")

    def _report_step(self, pending: bool) -> Step:
        folder, given = self.run_folder, self.parameters["report"]
        if not pending and not any(folder.glob("*/results.json")):
            raise StageError(f"run {folder.name!r} has no finished stage in {folder}: there is "
                             "nothing to report yet")
        former = run_record(folder).get("report")
        former = former if isinstance(former, dict) else {}
        there = os.path.isfile(str(former.get("path") or ""))
        if there and self.no_overwrite:
            return Step("report", folder, given, "skip", "there is one, which --no-overwrite keeps")
        if (there and not pending and not (self.alone or given.get("force"))
                and former.get("of") == results_digest(folder)):
            return Step("report", folder, given, "skip",
                        f"written before from these results: {former['path']}")
        return Step("report", folder, given, "look again" if pending and there else "run")

    def check_data(self) -> None:
        """StageError naming every data set that the stages still to run will want and that is not
        here, or cannot be split.
        """
        steps = [name for name in self.stages
                 if name != "report" and not (self.run_folder / name / "results.json").is_file()]
        problems = missing_data(self.configs[steps[0]], steps) if steps else []
        problems += dict.fromkeys(problem for name in steps
                                  for problem in check_splits(self.configs[name], name)[1])
        if problems:
            raise StageError(f"preset {self.configs[steps[0]].name!r} cannot run here:\n  - "
                             + "\n  - ".join(problems))


def begun_by_this_job(folder: Path) -> bool:
    """Whether an earlier start of this SLURM job, which was queued again, began the stage: what it
    was to delete is deleted.
    """
    noted, params = folder.parent / "jobs" / f"{this_job()}.json", folder / "params.json"
    again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return (again and noted.is_file() and params.is_file()
            and noted.stat().st_mtime_ns < params.stat().st_mtime_ns)


def results_digest(run_folder: Path) -> str:
    """A digest of everything the stages of a run found."""
    parts = [(run_folder / name / "results.json") for name in NOTEBOOKS]
    return hashlib.sha256(b"".join(
        path.read_bytes() for path in parts if path.is_file())).hexdigest()
