"""What came of the stages of a run, as its files tell it: a line, a list of figures, or a table of all runs. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from modern_llm.files import read_json
from modern_llm.inputs import NOTEBOOKS
from modern_llm.locks import is_alive, owner_of
from modern_llm.pipeline import Step

HEADLINES = {  # how the names of a stage's telling figures begin
    "pretrain": ("bits per byte", "above the floor"),
    "sft": ("ends by itself and parses", "instruction exact match, SFT", "perplexity tax"),
    "dpo": ("preference accuracy, after", "implicit-reward accuracy", "perplexity tax"),
    "verifier": ("within-problem AUC", "weighted_vote@", "best_of_n@"),
}


def headline(stage: str, results: dict) -> str:
    """A few figures of a stage on one line."""
    rows = [row for row in results.get("table", []) if row.get("value") is not None]
    first = [next((row for row in rows if row["metric"].startswith(start)), None) for start in HEADLINES.get(stage, ())]
    chosen = [row for row in first if row] or rows[:3]
    return ", ".join(f"{row['metric']} {row['value']:.3g}" for row in chosen)


def summary(step: Step) -> str:
    """The stage's figures, from its `results.json`."""
    if step.stage == "report":
        return f"report: {read_json(step.folder / 'run.json')['report']['path']}"
    results = read_json(step.folder / "results.json")
    lines = [f"{step.stage}: finished, record in {step.folder}"]
    for row in results.get("table", []):
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if None not in (row.get("low"), row.get("high")) else ""
        value = "none" if row.get("value") is None else f"{row['value']:.3f}"
        lines.append(f"  {row['metric']:40} {value}{interval}  {row.get('protocol', '')}")
    return "\n".join(lines)


def runs_table(root: Path, only: str | None = None) -> list[dict]:
    """One row a stage of every run in a folder, as the files tell it: run, stage, status, minutes, headline."""
    rows = []
    for path in sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime):
        if only and path.parent.name != only:
            continue
        record = read_json(path)
        stages = record.get("stages", {})
        for stage in [*(name for name in NOTEBOOKS if name in stages), *(name for name in stages if name not in NOTEBOOKS)]:
            entry, results = stages[stage], path.parent / stage / "results.json"
            state = entry["status"]
            if state == "running" and not is_alive(entry) and entry.get("pid") != os.getpid() and not owner_of(path.parent):
                state = "killed" if entry.get("pid") else "unknown"
            figures = headline(stage, read_json(results)) if results.is_file() else ""
            minutes = f"{entry['seconds'] / 60:.1f}" if entry.get("seconds") and state not in ("running", "killed") else ""
            rows.append({"run": path.parent.name, "stage": stage, "status": state, "started": entry["started"][:16].replace("T", " "),
                         "minutes": minutes, "figures": figures})
        if report := record.get("report"):
            rows.append({"run": path.parent.name, "stage": "report", "status": "finished" if Path(report["path"]).is_file() else "gone",
                         "started": "", "minutes": "", "figures": report["path"]})
    return rows
