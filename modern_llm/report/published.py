"""The published runs of report/results, for the chapters that say what a real run found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modern_llm.files import CHECKOUT, read_json

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
