"""Publish a finished stage: `python scripts/publish.py RUN [STAGE]`.

Copies `runs/RUN/STAGE/results.json` to `report/results/STAGE_RUN.json` and draws its curves into `report/figures/`.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import pandas as pd

from modern_llm.figures import training_curves
from modern_llm.files import read_json, write_json
from modern_llm.stage import runs_folder

root = Path(__file__).resolve().parent.parent


def publish(run: str, stage: str = "pretrain") -> None:
    folder = runs_folder() / run / stage
    results, record = read_json(folder / "results.json"), read_json(folder.parent / "run.json")
    kept = {key: record[key] for key in ("run", "preset", "git_commit", "seed", "device", "device_name", "threads", "versions")}
    (root / "report" / "results").mkdir(parents=True, exist_ok=True)
    (root / "report" / "figures").mkdir(parents=True, exist_ok=True)
    write_json(root / "report" / "results" / f"{stage}_{run}.json", {**results, "made_by": kept})
    fig = training_curves(pd.read_json(folder / "metrics.jsonl", lines=True), floor=results.get("floor"))
    fig.savefig(root / "report" / "figures" / f"{stage}_{run}.png", dpi=100)


if __name__ == "__main__":
    publish(*sys.argv[1:])
