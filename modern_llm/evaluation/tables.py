"""The tables of chapter 07, each made of what `evaluate` left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from modern_llm.evaluation.families import is_aside
from modern_llm.evaluation.ledger import comparison_table
from modern_llm.evaluation.sentiment_tables import confusion_table
from modern_llm.evaluation.stages import Evaluation
from modern_llm.figures import sample_sheet


def piece_counts(of: Evaluation) -> pd.DataFrame:
    """Rows of every piece, task by stage."""
    stages = list(dict.fromkeys(name for name, _ in of.pieces))
    sizes = pd.Series({key: len(table) for key, table in of.pieces.items()})
    return sizes.unstack(0, fill_value=0)[stages]


def item_counts(of: Evaluation) -> pd.DataFrame:
    """Items of the ledger, task by stage."""
    return (of.item_table.groupby(["task", "stage"], sort=False).item.nunique()
                .unstack(fill_value=0))


def overlap_table(of: Evaluation) -> pd.DataFrame | str:
    """The sets with an n-gram in the training text, source by source; a sentence where that text is
    not known.
    """
    if of.overlap is None:
        return "not compared: what this model was trained on is not known here"
    columns = ["items", "too_short", "hit", "hit_share", "found_share"]
    return of.overlap[of.overlap.hit > 0].set_index(["source", "set"])[columns].round(3)


def clean_table(of: Evaluation) -> pd.DataFrame:
    """Scores on all items, on those without an n-gram in the training text, and on the others."""
    return of.clean.pivot_table(index=["task", "stage"], columns="subset", values="value",
                                sort=False).round(3)


def main_measures(of: Evaluation) -> pd.DataFrame:
    """Every measure that is no part of another, stage beside stage, as text."""
    table = of.files["comparison_table.csv"]
    lines = table.index.to_frame(index=False)
    # without the share of the commonest label an accuracy says little
    aside = (is_aside(lines) & lines.metric.ne("majority class")) | lines.metric.str.contains("@")
    return table[~aside.to_numpy()].map("{:.3f}".format).replace("nan", "")


def verdicts(of: Evaluation) -> pd.DataFrame:
    """Every difference with its interval, the exact test's p, and whether the interval leaves 0
    out; of a curve the last point only.
    """
    gains, most = of.gains, of.items.sizes[-1]
    aside = is_aside(gains) | gains.metric.str.match(rf".*@(?!{most}$)\d+$")
    main = gains[~aside]
    verdict = np.where(main.significant, "significant", "not significant")
    table = main.assign(verdict=verdict).drop(columns="significant").round(3)
    shown = ["" if np.isnan(p) else f"{p:.2g}" for p in main.p]
    return table.assign(p=shown).set_index(["stage", "task", "metric", "against"])


def protocol_table(of: Evaluation) -> pd.DataFrame:
    """Perplexity and bits per byte in every protocol, with intervals, stage beside stage."""
    rows = of.ledger[of.ledger.task.eq("protocols") & of.ledger.metric.str.match(
        "^(?!.* minus ).*(perplexity|bits per byte)")]
    shown = rows.assign(shown=[f"{row.value:.3f}  [{row.low:.3f}, {row.high:.3f}]"
                               for row in rows.itertuples()])
    return (shown.pivot(index="metric", columns="stage", values="shown")
                 .reindex(columns=of.models).rename_axis(columns=None))


def labels_said(of: Evaluation, methods: Sequence[str] = ("direct", "contextual")) -> pd.DataFrame:
    """Which label the last model said to reviews of either, at the most demonstrations."""
    table = of.pieces[of.generator, "sentiment"]
    last = table.shots.eq(of.items.settings.shots[-1])
    return confusion_table(table[last & table.method.isin(methods)])


def error_table(of: Evaluation) -> pd.DataFrame:
    """Exact match without and with a calculator, and the kinds of errors without."""
    table = comparison_table(of.ledger)[of.models].loc[["problems", "problems, calculator"]]
    tasks, metrics = (table.index.get_level_values(name) for name in ("task", "metric"))
    errors = metrics.str.startswith("error") & (tasks == "problems")
    return table[(metrics == "exact match") | errors].astype(float).round(3)


def mistakes_sheet(mistakes: dict[str, list[dict]]):
    """The verifier's worst mistakes in full; a sentence where there are none."""
    if not mistakes:
        return "no verifier in this run"
    found = [{"kind": kind, **one, "score": f"{one['score']:.2f}"}
             for kind, of_kind in mistakes.items() for one in of_kind]
    return sample_sheet({name: [one[name] for one in found]
                         for name in ("kind", "score", "question", "answer", "gold")})
