"""Is one run better than another? Item by item where both were asked the same, with what chance
alone does beside it, and how many items would tell. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from modern_llm.evaluation.families import FAMILIES, is_aside
from modern_llm.evaluation.ledger import STAGE_NAMES, difference_row, mcnemar_p
from modern_llm.messages import StageError
from modern_llm.report.verdicts import (
    BETTER, SAME, UNPAIRED, WORSE, apart, less_is_better, verdict,
)
from modern_llm.statistics import items_interval

NOISE = "within the noise"  # a difference that two seeds of one recipe have, too
POWER = 1.959964 + 0.841621  # standard errors: told at 95% in four of five repetitions
KEY = ["stage", "task", "metric"]


@dataclass(frozen=True)
class Measured:
    """What a run was asked and what it did, item by item."""

    name: str  # RUN, or RUN/STAGE
    items: pd.DataFrame  # the rows of items.csv, of one stage where the name says so
    config: dict  # all its settings, by their dotted names


def flat(settings: dict, before: str = "") -> dict:
    """Nested settings by their dotted names."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {
            before + name: value}
    return found


def differing(one: Measured, other: Measured) -> dict[str, tuple]:
    """The settings in which two runs differ, beside their names: name -> (one's, the other's)."""
    names = [name for name in {**one.config, **other.config}
             if name not in ("name", "description", "tracker")]
    return {name: pair for name in names
            if (pair := (one.config.get(name), other.config.get(name)))[0] != pair[1]}


def same_items(one: Measured, other: Measured, task: str) -> bool:
    """Whether both runs were asked the same of a task, by the settings that choose its items."""
    asked = ("data.sources", "data.world_seed", "data.max_validation_tokens", "sft.sources",
             "dpo.sources", *(["seed"] if task in FAMILIES and FAMILIES[task].seeded else []))
    aside = ("eval.batch_rows", "eval.baselines", "eval.overlap_words", "eval.overlap_documents")
    return not any(name in asked or name.startswith("eval.") and name not in aside
                   for name in differing(one, other))


def change(one: Measured, other: Measured, ours: tuple, theirs: tuple) -> dict:
    """`one` minus `other` of a (stage, task, metric) of each, its interval, and how it was taken.

    `spread` is the standard deviation of an item's difference, from which `items_to_tell` follows;
    `plain`, whether every item counts the same.
    """
    a, b = (run.items[(run.items[KEY] == list(key)).all(axis=1)].set_index("item")
            for run, key in ((one, ours), (other, theirs)))
    base = {"before": items_interval(b.value, b.weight)["value"],
            "after": items_interval(a.value, a.weight)["value"]}
    shared = a.index.intersection(b.index)
    paired = (len(shared) == len(a) == len(b) and same_items(one, other, ours[1])
              and (a.weight[shared] == b.weight[shared]).all())
    if paired:
        both = pd.concat([a.reset_index().assign(stage="one", task="", metric=""),
                          b.reset_index().assign(stage="other", task="", metric="")])
        row = difference_row(both, ("one", "", ""), ("other", "", ""), "other")
        row["p"] = mcnemar_p(row["note"])
        weight = a.weight[shared] / a.weight.mean()
        spread = float(((a.value - b.value)[shared] / a.weight.mean()
                        - row["value"] * weight).std())
    else:
        row = apart(items_interval(a.value, a.weight), items_interval(b.value, b.weight))
        spread = math.hypot(*(float((part.value / part.weight.mean()).std()) for part in (a, b)))
    plain = bool(a.weight.eq(1).all() and b.weight.eq(1).all())
    return {"p": math.nan} | base | row | {"spread": spread, "paired": paired, "plain": plain}


def items_to_tell(difference: float, spread: float) -> float:
    """Items by which a true difference of this size is told (95% interval beside 0) in four of five
    repetitions; infinite for none, and for one that is not known. Source: the normal approximation,
    (1.96 + 0.84)² s² / d².
    """
    wanted = (POWER * spread / difference) ** 2 if difference else math.inf
    return math.ceil(wanted) if math.isfinite(wanted) else math.inf


def values_of(runs: Sequence[Measured]) -> list[dict[tuple, float]]:
    """Every measure of each of several runs that differ in their seed alone: what chance does.

    StageError, naming a setting, if they differ in anything else.
    """
    for one, other in itertools.pairwise(runs):
        changed = differing(one, other)
        if changed.keys() != {"seed"}:
            raise StageError(
                f"{one.name} and {other.name} are no A/A pair: they "
                + (f"differ in {', '.join(changed)}" if changed else "have one seed")
                + "; give runs of one recipe that differ in their seed alone "
                  "(modern-llm run … --run again -p seed=1)")
    return [{key: items_interval(part.value, part.weight)["value"]
             for key, part in run.items.groupby(KEY, sort=False)} for run in runs]


def noise_of(values: Sequence[dict[tuple, float]], ours: tuple, theirs: tuple) -> float | None:
    """The most by which two seeds differ in a measure, or, where two stages are compared, in the
    difference of the two; None if not two of them have it.
    """
    found = [of[ours] - (of[theirs] if theirs != ours else 0)
             for of in values if ours in of and theirs in of]
    return max(found) - min(found) if len(found) > 1 else None


def shown_measures(items: pd.DataFrame, everything: bool) -> list[tuple]:
    """The (stage, task, metric) of a table: without parts, and of many samples the most."""
    rows = items[KEY].drop_duplicates()
    if not everything:
        most = rows.metric.str.extract(r"@(\d+)$")[0].astype(float)
        largest = most.groupby(rows.task).transform("max")
        rows = rows[~is_aside(rows) & (most.isna() | most.eq(largest))]
    return list(rows.itertuples(index=False, name=None))


def compare_runs(base: Measured, others: Sequence[Measured], noise: Sequence[Measured] = (),
                 everything: bool = False) -> pd.DataFrame:
    """A row for every measure of every other run that the first has, too: both values, the
    difference with its interval, what it says, and by how many items it could be told.

    Where the runs are named with their stages these are compared, else each stage with itself.
    Nats of text that the two cut into other tokens, or of other text, are left out.

    Raises:
        StageError: they have no measure in common, or `noise` is no A/A pair.
    """
    chance, rows = values_of(noise), []
    one_each = all(run.items.stage.nunique() == 1 for run in (base, *others))
    measures = {key[0 if not one_each else 1:]: key
                for key in shown_measures(base.items, everything)}
    for other in others:
        for key in shown_measures(other.items, everything):
            theirs = measures.get(key[0 if not one_each else 1:])
            if theirs is None:
                continue
            found = change(other, base, key, theirs)
            if not (found["paired"] or found["plain"]):
                continue
            said = verdict(found, less_is_better(key[1]))
            limit = noise_of(chance, key, theirs)
            if said in (BETTER, WORSE) and limit is not None and abs(found["value"]) <= limit:
                said = NOISE
            rows.append({"of": other.name, "against": base.name, **found, **dict(zip(KEY, key)),
                         "noise": limit, "says": said,
                         "items to tell": items_to_tell(found["value"], found["spread"])})
    if not rows:
        raise StageError(f"{base.name} and {', '.join(run.name for run in others)} have no measure "
                         f"in common: {base.name} has "
                         f"{', '.join(dict.fromkeys(base.items.stage + ' ' + base.items.task))}")
    order = {stage: place for place, stage in enumerate(STAGE_NAMES)}
    return pd.DataFrame(rows).sort_values(["of", "stage"], kind="stable", key=lambda column: (
        column.map(lambda stage: order.get(stage, len(order))) if column.name == "stage"
        else column.map(list(dict.fromkeys(column)).index))).reset_index(drop=True)


def sentence(row: dict) -> str:
    """A row in words."""
    how = f"the same {row['n']:.0f} items" if row["paired"] else UNPAIRED
    more, wanted = "", row["items to tell"]
    if row["says"] == SAME and row["n"] < wanted < math.inf:
        more = f"; if it is as large as it looks, about {wanted:,.0f} items would tell"
    elif row["says"] == NOISE:
        more = f" of two seeds, {row['noise']:.3f}"
    return f"{row['says'].replace('*', '') or 'not known'}{more} ({how})"
