"""What a published run found, as lines: a value beside its control, and how the two lie.

A plain module without torch. The lines are those of `verdicts`, with every row that names a control
of its own, what is at chance, and what was lost on the way. Only values that stand in the run's
files are put into words; a difference computed here gives a verdict and no number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from modern_llm.evaluation.ledger import STAGE_NAMES
from modern_llm.report.page import Run, in_words, interval, model_name, number
from modern_llm.report.verdicts import (
    BETTER, FEW, SAME, UNPAIRED, WORSE, apart, at_chance, five_results, known, less_is_better, line,
    lookup, losses_by_kind, one_model, other_losses, signed, verdict, way,
)

# what a row's name says of a control, and how it is called; the first that fits
CONTROLS = {"the generator trained on": "the generator trained on the same further problems",
            "preference weight 0": "the same run at preference weight 0"}
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
    more = [one for one in named_controls(run)
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


def named_controls(run: Run) -> list[dict]:
    """Measures beside the rows that name a control for them (`CONTROLS`): in the stages' tables and
    in the ledger.
    """
    rows = [{"stage": stage, "task": "", **row} for stage, found in run.results.items()
            if stage != "eval" for row in found.get("table", [])]
    rows += run.ledger.to_dict("records") if len(run.ledger) else []
    lines = []
    for row in rows:
        phrase = control_of(row)
        if not phrase or not known(row) or " - " in row["metric"] or " minus " in row["metric"]:
            continue
        place, rest = plain(row)
        beside = CONTROLS[phrase]
        if row["stage"] == "verifier" and not row["task"]:
            asked = rest[0].removesuffix(" exact match")
            gains, beside = chosen(run), f"{beside}, {way(asked)}"
        else:
            gains = {other["metric"]: other for other in rows if known(other)
                     and not control_of(other) and plain(other) == (place, rest)}
        for name, one in gains.items():
            what = (f"verifier: {way(name)}, the stage's held-out problems" if "@" in name else
                    f"{model_name(one['stage'])}: "
                    + ", ".join(filter(None, [row["task"], *rest])))
            paired = next((other for other in rows if other["metric"] == f"{name} - {row['metric']}"
                           and known(other)), None)
            less = less_is_better(row["task"]) or rest[0].startswith(("perplexity", "nats"))
            change = paired or apart(one, row)
            lines.append(line(what, one, beside, row, change, said=verdict(change, less),
                              note="" if paired else UNPAIRED))
    return lines


def control_of(row: dict) -> str:
    """What of `CONTROLS` the stage or the metric of a row names; "" if nothing."""
    return next((phrase for phrase in CONTROLS if phrase in f"{row['stage']}, {row['metric']}"), "")


def plain(row: dict) -> tuple[tuple, list[str]]:
    """Where a row stands, and its metric part by part, without what makes it a control."""
    kept = lambda text: [part for part in text.split(", ")
                         if part != "after" and not any(phrase in part for phrase in CONTROLS)]
    return (tuple(kept(row["stage"])), row["task"]), kept(row["metric"])


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
