"""What came of the stages of a run, as its files tell it: a line, a list of figures, or a table of
all runs. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from modern_llm.config import NOTEBOOKS, STAGES
from modern_llm.files import read_json
from modern_llm.runs.locks import is_alive, owner_of
from modern_llm.runs.pipeline import Step


def headline(stage: str, results: dict) -> str:
    """A few figures of a stage on one line."""
    rows = [row for row in results.get("table", []) if row.get("value") is not None]
    chosen = (STAGES[stage].telling(rows) if stage in STAGES else []) or rows[:3]
    return ", ".join(f"{row['metric']} {row['value']:.3g}" for row in chosen)


def summary(step: Step) -> str:
    """The stage's figures, from its `results.json`."""
    if step.stage == "report":
        return f"report: {read_json(step.folder / 'run.json')['report']['path']}"
    results = read_json(step.folder / "results.json")
    lines = [f"{step.stage}: finished, record in {step.folder}"]
    for row in results.get("table", []):
        interval = (f" [{row['low']:.3f}, {row['high']:.3f}]"
                    if None not in (row.get("low"), row.get("high")) else "")
        value = "none" if row.get("value") is None else f"{row['value']:.3f}"
        lines.append(f"  {row['metric']:40} {value}{interval}  {row.get('protocol', '')}")
    return "\n".join(lines)


# ---- all runs ------------------------------------------------------------------------------------

DAMAGED = "damaged"  # how the status of what cannot be read begins


def folders(root: Path) -> list[Path]:
    """The folders in a folder, by name, links that lead nowhere among them; none if it is not
    there.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in root.iterdir()
                      if path.is_dir() or path.is_symlink() and not path.exists())
    return []


def reason(error: Exception) -> str:
    """An error of reading a file, short, without the file's name."""
    return ((error.strerror or type(error).__name__) if isinstance(error, OSError)
            else str(getattr(error, "what", error)))


def record_in(path: Path, **wanted: type | tuple[type, ...]) -> dict:
    """The JSON object in a file, with values of the types that are `wanted`, by name. Raises as
    `read_json` does, or ValueError.
    """
    return checked(read_json(path), "the file", **wanted)


def checked(value: object, place: str, **wanted: type | tuple[type, ...]) -> dict:
    """A JSON object with values of the types that are `wanted`, by name; else ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds {json.dumps(value)[:40]}, not a JSON object")
    for name, kind in wanted.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{place} has {name}={json.dumps(value[name])[:40]}" if name in value
                             else f"{place} lacks {name!r}")
    return value


def runs_table(root: Path, only: str | None = None) -> list[dict]:
    """One row per stage of every run in a folder, as the files tell it: run, stage, status,
    minutes, headline.

    What cannot be read is a row of its run whose status begins with `DAMAGED`; it hides nothing
    else.
    """
    found = []
    for folder in folders(root):
        if only in (None, folder.name):
            try:
                if not os.path.lexists(folder / "run.json") and folder.exists():
                    # PermissionError, where the question cannot be answered
                    next(folder.iterdir(), None)
                    continue
                found.append(((folder / "run.json").stat().st_mtime, _rows_of(folder)))
            except (OSError, ValueError) as error:
                what = ("its folder is a link that leads nowhere" if not folder.exists()
                        else f"run.json: {reason(error)}")
                found.append((0.0, [_row(folder, "", f"{DAMAGED}: {what}")]))
    return [row for _, rows in sorted(found, key=lambda entry: entry[0]) for row in rows]


def _row(folder: Path, stage: str, status: str, started: str = "", minutes: str = "",
         figures: str = "") -> dict:
    return {"run": folder.name, "stage": stage, "status": status, "started": started,
            "minutes": minutes, "figures": figures}


def _rows_of(folder: Path) -> list[dict]:
    """The rows of one run. OSError or ValueError if its run.json cannot be read; what is wrong in
    one stage is that stage's row.
    """
    record = record_in(folder / "run.json", stages=dict)
    stages, rows = record["stages"], []
    for stage in [*(name for name in NOTEBOOKS if name in stages),
                  *(name for name in stages if name not in NOTEBOOKS)]:
        try:
            rows.append(_stage_row(folder, stage, stages[stage]))
        except ValueError as error:
            rows.append(_row(folder, stage, f"{DAMAGED}: run.json: {error}"))
    if "report" in record:
        try:
            path = checked(record["report"], "report", path=str)["path"]
            rows.append(_row(folder, "report",
                             "finished" if os.path.isfile(path) else "gone", figures=path))
        except ValueError as error:
            rows.append(_row(folder, "report", f"{DAMAGED}: run.json: {error}"))
    return rows


def _stage_row(folder: Path, stage: str, entry: object) -> dict:
    entry = checked(entry, stage, status=str, started=str)
    state, figures, results = entry["status"], "", folder / stage / "results.json"
    if (state == "running" and not is_alive(entry) and entry.get("pid") != os.getpid()
            and not owner_of(folder)):
        state = "killed" if entry.get("pid") else "unknown"
    try:
        if os.path.lexists(results):
            figures = headline(stage, record_in(results))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        state = (f"{DAMAGED}: results.json: {reason(error)}"
                 if isinstance(error, (OSError, ValueError))
                 else f"{DAMAGED}: results.json: no table of figures")
    seconds = checked(entry, stage, seconds=(int, float))["seconds"] if entry.get("seconds") else 0
    minutes = f"{seconds / 60:.1f}" if seconds and state not in ("running", "killed") else ""
    return _row(folder, stage, state, entry["started"][:16].replace("T", " "), minutes, figures)
