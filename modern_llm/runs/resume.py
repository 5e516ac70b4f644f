"""May a stage that was begun go on with what is asked of it now? What it was begun with, what
differs since, and what may. No torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from modern_llm.config import STAGES, TRAINED, PipelineConfig, TrainConfig
from modern_llm.files import read_record
from modern_llm.messages import StageError
from modern_llm.runs.spec import MAY_CHANGE, changes, sections

# by a stage
MADE = ("params.json", "results.json", "metrics.jsonl", "checkpoint", "checkpoint.previous",
        "checkpoints", "pieces")
# settings that an earlier record does not have, with the value that means what was done then: the
# weights are the same with a control and without
LATER = {"dpo.preference_weight": 1.0, "dpo.control": True, "verifier.control": True,
         "data.tokens_target": None, "data.max_epochs": None, "model.rope_scaling": "llama3",
         **{f"{stage}.{name}": value for stage in TRAINED
            for name, value in (("lora_rank", 0), ("lora_alpha", None))}}


def begun(folder: Path) -> bool:
    """Whether a stage has left anything of its own in its folder."""
    return any((folder / name).exists() for name in MADE)


def run_record(run_folder: Path) -> dict:
    """What `run.json` says so far. StageError if it is damaged: what it says of the other stages
    would be lost.
    """
    path = run_folder / "run.json"
    try:
        record = {"stages": {}, "config": {}, **(read_record(path) if path.exists() else {})}
        check_part(path, record, "stages", status=str, seconds=(int, float, type(None)))
        check_part(path, record, "config")
    except StageError as error:
        raise StageError(f"{error}: put a whole copy there, or delete it: the stages' own files "
                         "stay, and the next one writes a new one") from error
    return record


def check_part(file: Path, record: dict, part: str, /, **kinds: type | tuple[type, ...]) -> None:
    """StageError unless a part of a record is an object and, with `kinds`, one of objects that have
    values of these types, by name.
    """
    entries = record.get(part)
    fits = lambda entry: isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in kinds.items())
    if not isinstance(entries, dict):
        raise StageError(f"{file} is damaged (it does not say {part!r})")
    if kinds and (wrong := [name for name, entry in entries.items() if not fits(entry)]):
        raise StageError(f"{file} is damaged ({part!r} has no usable {wrong[0]!r})")


def params_of(folder: Path) -> dict:
    """`params.json` of a stage that was begun: its settings, inputs and data. StageError if it does
    not say them.
    """
    try:
        path = folder / "params.json"
        record = {"inputs": {}, "data_files": {}, **read_record(path)}
        check_part(path, {**record, "config": record.get("config") or None}, "config")
        check_part(path, record, "inputs", path=str, sha256=str)
        check_part(path, record, "data_files", source=str, path=str, sha256=str)
    except StageError as error:
        raise StageError(f"{error}, so nobody knows what stage {folder.name} was begun with: put a "
                         "whole copy there, or delete the stage and "
                         "start over (force=True, --force), or choose another run name") from error
    return record


def changed_settings(former: dict, stage: str, config: PipelineConfig) -> list[str]:
    """`sft.lr: 0.003 -> 0.001` for every setting of the stage that is another one than in its
    `params.json`, or is not in it (but see LATER).
    """
    before = dict(former["config"])
    for path, value in LATER.items():
        section, _, name = path.partition(".")
        if isinstance(before.get(section), dict):
            before[section] = {name: value, **before[section]}
    lines = changes(before, sections(config, stage))
    rows = {name: {"context_length": length} for name, length in
            (("former", former.get("context_length")), ("now", config.model.context_length))}
    # the length of its rows, where the model allows more
    if not STAGES[stage].first and rows["former"]["context_length"] is not None:
        lines += changes(rows["former"], rows["now"], "model.")
    return lines


def trained(folder: Path) -> tuple[float, float]:
    """Steps and seconds of training that a stage has behind it; seconds are known of a finished one
    only.
    """
    done, there = (folder / "results.json",
                   (folder / name / "meta.json" for name in ("checkpoint", "checkpoint.previous")))
    if done.is_file() and (steps := _number(done, "steps")) is not None:
        return steps, _number(done, "train_seconds") or 0.0
    return next((_number(path, "step") or 0 for path in there if path.is_file()), 0), 0.0


def _number(path: Path, name: str) -> float | None:
    value = read_record(path).get(name)
    if not isinstance(value, (int, float, type(None))):
        raise StageError(f"{path} is damaged ({name!r} is not a number)")
    return value


def resume_blocker(folder: Path, config: PipelineConfig, changed: list[str]) -> str:
    """Why the stage in `folder` cannot go on with the `changed` settings; "" if it can."""
    stage = folder.name
    may = {f"{stage}.{name}" for name in MAY_CHANGE}
    if fixed := [line for line in changed if line.partition(":")[0] not in may]:
        return (f"{', '.join(line.partition(':')[0] for line in fixed)} made what is there, and "
                "cannot change under way")
    train, (steps, seconds) = getattr(config, stage, None), trained(folder) if changed else (0, 0.0)
    if not changed or not isinstance(train, TrainConfig):
        return ""
    if steps >= train.max_steps:
        return (f"it has {steps} steps behind it and, with {stage}.max_steps={train.max_steps}, "
                "none to come")
    if train.max_minutes and seconds >= 60 * train.max_minutes:
        return f"its {stage}.max_minutes={train.max_minutes:g} are over, and no step is to come"
    return ""


def archive_results(folder: Path) -> None:
    """Take what was found out about a stage's model, which is now trained further, out of the way;
    the results stay, as `results.previous.json`.
    """
    if (folder / "results.json").is_file():
        os.replace(folder / "results.json", folder / "results.previous.json")
    for name in STAGES[folder.name].measured:
        (folder / name).unlink(missing_ok=True)


def history(folder: Path, former: dict, changed: list[str]) -> list[dict]:
    """What `params.json` says of settings that were changed under way: from which step on, and
    which.
    """
    earlier = former.get("changed_under_way", [])
    return ([*earlier, {"from_step": trained(folder)[0], "settings": changed}] if changed
            else earlier)
