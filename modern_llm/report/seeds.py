"""Runs of one recipe that differ in their seed: which they are, and their measures together."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.report.page import ReportError, Run

if TYPE_CHECKING:
    import pandas as pd


def summarise_seeds(runs: list[Path]) -> pd.DataFrame:
    """Median and range of every measure over runs that differ in their seed.

    Returns:
        stage, task, metric, median, low, high, runs (how many have it), values (one per run).

    Raises:
        ReportError: fewer than two runs, two of the same seed, different presets, or other settings
            that differ.
    """
    import pandas as pd

    found = [Run(Path(folder)) for folder in runs]
    why = not_comparable(found)
    if why:
        raise ReportError(why)
    rows = [row for run in found for row in summarise(run)]
    table = pd.DataFrame(rows, columns=["stage", "task", "metric", "value"]).dropna(subset="value")
    grouped = table.groupby(["stage", "task", "metric"], sort=False).value
    return (
        grouped.agg(median="median", low="min", high="max", runs="size", values=list).reset_index())


def summarise(run: Run) -> list[dict]:
    """Every measure of one run: stage, task, metric, value."""
    rows = [{"stage": stage, "task": "", "metric": "minutes", "value": entry.get("seconds", 0) / 60}
            for stage, entry in run.stages.items()]
    for stage, results in run.results.items():
        if stage != "eval":
            rows += [{"stage": stage, "task": "own table", "metric": row["metric"],
                      "value": row["value"]} for row in results.get("table", [])]
    ledger = run.frame("eval/ledger.csv")
    return rows + (ledger[["stage", "task", "metric", "value"]].to_dict("records")
                   if len(ledger) else [])


def not_comparable(runs: Sequence[Run]) -> str:
    """Why runs cannot be summarised as seeds of one recipe; empty if they can."""
    if len(runs) < 2:
        return f"summarise_seeds: {len(runs)} run is too few; give the folders of at least two"
    for run in runs:
        if not run.record:
            return f"summarise_seeds: {run.folder} has no run.json; give folders of runs"
    seeds = [run.record.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        return (f"summarise_seeds: seeds {seeds} of {[run.folder.name for run in runs]} are not "
                "all different; leave one of the same seed out")
    first = _recipe(runs[0])
    for run in runs[1:]:
        other = _recipe(run)
        differing = [name for name in first.keys() & other.keys() if first[name] != other[name]]
        if differing:
            return (f"summarise_seeds: runs {runs[0].folder.name!r} and {run.folder.name!r} differ "
                    f"in {', '.join(sorted(differing))}, not only in their seed; leave one out")
    return ""


def _recipe(run: Run) -> dict[str, str]:
    """The settings of the stages that ran, but for the seed and what follows from the machine's
    memory.
    """
    config = json.loads(json.dumps(run.record.get("config", {})))
    for section in config.values():
        if isinstance(section, dict):
            section.pop("micro_batch_size", None)
    kept = {"name", "model", "data", *run.results}
    return {name: json.dumps(value, sort_keys=True)
            for name, value in config.items() if name in kept}


def runs_of_other_seeds(run: str, runs: Path) -> list[Run]:
    """`run` and its siblings `<run>-seed…` that have results and the same settings, by seed; of one
    seed the first only.

    A sibling that cannot be read is left out, and a line says so.
    """
    stem = re.sub(r"-seed\d+$", "", run)
    siblings = sorted(path.name for path in runs.glob(f"{stem}-seed*")
                      if path.name.removeprefix(f"{stem}-seed").isdigit())
    names = [run, stem, *siblings]
    kept: list[Run] = []
    for name in dict.fromkeys(names):
        candidate = Run(runs / name)
        try:
            if candidate.results and (not kept or not not_comparable([*kept, candidate])):
                summarise(candidate)
                kept.append(candidate)
        except (ReportError, AttributeError, KeyError, TypeError, ValueError) as error:
            if name == run:
                raise
            print(f"{name} is left out of the report across seeds: {type(error).__name__}: {error}",
                  file=sys.stderr)
    return sorted(kept, key=lambda one: one.record.get("seed", 0))
