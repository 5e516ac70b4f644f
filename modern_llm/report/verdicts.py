"""The rules by which a report says better, worse, no difference shown, or at chance; and the
results of a run set beside their controls.

A plain module without torch. Everything follows from intervals and paired tests that a run left in
its files; a number without an interval gets no verdict.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from modern_llm.evaluation.families import FAMILIES, SAMPLED, TRAINED_ON, is_aside
from modern_llm.evaluation.ledger import STAGE_NAMES, is_significant
from modern_llm.report.page import Run, model_name, number

if TYPE_CHECKING:
    import pandas as pd

BETTER, WORSE, SAME, FEW = "better", "**worse**", "no difference shown", "too few items"
UNPAIRED = "not paired"  # said beside a difference of two values, not of their items


def verdict(change: dict, less_is_better: bool = False) -> str:
    """What a difference says: nothing but `SAME` unless its interval leaves out 0 and its paired
    test (p) is below 0.05; `FEW` where these are fewer than six items; "" where the interval is not
    known.
    """
    if not known(change):
        return ""
    low, high, p, n = change["low"], change["high"], change.get("p", math.nan), change.get("n")
    if not is_significant(low, high, math.inf, p):
        return SAME
    if n is None or not is_significant(low, high, n, p):
        return FEW
    return BETTER if (low > 0) != less_is_better else WORSE


def known(row: dict) -> bool:
    """Whether a row has a value and both ends of its interval."""
    return all(row.get(name) is not None and row[name] == row[name]
               for name in ("value", "low", "high"))


def apart(one: dict, other: dict) -> dict:
    """The difference of two values that were not paired item by item, from their intervals.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions",
    method 10. Of the same items it is usually wider than the paired interval.
    """
    difference = one["value"] - other["value"]
    below = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    counts = [row["n"] for row in (one, other) if row.get("n") == row.get("n") is not None]
    return {"value": difference, "low": difference - below, "high": difference + above,
            "n": min(counts, default=None)}


def signed(change: dict) -> str:
    """`+0.370 [0.305, 0.435]`."""
    sign = "+" if change["value"] > 0 else ""
    return f"{sign}{number(change['value'])} [{number(change['low'])}, {number(change['high'])}]"


# ---- what the ledger says ------------------------------------------------------------------------


def lookup(run: Run) -> dict[tuple[str, str, str], dict]:
    """The ledger's rows by stage, task and metric."""
    return {(row["stage"], row["task"], row["metric"]): row
            for row in run.ledger.to_dict("records")}


def losses_by_kind(ledger: pd.DataFrame) -> list[dict]:
    """Kinds and levels of items ("exact match, fact") of which a stage gets less right than the
    stage before, by more than both intervals allow: stage, before, task, metric, was, now, change.

    The sampled problems are left out: they are some of the problems.
    """
    rows = {(row["stage"], row["task"], row["metric"]): row for row in ledger.to_dict("records")}
    stages = [name for name in STAGE_NAMES if any(name == key[0] for key in rows)]
    found = []
    for (stage, task, metric), now in rows.items():
        whole, _, kind = metric.rpartition(", ")
        if (task == SAMPLED or kind == "over draws" or " minus " in metric
                or (stage, task, whole) not in rows or stage not in stages[1:]):
            continue
        was = rows.get((before := stages[stages.index(stage) - 1], task, metric))
        if was and known(was) and known(now):
            change = apart(now, was)
            if verdict(change, less_is_better(task)) == WORSE:
                found.append({"stage": stage, "before": before, "task": task, "metric": metric,
                              "was": was, "now": now, "change": change})
    return found


def less_is_better(task: str) -> bool:
    """Whether a smaller value of a task's measures is the better one."""
    return task in FAMILIES and FAMILIES[task].less_is_better


def at_chance(ledger: pd.DataFrame) -> list[dict]:
    """The first measures of tasks with a chance, where a stage is not above it: stage, task,
    metric, row, chance, name (its number, or what is said without skill), below.
    """
    rows = {(row["stage"], row["task"], row["metric"]): row for row in ledger.to_dict("records")}
    found = []
    for (stage, task, metric), row in rows.items():
        family = FAMILIES.get(task)
        if family is None or family.chance is None or not family.leads(metric):
            continue
        chance, name = family.chance, str(family.chance)
        if isinstance(chance, str):
            chance = rows.get((stage, task, chance), {}).get("value", math.nan)
        if known(row) and row["low"] <= chance:
            found.append({"stage": stage, "task": task, "metric": metric, "row": row,
                          "chance": chance, "name": name, "below": row["high"] < chance})
    return found


def variants_at_chance(rows: pd.DataFrame) -> set[tuple[str, str]]:
    """(stage, metric) of the ways to ask for the sentiment whose accuracy, less that of the
    commonest label, has an interval that reaches 0 or lies below.
    """
    against = rows[rows.metric.str.endswith(" minus majority class")]
    return {(row.stage, row.metric.removesuffix(" minus majority class"))
            for row in against.itertuples() if row.low <= 0}


# ---- results beside their controls ---------------------------------------------------------------


def line(what: str, value: dict, beside: str, other: dict | None, change: dict | None,
         said: str | None = None, note: str = "", **more: object) -> dict:
    """One result beside one control. `change` counts as gain; `said` is the verdict, if it is not
    that of the change.
    """
    return {"what": what, "value": value, "beside": beside, "other": other, "change": change,
            "note": note, "said": verdict(change) if said is None and change else said or "",
            **more}


def text_results(run: Run) -> list[dict]:
    """Held-out text after pretraining, beside the entropy floor where it is known."""
    found = lookup(run)
    of_stage = run.results.get("pretrain", {}).get("table", [])
    rows = ([row for key, row in found.items() if key[0] == STAGE_NAMES[0]
             and key[1] == "perplexity"] or of_stage)
    floor = {row["metric"].partition(", ")[2]: row for row in of_stage
             if row["metric"].startswith("above the floor")}
    start = next((start for start in ("perplexity, ", "bits per byte, ")
                  if any(row["metric"].startswith(start) for row in rows)), None)
    lines = []
    for row in (row for row in rows if start and row["metric"].startswith(start)):
        above = floor.get(row["metric"].removeprefix(start))
        nats = run.results["pretrain"].get("floor") if above else None
        other = {"value": math.exp(nats)} if nats and start == "perplexity, " else None
        lines.append(line(f"pretraining: {row['metric']}", row,
                          "the entropy floor of the text" if above else "its floor is not known",
                          other, above, said="above the floor" if above else "",
                          note="nats per token"))
    return lines


def stage_results(run: Run, stage: str, before: str, tasks: tuple[tuple[str, str], ...],
                  beside: str) -> list[dict]:
    """What a stage changed in some measures, item by item, beside the model before."""
    found, gains, lines = lookup(run), run.gains, []
    for task, metric in tasks:
        one, other = found.get((stage, task, metric)), found.get((before, task, metric))
        if one is None:
            continue
        change = None
        if len(gains):
            rows = gains[gains.stage.eq(stage) & gains.against.eq(before) & gains.task.eq(task)
                         & gains.metric.eq(metric)].to_dict("records")
            change = rows[0] | {"value": rows[0]["change"]} if rows else None
        lines.append(line(f"{model_name(stage)}: {task}, {metric}", one, beside, other, change,
                          said=None if change else "",
                          key=(stage, task, metric, before)))
    return lines


def dpo_control_results(run: Run) -> list[dict]:
    """DPO beside the same training without preferences, item by item, from the stage's own table;
    none where no control was trained.
    """
    table = {row["metric"]: row for row in run.results.get("dpo", {}).get("table", [])}
    lines = []
    for metric, change in table.items():
        name, found, source = metric.partition(", after - control")
        if found:
            lines.append(line(f"DPO: {name}{source}, the stage's own held-out pairs",
                              table.get(f"{name}, after{source}", change),
                              "the same training without preferences",
                              table.get(f"{name}, control{source}"), change))
    return lines


def tax_results(run: Run) -> list[dict]:
    """What tuning cost in held-out text: perplexity over that of the pretrained model."""
    lines = []
    for (stage, _, metric), row in lookup(run).items():
        if metric.startswith("perplexity tax, "):
            change = {**row, "value": row["value"] - 1, "low": row["low"] - 1,
                      "high": row["high"] - 1}
            lines.append(line(f"{model_name(stage)}: {metric}", row, "no tax, 1", None, change,
                              said=verdict(change, True), tax=True))
    return lines


def verifier_results(run: Run) -> list[dict]:
    """What the verifier's choice among samples is worth, beside choices that need no verifier, and
    beside the generator trained on.
    """
    found, gains, lines = lookup(run), run.gains, []
    rows = gains[gains.stage.eq("verifier") & gains.metric.str.contains("@")] if len(gains) else []
    if len(rows):
        ways = {key[2]: row for key, row in found.items() if key[1] == SAMPLED and "@" in key[2]}
        asked = [name for name in STAGE_NAMES[:3] if (name, SAMPLED, "exact match") in found]
        ways["greedy"] = found.get((asked[-1], SAMPLED, "exact match")) if asked else None
        for row in rows.to_dict("records"):
            lines.append(line(f"verifier: {way(row['metric'])}", ways.get(row["metric"]) or row,
                              way(row["against"]), ways.get(row["against"]),
                              {**row, "value": row["change"]},
                              key=("verifier", SAMPLED, row["metric"], row["against"])))
        size = rows.iloc[-1].metric.partition("@")[2]
        best = ways.get(f"best_of_n@{size}")
        for other in (f"majority@{size}", f"log_prob@{size}"):
            if best and ways.get(other) and known(best) and known(ways[other]):
                lines.append(line(f"verifier: {way(f'best_of_n@{size}')}", best, way(other),
                                  ways[other], apart(best, ways[other]), note=UNPAIRED))
        lines.sort(key=lambda one: one["what"], reverse=True)
    return lines + stage_verifier_results(run, bool(lines))


def stage_verifier_results(run: Run, only_control: bool) -> list[dict]:
    """The same from the verifier stage's own held-out problems: the control that the evaluation has
    not, and the votes too, unless `only_control`. Runs without it have the verifier's own language
    model in its place.
    """
    results = run.results.get("verifier", {})
    table = {row["metric"]: row for row in results.get("table", [])}
    curve, lines = results.get("rerank", []), []
    most = max((row["size"] for row in curve), default=0)
    ways = {f"{row['method']}@{most}": row for row in curve if row["size"] == most}
    ways["greedy"] = table.get("greedy exact match, generator")
    for metric, change in ({} if only_control else table).items():
        name, _, other = metric.partition(" - ")
        if "@" in name and other and ways.get(name) and TRAINED_ON not in other:
            lines.append(line(f"verifier: {way(name)}", ways[name], way(other), ways.get(other),
                              change))
    own = table.get("greedy exact match, the verifier's own language model")
    if trained_on := trained_on_results(table, ways, most):
        lines += trained_on
    elif own and known(own) and results.get("kind") != "encoder":
        for name in (f"weighted_vote@{most}", f"best_of_n@{most}"):
            if ways.get(name) and known(ways[name]):
                lines.append(line(f"verifier: {way(name)}, the stage's held-out problems",
                                  ways[name], "the generator trained on the same further problems, "
                                  "one greedy answer", own, apart(ways[name], own), note=UNPAIRED))
    return lines


def trained_on_results(table: dict[str, dict], ways: dict[str, dict], most: int) -> list[dict]:
    """The weighted vote beside the generator trained on, problem by problem; none where the stage's
    `table` does not have it.
    """
    name, lines = f"weighted_vote@{most}", []
    for other in ("greedy", f"majority@{most}"):
        change = table.get(f"{name} - {other}, {TRAINED_ON}")
        if change and ways.get(name):
            measure = other if "@" in other else f"{other} exact match"
            lines.append(line(f"verifier: {way(name)}, the stage's held-out problems", ways[name],
                              f"{TRAINED_ON}, {way(other)}", table.get(f"{measure}, {TRAINED_ON}"),
                              change))
    return lines


WAYS = {"weighted_vote": "weighted vote of {}", "best_of_n": "best of {} by its score",
        "majority": "majority of {}",
        "majority_trained_on": "majority of {} by the generator trained on",
        "log_prob": "the likeliest of {}", "random": "a random one of {}",
        "calculator": "one of {} with true sums", "greedy": "one greedy answer"}


def way(name: str) -> str:
    """A way to choose among samples in words: `weighted vote of 16` for weighted_vote@16."""
    method, _, size = name.partition("@")
    return WAYS.get(method, method).format(size)


def one_model(run: Run) -> list[dict]:
    """The first measures of a single model, beside chance where there is one."""
    found, lines = lookup(run), []
    for (stage, task, metric), row in found.items():
        family = FAMILIES.get(task)
        if family and family.leads(metric) and " minus " not in metric:
            other = ({"value": family.chance} if isinstance(family.chance, float)
                     else found.get((stage, task, family.chance)))
            lines.append(line(f"{model_name(stage)}: {task}, {metric}", row,
                              "chance" if other else "", other, None))
    return lines


def five_results(run: Run) -> dict[str, list[dict]]:
    """The five results of a run, each the list of its lines; of one that was not measured it is
    empty.
    """
    shared = (("instructions", "exact match"), ("problems", "exact match"),
              ("sentiment, asked", "accuracy"))
    base, sft, dpo = STAGE_NAMES[:3]
    return {"pretraining": text_results(run),
            "SFT": stage_results(run, sft, base, shared, "the pretrained model"),
            "DPO": stage_results(run, dpo, sft, (("preferences", "accuracy"), *shared),
                                 "SFT, without DPO") + dpo_control_results(run),
            "tax": tax_results(run), "verifier": verifier_results(run)}


def other_losses(run: Run, shown: list[dict]) -> list[dict]:
    """Significant losses from stage to stage in measures that `shown` does not have: rows of the
    gains. Held-out text is left to the perplexity tax, where that is shown.
    """
    gains = run.gains
    if gains.empty:
        return []
    there, taxed = {one.get("key") for one in shown}, any("tax" in one for one in shown)
    kept = gains[~is_aside(gains) & gains.stage.isin(STAGE_NAMES) & gains.against.isin(STAGE_NAMES)]
    return [row for row in kept.to_dict("records")
            if (row["stage"], row["task"], row["metric"], row["against"]) not in there
            and not (taxed and row["task"] == "perplexity")
            and verdict({**row, "value": row["change"]}, less_is_better(row["task"])) == WORSE]
