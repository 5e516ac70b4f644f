"""What a published run found, as lines: a value beside its control, and how the two lie.

A plain module without torch. The lines are those of `verdicts`, with all that the verifier chooses
beside the generator trained on, what is at chance, and what was lost on the way. Only values that stand in the run's
files are put into words; a difference computed here gives a verdict and no number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from modern_llm.evaluation.families import TRAINED_ON
from modern_llm.evaluation.ledger import STAGE_NAMES
from modern_llm.report.page import Run, in_words, interval, model_name, number
from modern_llm.report.verdicts import (
    BETTER, FEW, SAME, UNPAIRED, WORSE, apart, at_chance, five_results, known, line, lookup,
    losses_by_kind, one_model, other_losses, signed, verdict, way,
)

CHANCE = "chance"  # the verdict of what is not above it
FLOOR = "above the floor"


def findings(run: Run) -> list[dict]:
    """Every line of a run; `said` is BETTER, WORSE, SAME, FEW, CHANCE, FLOOR, or "" without a
    control.
    """
    shown = [one for lines in five_results(run).values() for one in lines]
    lost = [] if not shown else losses(run, shown)
    shown = shown or [beside_chance(one) for one in one_model(run)]
    there = {(one["what"], (one["other"] or {}).get("value")) for one in shown}
    more = [one for one in beside_trained_on(run)
            if (one["what"], one["other"]["value"]) not in there]
    told_already = {one["what"] for one in shown if one["beside"].endswith(CHANCE)}
    return [*shown, *more, *lost, *(one for one in chance(run) if one["what"] not in told_already)]


def told(one: dict) -> str:
    """How a value lies to its control: above, below, not told from, too few items to tell from."""
    if one["said"] in (BETTER, WORSE):
        return "above" if one["change"]["low"] > 0 else "below"
    return {SAME: "not told from", FEW: "too few items to tell from", FLOOR: "above",
            CHANCE: "below" if one.get("below") else "not told from"}.get(one["said"], "")


# ---- more lines than the first page of a report has ----------------------------------------------


def beside_trained_on(run: Run) -> list[dict]:
    """What the verifier chooses among its own held-out problems beside the generator trained on."""
    table = {row["metric"]: row for row in run.results.get("verifier", {}).get("table", [])
             if known(row)}
    lines = []
    for metric, row in table.items():
        asked, _, who = metric.partition(", ")
        asked = asked.removesuffix(" exact match")
        for name, one in chosen(run).items() if who == TRAINED_ON and " - " not in asked else ():
            paired = table.get(f"{name} - {asked}, {TRAINED_ON}")
            change = paired or apart(one, row)
            lines.append(line(
                f"verifier: {way(name)}, the stage's held-out problems", one,
                f"{TRAINED_ON} the same further problems, {way(asked)}", row, change,
                said=verdict(change), note="" if paired else UNPAIRED))
    return lines


def chosen(run: Run) -> dict[str, dict]:
    """What the verifier chooses among the most samples of its own held-out problems, by the way."""
    curve = run.results.get("verifier", {}).get("rerank", [])
    most = max((row["size"] for row in curve), default=0)
    return {f"{row['method']}@{most}": row for row in curve if row["size"] == most
            and row["method"] in ("weighted_vote", "best_of_n") and known(row)}


def losses(run: Run, shown: list[dict]) -> list[dict]:
    """What a stage lost in a kind of items, or in a measure that is not among `shown`."""
    found, paired = lookup(run), other_losses(run, shown)
    there = {(row["stage"], row["task"], row["metric"], row["against"]) for row in paired}
    lines = [line(f"{model_name(one['stage'])}: {one['task']}, {one['metric']}", one["now"],
                  model_name(one["before"]), one["was"], one["change"], said=WORSE, note=UNPAIRED)
             for one in (losses_by_kind(run.ledger) if len(run.ledger) else [])
             if (one["stage"], one["task"], one["metric"], one["before"]) not in there]
    for row in paired:
        one, other = (found.get((row[name], row["task"], row["metric"]))
                      for name in ("stage", "against"))
        lines.append(line(f"{model_name(row['stage'])}: {row['task']}, {row['metric']}", one or row,
                          model_name(row["against"]), other, {**row, "value": row["change"]},
                          said=WORSE))
    return lines


def beside_chance(one: dict) -> dict:
    """A measure of a single model with what chance would give, as a verdict."""
    value, other = one["value"], one["other"]
    if other is None or not known(value):
        return one
    change = {"value": value["value"], "low": value["low"] - other["value"],
              "high": value["high"] - other["value"], "n": value.get("n")}
    return {**one, "said": verdict(change), "change": change, "note": UNPAIRED}


def chance(run: Run) -> list[dict]:
    """What is not above chance: measures of the evaluation, the verifier's order, induction."""
    lines = [line(f"{model_name(one['stage'])}: {one['task']}, {one['metric']}", one["row"],
                  f"{one['name']}, chance", None, None, said=CHANCE, below=one["below"])
             for one in (at_chance(run.ledger) if len(run.ledger) else [])
             if one["stage"] in STAGE_NAMES]
    for stage, metric, level in (("verifier", "within-problem AUC, verifier", 0.5),
                                 ("attention", "induction, best head", 0)):
        for row in run.results.get(stage, {}).get("table", []):
            if row["metric"] == metric and known(row) and row["low"] <= level:
                lines.append(line(f"{stage}: {metric}", row, f"{level:g}, chance", None,
                                  None, said=CHANCE,
                                  below=row["high"] < level and row.get("n") != 1))
    return lines


# ---- a line in words -----------------------------------------------------------------------------


def measured(row: dict) -> str:
    """`0.397 [0.388, 0.406] of 200`: the value, its interval and the items."""
    n = row.get("n")
    return interval(row) + (f" of {int(n):,}" if n is not None and n == n and n != 1 else "")


def beside(one: dict, floor: float | None = None) -> str:
    """How a value lies to its control, in words; `floor` in nats per token."""
    if one["said"] == FLOOR:
        at = f" of {number(floor)} nats per token" if floor is not None else ""
        return f"above {one['beside']}{at}, by {interval(one['change'])} of them"
    other, change = one["other"], one["change"]
    words = " ".join(filter(None, [told(one), one["beside"]]))
    if other and told(one):
        words += f", {measured(other) if known(other) else number(other['value'])}"
    if one["note"] == UNPAIRED and told(one):
        words += " (not paired)"
    elif change and known(change) and not one.get("tax"):
        p = change.get("p", math.nan)
        words += f", difference {signed(change)}" + f", p = {p:.2g}" * (p == p)
    return words


def sentences(lines: Iterable[dict], floor: float | None = None) -> list[str]:
    """One sentence for each value, with all its controls."""
    said: dict[str, list[str]] = {}
    for one in lines:
        what = re.sub(r"\b(\w+), (?=\1\b)", "", in_words(one["what"]))
        said.setdefault(f"{what}: {measured(one['value'])}", []).append(beside(one, floor))
    return ["; ".join(filter(None, [f"{value}, {first}" if first else value, *rest]))
            for value, (first, *rest) in said.items()]
