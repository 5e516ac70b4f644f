"""The published runs of report/results, for the chapters that say what a real run found, and for
the final report.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import ALWAYS
from modern_llm.files import CHECKOUT, read_json
from modern_llm.report.page import Run

if TYPE_CHECKING:
    import pandas as pd


def published(stage: str, run: str = "local-smoke") -> dict:
    """What a published run's stage left as its results."""
    return read_json(CHECKOUT / "report" / "results" / run / f"{stage}.json")


def published_table(stage: str, run: str = "local-smoke") -> pd.DataFrame:
    """The figures of a published run's stage: value, low, high and n of every metric."""
    import pandas as pd

    rows = pd.DataFrame(published(stage, run)["table"]).set_index("metric")
    return rows[["value", "low", "high", "n"]].astype({"value": float, "low": float, "high": float})


def published_seeds(run: str = "local-smoke") -> pd.DataFrame:
    """Every measure of a published run over its seeds: stage, task, median, low, high, runs, and
    `values`, a list with one per seed; by metric.
    """
    import pandas as pd

    table = pd.read_csv(CHECKOUT / "report" / "results" / run / "seeds.csv")
    return table.assign(values=table["values"].map(json.loads)).set_index("metric")


# What a report's text says of its run, in the form of today and in those of earlier reports. The
# files beside a report hold no run.json.
FACTS = {"preset": r"^Preset `([^`]+)`", "parameters": r"([\d,]+) parameters",
         "seed": r"\bseed (\d+)", "seeds": r"Median and range of (\d+) runs",
         "minutes": r"([\d,.]+) minutes in all", "begun": r"\bbegun (\d{4}-\d\d-\d\d)",
         "device": r"(?:\| device \| |training tokens, on )(\w+)",
         "machine": r"(?:\| device \| |training tokens, on )\w+ \(([^,)]+)",
         "threads": r"\bthreads(?: \| |: )(\d+)", "python": r"\bpython(?: \| | )(\d[\w.]*)",
         "torch": r"\btorch(?: \| | )(\d[\w.]*(?:\+\w+)?)",
         "note": r"^\*([^*\n]+)\*$", "changes": r"^(The tree had changes [^.]+)"}


@dataclass(frozen=True)
class PublishedRun(Run):
    """A run as it is published: `folder` is report/results/<run>, or a file of pretraining alone,
    and its report, if there is one, lies two folders above.
    """

    @property
    def name(self) -> str:
        return self.folder.stem.removeprefix("pretrain_")

    def json(self, name: str) -> dict:
        if self.folder.is_dir():
            return super().json(flat(name))
        return read_json(self.folder) if name == "pretrain/results.json" else {}

    def frame(self, name: str) -> pd.DataFrame:
        return super().frame(flat(name))

    @property
    def report(self) -> Path:
        return self.folder.parent.parent / f"{self.name}_report.md"

    @cached_property
    def text(self) -> str:
        """The report; empty if there is none."""
        return self.report.read_text(encoding="utf-8") if self.report.is_file() else ""

    @cached_property
    def facts(self) -> dict[str, str]:
        """The `FACTS` that are recorded, in the report or in the file of pretraining."""
        found = {name: match[1] for name, pattern in FACTS.items()
                 if (match := re.search(pattern, self.text.split("\n## ")[0] if name == "note"
                                        else self.text, re.M))}
        pretrain = self.results.get("pretrain", {})
        made_by = pretrain.get("made_by", {})
        named = {**made_by, **made_by.get("versions", {}), "machine": made_by.get("device_name"),
                 "parameters": f"{pretrain['parameters']:,}" if "parameters" in pretrain else None}
        return {**{name: str(named[name]) for name in FACTS if named.get(name) is not None},
                **found}

    @cached_property
    def minutes(self) -> dict[str, str]:
        """Minutes by the clock of each stage, as the report's first table writes them."""
        table = re.search(r"^\| stage \| status \|(?:.+\n)+", self.text, re.M)
        header, _, *rows = [[cell.strip() for cell in line[2:].split("|")]
                            for line in table[0].splitlines()] if table else ([], [])
        return {row[0]: minutes for row in rows
                if (minutes := dict(zip(header, row)).get("minutes"))}

    @property
    def commands(self) -> list[str]:
        """What gives the run again: the report's own lines, those of stages run alike as one."""
        block = re.search(r"^## (?:Commands|Cost and command)\n.*?^```bash\n(.*?)^```", self.text,
                          re.S | re.M)
        if block:
            lines = block[1].splitlines()
            ran = [line for line in lines if "--stage" in line]
            alike = {re.sub(r"--stage \w+", "--stage all", line) for line in ran}
            return ([*(line for line in lines if line not in ran), *alike]
                    if len(alike) == 1 and len(ran) > len(ALWAYS) else lines)
        found = self.results.get("pretrain", {})
        if not (made_by := found.get("made_by")):
            return []
        ended = (f" -p max_minutes={int(found['train_seconds'] // 60)}"
                 if found.get("ended_by") == "max_minutes" else "")
        return [f"git checkout {made_by['git_commit']}",
                f"modern-llm run --preset {made_by['preset']} --run {made_by['run']} "
                f"--stage pretrain{ended}"]


def flat(name: str) -> str:
    """Where a file of a run's folder is published: `pretrain.json` for pretrain/results.json."""
    return re.sub(r"^(\w+)/results\.json$", r"\1.json", name).removeprefix("eval/")


def published_runs(results: Path) -> list[PublishedRun]:
    """The runs in report/results, those of most stages first, then by size: folders with a report,
    and files of pretraining that say what made them.
    """
    paths = sorted([*(path for path in results.iterdir() if path.is_dir()),
                    *results.glob("pretrain_*.json")])
    runs = [run for path in paths if (run := PublishedRun(path)).results
            and (run.text or run.results.get("pretrain", {}).get("made_by"))]
    size = lambda run: int(run.facts.get("parameters", "0").replace(",", ""))
    return sorted(runs, key=lambda run: (-len(run.results), size(run)))
