"""Mark the answers again that an evaluation kept: `python scripts/remark.py runs/local-smoke …`
prints what today's marking says otherwise.

Every table of word problems in RUN/eval/pieces keeps the answers' texts. A line for each: answers,
how many values, marks (right), flexible marks and checks of sums differ, and the share right before
and now.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from modern_llm.data.chat import Answer
from modern_llm.data.tasks import word_problems
from modern_llm.evaluation.written import mark_problems


def remarked(path: Path, settings: dict) -> dict:
    """What differs when the texts of one table are marked again."""
    kept = pd.read_json(path, lines=True, dtype=False, precise_float=True)
    problems = word_problems(settings["problems"], "test", settings["num_problems"],
                             levels=settings["levels"], seed=settings["seed"])
    answers = [Answer(row.text, [0], [0.0], row.ended) for row in kept.itertuples()]
    now = mark_problems([problems[i] for i in kept.problem], answers)
    values = ~(kept["value"].astype(float).eq(now.value) | kept["value"].isna() & now.value.isna())
    return {"table": path.stem, "answers": len(kept), "values": values.sum(),
            "marks": (kept.right != now.right).sum(),
            "flexible": (kept.flexible != now.flexible).sum(),
            "sums": (kept.consistent != now.consistent).sum(), "right before": kept.right.mean(),
            "right now": now.right.mean(),
            "texts": [text[-40:] for text in kept.text[values | (kept.right != now.right)
                                                       | (kept.flexible != now.flexible)]][:3]}


def main(runs: list[str]) -> None:
    for run in runs:
        pieces = Path(run) / "eval" / "pieces"
        settings = json.loads((pieces / "settings.json").read_text(encoding="utf-8"))
        print(pd.DataFrame([
            remarked(path, settings) for path in sorted(pieces.glob("*-problems*.jsonl"))
        ]).to_string(index=False))


if __name__ == "__main__":
    main(sys.argv[1:])
