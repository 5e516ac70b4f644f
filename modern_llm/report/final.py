"""The final report: every published run as bullets, then what holds across them and the limits.

A plain module without torch. Every number stands in a file of report/results, in a run's report or
in the diary; what is said of it follows from the rules of `verdicts`. What a run has not measured
has no bullet.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from modern_llm.config import BUILT_IN, DATASET_REGISTRY
from modern_llm.evaluation.ledger import STAGE_NAMES
from modern_llm.files import read_json
from modern_llm.report.findings import CHANCE, FLOOR, findings, measured, sentences, told
from modern_llm.report.page import bullets, number
from modern_llm.report.published import PublishedRun, published_runs
from modern_llm.report.verdicts import (
    BETTER, FEW, SAME, WORSE, apart, known, lookup, verdict,
)

HEAD = """# Final report

Every published run, in the same order of questions: what was trained, what it gained beside its
control, what it lost, what cannot be told, what it cost and how to do it again. A line reads
*measure: value [95% interval] of n items, above, below or not told from its control*; the word
follows from the interval of the difference (and McNemar's p, where given) by rule, *not told from*
meaning that the interval reaches 0, not that the two are equal. Differences are of the same items
unless *not paired* is said. Perplexity, tax and bits are better when small. This page is written
from the files in `report/results` and the reports beside them by `make export`; no number is typed.
"""
# what a line is called by its verdict; those of the second kind share a bullet
LABELS = {BETTER: "Worked", WORSE: "Negative", SAME: "No gain shown"}
TOGETHER = {FLOOR: "Beside its floor", CHANCE: "At or below chance", FEW: "Too few items to tell",
            "": "Measured, no control"}


def final_report(report: Path, names: Sequence[str] | None = None) -> str:
    """The text of `report`/final_report.md, from what is published in that folder: all runs, or
    those of these names.
    """
    results = report / "results"
    runs = [run for run in published_runs(results) if names is None or run.name in names]
    parts = [HEAD, *map(run_part, runs), faults(results), speed(results), gpu(results),
             across(runs), limits(runs), diary(report / "log.md")]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


# ---- one run -------------------------------------------------------------------------------------


def run_part(run: PublishedRun) -> str:
    """A run's section: training, cost, findings by verdict, command."""
    lines = [trained(run), cost(run), *notes(run)]
    found, floor = findings(run), run.results.get("pretrain", {}).get("floor")
    said = {kind: sentences((one for one in found if one["said"] == kind), floor)
            for kind in (*LABELS, *TOGETHER)}
    lines += [f"**{label}:** {one}." for kind, label in LABELS.items() for one in said[kind]]
    lines += [f"**{label}:** {'; '.join(said[kind])}." for kind, label in TOGETHER.items()
              if said[kind]]
    if run.commands:
        lines.append(f"**Again:** `{' && '.join(run.commands)}`")
    return f"## `{run.name}`\n\n{bullets(lines)}"


def trained(run: PublishedRun) -> str:
    """What was trained on what, stage by stage."""
    facts, stages = run.facts, []
    for stage, found in run.results.items():
        words = [f"{found['steps']:,} steps"] if found.get("steps") else []
        words += [f"{found['tokens']:,} tokens"] if found.get("tokens") else []
        words += [f"{often:.2f} epochs"] if (often := found.get("epochs")) else []
        if words:
            minutes = run.minutes.get(stage)
            stages.append(f"{stage} on {', '.join(sources(found)) or 'its data'} ("
                          + ", ".join([*words, *([f"{minutes} minutes"] if minutes else [])])
                          + ", stopped by its time limit" * (found.get("ended_by") == "max_minutes")
                          + ")")
    size = f"{facts['parameters']} parameters" if "parameters" in facts else "a model"
    given = ", ".join(f"{name} {facts[name]}" for name in ("preset", "seed") if name in facts)
    return (f"**Trained:** {size} ({given}): {'; '.join(stages)}." if stages
            else f"**Measured, not trained here:** {size} ({given}).")


def sources(found: dict) -> list[str]:
    """The data that a stage's results name as trained on."""
    names = [row.get("source") for row in found.get("examples", [])]
    names += [name for row in found.get("pairs", [])
              if (name := row.get("pairs", "").removesuffix(", train")) in known_sources()]
    names = names or [row.get("source") for row in found.get("data", [])
                      if row.get("split") == "train"]
    names += [f"{row['answers']:,} of its own answers to {row['problems']:,} problems"
              for row in found.get("data", []) if row.get("") == "train" and row.get("answers")]
    return list(dict.fromkeys(filter(None, names)))


def known_sources() -> tuple[str, ...]:
    return (*BUILT_IN, *DATASET_REGISTRY)


def cost(run: PublishedRun) -> str:
    """Minutes and machine, and where every measure stands."""
    facts = run.facts
    pretrain = run.results.get("pretrain", {})
    seconds = pretrain.get("train_seconds") if "minutes" not in facts else None
    words = [f"{facts['minutes']} minutes by the clock, all stages" if "minutes" in facts else
             f"{number(seconds)} seconds of training" if seconds else "not recorded"]
    words += [f"on {facts['device']} ({facts['machine']})"] if "machine" in facts else []
    called = {"begun": "begun", "threads": "threads:", "python": "python", "torch": "torch",
              "seeds": "seeds trained:"}
    words += [f"{text} {facts[name]}" for name, text in called.items() if name in facts]
    where = (f" Every measure: [report]({run.report.name})." if run.text
             else f" Every measure: [file](results/{run.folder.name}).")
    return f"**Cost:** {', '.join(words)}.{where}"


def notes(run: PublishedRun) -> list[str]:
    """What the report says of its own numbers before anything else."""
    return [f"**Note:** {run.facts[name]}" for name in ("note", "changes") if name in run.facts]


# ---- measurements that are no runs ---------------------------------------------------------------


def faults(results: Path) -> str:
    """Faults injected into training processes, and those that people found."""
    lines = []
    if (path := results / "faults.csv").is_file():
        rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
        total = lambda name: sum(int(row[name]) for row in rows)
        most = max(int(row["steps lost beyond the last checkpoint"]) for row in rows)
        lines.append(f"**Injected into training:** {total('times'):,} faults of {len(rows)} kinds, "
                     f"{total('survived'):,} ended in the undisturbed weights, bit for bit, or "
                     f"were refused in time; at most {most} steps lost beyond a checkpoint "
                     "([table](faults.md)).")
    if (path := results / "faults.json").is_file():
        made = read_json(path)
        lines.append(f"**Cost:** {made['seconds']} seconds on {made['date']}, {made['where']}, a "
                     f"model of {made['parameters']:,} parameters: `{made['command']}`.")
    if (path := results / "fault_cases.csv").is_file():
        rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
        lines.append(f"**Found by people:** {len(rows)} kinds of fault (negative results of use), "
                     f"{sum(int(row['cases']) for row in rows)} cases, each a test now.")
    return f"## Faults\n\n{bullets(lines)}" if lines else ""


def speed(results: Path) -> str:
    """The evaluation's speed beside other programs."""
    lines = []
    for path in sorted((results / "eval_speed").glob("*.json")):
        found = read_json(path)
        made, arguments = found["conditions"], []
        for unit, timed in found.items():
            if unit == "conditions" or not timed.get("summary"):
                continue
            rounds = 1 + max(row["round"] for row in timed["rounds"])
            names = ("sentiment", "sentences", "shots", "batch_rows", "word_problems", "problems",
                     "samples", "new_tokens", "rows", "threads")
            arguments = [f"-p {name} {made[name]}" for name in names if name in made]
            rates = "; ".join(f"{row['program']} {row['median']:.1f}" for row in timed["summary"])
            others = ", ".join(f"{row['ratio of medians']:.1f} × {row['program']}"
                               for row in timed["summary"][1:])
            lines.append(f"**{unit.replace('_', ' ')}**, {made['checkpoint']} "
                         f"({made['parameters']:,} parameters, {made['threads']} threads, torch "
                         f"{made['torch']}), median of rounds: {rates}; that is {others}. Rounds: "
                         f"{rounds}, no interval. `papermill nbs/50_eval_speed.ipynb out.ipynb "
                         f"-p checkpoint /path/to/{made['checkpoint']} -p rounds {rounds} "
                         f"{' '.join(arguments)}`")
    return f"## Speed of the evaluation\n\n{bullets(lines)}" if lines else ""


def gpu(results: Path) -> str:
    """The ladders of `modern-llm bench --device cuda`: the best step of each."""
    lines = []
    for path in sorted(results.glob("*/bench.json")):
        found = read_json(path)
        steps = {row["line"]: row for row in found["lines"]
                 if row["kind"] == "step" and row["status"] == "ok" and row.get("mfu")}
        if not steps:
            continue
        best = max(steps, key=lambda name: steps[name]["mfu"])
        made = found["machine"]
        lines.append(
            f"**253M model, {made['device']}**, torch {made['torch']}, random tokens, measured "
            f"once: {steps[best]['tokens_per_s']:,.0f} tokens/s, MFU {steps[best]['mfu']:.3f}, "
            f"{steps[best]['of_matrix']:.3f} of a matrix product there (line "
            f"{best.removeprefix('step ')}). What each setting is worth: chapter 52. `modern-llm "
            f"bench --device cuda --to DIR`, [lines](results/{path.parent.name}/lines.csv)")
    return f"## Speed on a GPU\n\n{bullets(lines)}" if lines else ""


# ---- across runs ---------------------------------------------------------------------------------


def across(runs: list[PublishedRun]) -> str:
    """What is the same in every run that measured it, what only some show, what contradicts."""
    asked: dict[tuple[str, str], list[tuple[PublishedRun, dict]]] = {}
    for run, one in ((run, one) for run in runs for one in findings(run)):
        if told(one) and one["said"] not in (FEW, FLOOR):
            asked.setdefault((general(one["what"]), general(one["beside"])), []).append((run, one))
    kinds: dict[str, dict[tuple[str, str], list[str]]] = {
        "same": {}, "nowhere": {}, "partly": {}, "against": {}}
    for (what, beside), seen in asked.items():
        if len({run.name for run, _ in seen}) < 2:
            continue
        words = dict.fromkeys(told(one) for _, one in seen)
        said = "; ".join(f"{word} in " + ", ".join(
            f"`{run.name}` {measured(one['value'])}" for run, one in seen if told(one) == word)
            for word in words)
        kind = ("nowhere" if set(words) == {"not told from"} else "same" if len(words) == 1 else
                "against" if {"above", "below"} <= words.keys() else "partly")
        kinds[kind].setdefault((what, said), []).append(beside)
    same, nowhere, partly, against = ([f"{what}, beside {' and '.join(besides)}: {said}."
                              for (what, said), besides in kind.items()] for kind in kinds.values())
    lines = [f"**{label}:** {one}" for label, found in (
        ("Holds", [*same, *more_tokens(runs), *protocols(runs)]), ("Shown in none", nowhere),
        ("Contradicts", against), ("Shown in some, not in others", partly)) for one in found]
    return f"## Across the runs\n\n{bullets(lines)}" if lines else ""


def general(what: str) -> str:
    """The question behind a line: without the data set and the number of samples."""
    names = "|".join(map(re.escape, sorted(known_sources(), key=len, reverse=True)))
    return re.sub(r"\bof \d+\b", "of several", re.sub(rf", ({names})(?=,|$)", "", what))


def more_tokens(runs: list[PublishedRun]) -> list[str]:
    """Bits per byte of the same held-out text after more tokens, in models of one size."""
    seen: dict[tuple, list[tuple[int, str, dict]]] = {}
    for run in runs:
        found = run.results.get("pretrain", {})
        for row in found.get("table", []):
            if row["metric"].startswith("bits per byte") and known(row) and found.get("tokens"):
                key = (row["metric"], row.get("protocol"), found.get("parameters"))
                seen.setdefault(key, []).append((found["tokens"], run.name, row))
    lines = []
    for (metric, *_), rows in seen.items():
        rows.sort(key=lambda one: one[0])
        steps = [verdict(apart(after, before), True)
                 for (*_, before), (*_, after) in itertools.pairwise(rows)]
        if steps and set(steps) == {BETTER}:
            lines.append(f"More tokens, fewer bits (pretraining, {metric}): " + "; ".join(
                f"{measured(row)} after {tokens:,} (`{name}`)" for tokens, name, row in rows)
                + "; every step down is told (not paired).")
    return lines


def protocols(runs: list[PublishedRun]) -> list[str]:
    """One model and one text by three protocols, where their order is the same everywhere."""
    wanted, orders, said = ("perplexity T1", "perplexity T2", "word perplexity T3"), set(), []
    for run in runs:
        found = lookup(run) if len(run.ledger) else {}
        stage = next((name for name in (STAGE_NAMES[0], "checkpoint")
                      if any(key[:2] == (name, "protocols") for key in found)), None)
        texts = dict.fromkeys(key[2].partition(", ")[2] for key in found
                              if key[0] == stage and key[2].startswith(wanted[0] + ", "))
        for text in texts:
            rows = {name: row for name in wanted
                    if (row := found.get((stage, "protocols", f"{name}, {text}")))}
            if len(rows) == len(wanted):
                order = sorted(rows, key=lambda name: rows[name]["value"])
                orders.add(tuple(order))
                said.append(f"`{run.name}` on {text} " + ", ".join(
                    measured(rows[name]) for name in order))
    if len(orders) != 1 or len(said) < 2:
        return []
    return [f"The protocol alone moves a perplexity, in the order {', '.join(orders.pop())}: "
            + "; ".join(said) + "."]


# ---- limits --------------------------------------------------------------------------------------


def limits(runs: list[PublishedRun]) -> str:
    """What these numbers do not say."""
    called = lambda chosen: ", ".join(f"`{run.name}`" for run in chosen)
    lines = []
    made_up = [run for run in runs if (names := named_sources(run)) and names <= set(BUILT_IN)]
    if made_up:
        lines.append(f"**Synthetic:** all text of {called(made_up)} is written by a program with "
                     "known answers; its numbers say what a method does, not how a model fares on "
                     "human text.")
    once = [run for run in runs if "seeds" not in run.facts and named_sources(run)]
    if once:
        lines.append(f"**One seed:** {called(once)}; intervals are over the items measured, and "
                     "nothing says what another training run would give.")
    often = [run for run in runs if "seeds" in run.facts]
    lines += [f"**Seeds:** `{run.name}` was trained with {run.facts['seeds']} seeds; the numbers "
              f"above are of seed {run.facts.get('seed')}, the ranges in its report."
              for run in often]
    devices = {run.facts["device"] for run in runs if "device" in run.facts}
    if devices == {"cpu"}:
        lines.append("**No GPU:** none of these runs used one.")
    small = [run for run in runs if int(run.facts.get("parameters", "0").replace(",", "")) < 1e8
             and named_sources(run)]
    if small:
        lines.append(f"**Small:** {called(small)} trained for minutes on a few threads; what holds "
                     "at this size need not hold at another.")
    shared = []
    for run in runs:
        rows = run.frame("contamination.csv")
        if len(rows) and (rows.hit_share > 0.05).any():
            worst = rows.sort_values("hit_share", ascending=False, kind="stable").iloc[0]
            shared.append(f"{int(worst.hit)} of {int(worst['items'])} items of {worst['set']} with "
                          f"the {worst.source} (`{run.name}`)")
    if shared:
        lines.append("**Overlap:** what shares most runs of words with the text trained on: "
                     f"{'; '.join(shared)}. The reports have the scores on the rest.")
    return f"## Limits\n\n{bullets(lines)}"


def named_sources(run: PublishedRun) -> set[str]:
    """Every data set that the stages of a run were trained on."""
    return {name for found in run.results.values() if found.get("steps")
            for name in sources(found)} & set(known_sources())


def diary(path: Path) -> str:
    """What failed on the way: the diary's entries that say so in their title."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    titles = re.findall(r"^## (.*\(negative\b.*)$", text, re.M)
    return "## What failed on the way ([diary](log.md))\n\n" + bullets(titles) if titles else ""
