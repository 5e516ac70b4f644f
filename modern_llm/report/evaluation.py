"""What the evaluation found, as sections of a report: results, changes, perplexity, sentiment,
contamination, baselines, verifier.

A plain module without torch; every section is made of the files that the evaluation left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from modern_llm.evaluation.families import FAMILIES, is_aside
from modern_llm.report.page import (
    Page, folded, interval, markdown_table, measured, measures, number, text_block,
)

if TYPE_CHECKING:
    import pandas as pd


def main_rows(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger without differences, costs, and what has a section of its own or is part of a
    measure (levels, kinds of errors); of a curve the largest @k only.
    """
    elsewhere = ["cost", *(family.name for family in FAMILIES.values() if family.section)]
    kept = ledger[~ledger.metric.str.contains(" minus ") & ~ledger.task.isin(elsewhere)
                  & ~is_aside(ledger)].copy()
    there = set(zip(kept.stage, kept.task, kept.metric))
    part = [", " in row.metric and (row.stage, row.task, row.metric.rpartition(", ")[0]) in there
            for row in kept.itertuples()]
    kept = kept[[not (is_part and task != "perplexity") for is_part, task in zip(part, kept.task)]]
    sizes = kept.metric.str.extract(r"@(\d+)$")[0].astype(float)
    largest = sizes.groupby([kept.stage, kept.task]).transform("max")
    return kept[sizes.isna() | (sizes == largest)]


def results(page: Page) -> None:
    import pandas as pd

    from modern_llm.evaluation import charts
    from modern_llm.report import pictures

    page.add("## Results")
    ledger = page.run.frame("eval/ledger.csv")
    if page.missing("eval"):
        return
    page.origin()
    if ledger.empty:
        page.add(measures(page.run.results["eval"].get("table", [])))
        return
    rows = main_rows(ledger)
    stages = list(dict.fromkeys(ledger.stage))
    by_measure = {}
    for row in rows.to_dict("records"):
        line = by_measure.setdefault((row["task"], row["metric"]),
                                     {"task": row["task"], "metric": row["metric"]})
        line[row["stage"]] = interval(row)
        line["n"] = int(row["n"]) if row["n"] == row["n"] else None
    panels = [row | {"panel": f"{task}\n{row['metric']}"} for task, family in FAMILIES.items()
              for start in (family.headline if family.panels is None else family.panels)
              for row in rows[rows.task.eq(task) & rows.low.notna()].to_dict("records")
              if row["metric"].startswith(start)]
    if panels:
        page.picture("results.png", pictures.stage_results, pd.DataFrame(panels),
                     caption="Each measure by stage, with 95% intervals.")
    page.add(markdown_table(by_measure.values(), ["task", "metric", *stages, "n"]))
    page.add("Brackets are 95% intervals over the items measured, not over seeds.")
    unpaired = ledger[~ledger.metric.str.contains(" minus ", regex=False)]
    protocols = unpaired.drop_duplicates([
        "task", "protocol"])[["stage", "task", "protocol"]].to_dict("records")
    page.add(folded("Protocols", markdown_table(protocols)))
    every = [{**row, "value": interval(row)} for row in ledger.to_dict("records")]
    page.add(folded(f"All {len(every)} rows of the ledger",
                    markdown_table(every, ["stage", "task", "metric", "value", "n"])))
    page.picture("levels.png", charts.levels_chart, ledger, stages, "level",
                 caption="Word problems by number of steps, greedy answers.")


def stage_gains(page: Page) -> None:
    import pandas as pd

    from modern_llm.evaluation import charts

    page.add("## Stage gains")
    table = page.run.frame("eval/stage_gains.csv")
    if table.empty:
        if not page.missing("eval"):
            page.add("`eval/stage_gains.csv` is empty: there was only one stage to measure.")
        return
    table["significant"] = table.significant.astype(str) == "True"
    kept = table[~is_aside(table)]
    kept = kept.assign(p=pd.to_numeric(kept.p, errors="coerce") if "p" in kept else float("nan"))
    page.add("Each row compares two stages item by item. *Significant* means that the paired 95% "
             "interval leaves out 0, that McNemar's p is below 0.05 where items are right or "
             f"wrong, and that there are at least six items; of {len(kept)} comparisons, about "
             f"{0.05 * len(kept):.0f} would be so by chance.")
    page.origin()
    shares = kept[~kept.task.eq("perplexity")]
    labels = shares.stage + " − " + shares.against + ": " + shares.task + ", " + shares.metric
    if len(shares):
        page.picture("gains.png", charts.change_chart, labels.head(40), shares.head(40),
                     caption="Changes with their paired intervals; grey ones are not significant. "
                             "Perplexity: see the table.")
    page.add(markdown_table(
        {**{name: row[name] for name in ("stage", "against", "task", "metric", "value")},
         "change [95% interval]": interval({**row, "value": row["change"]}), "n": int(row["n"]),
         "significant": "yes" if row["significant"] else "no",
         "McNemar p": "" if pd.isna(row["p"]) else f"{row['p']:.2g}"}
        for row in kept.to_dict("records")))


def by_stage(rows: Iterable[dict], stages: Iterable[str]) -> str:
    """A table with one line for each metric and one column for each stage."""
    lines: dict[str, dict] = {}
    for row in rows:
        lines.setdefault(row["metric"], {"metric": row["metric"]})[row["stage"]] = interval(row)
    return markdown_table(lines.values(), ["metric", *stages])


def of_task(page: Page, title: str, task: str, pattern: str) -> pd.DataFrame | None:
    """Begin a section; the ledger's rows of one task whose metric matches, or None, with the reason
    said, if there are none.
    """
    page.add(f"## {title}")
    if page.missing("eval"):
        return None
    ledger = page.run.frame("eval/ledger.csv")
    rows = (ledger[ledger.task.eq(task) & ledger.metric.str.contains(pattern, regex=True)]
            if len(ledger) else ledger)
    if not len(rows):
        page.add("This evaluation did not measure it.")
        return None
    return rows


def perplexities(page: Page) -> None:
    rows = of_task(page, "Perplexity in four protocols", "protocols",
                   r"^(?!.* minus )(?!nats per token)")
    if rows is None:
        return
    page.add("The same model has a different perplexity by every protocol, so a number without one "
             "cannot be compared: T0 is kept for old results, T1 and T2 read the joined text "
             "without and with overlap, T3 counts per word and per byte, whatever the tokenizer.")
    page.origin()
    page.add(by_stage(rows.to_dict("records"), dict.fromkeys(rows.stage)))
    how = rows.drop_duplicates("metric")[["metric", "n", "protocol"]].to_dict("records")
    page.add(folded("How each was measured (n: documents, or lines for T0)", markdown_table(how)))


def sentiment(page: Page) -> None:
    from modern_llm.evaluation import charts

    rows = of_task(page, "Sentiment by demonstrations", "sentiment", r"-shot, |^majority class$")
    if rows is None:
        return
    shots = rows.join(rows.metric.str.extract(
        r"^accuracy, (?P<shots>\d+)-shot, (?P<method>\w+)$")).dropna(subset="shots")
    page.add("The likelier label word behind `Sentiment:`, as it is (direct), less its prior "
             "(contextual, pmi), by how likely it makes the sentence (channel), and with the "
             "demonstrations in the order that uses the labels most evenly (ordered).")
    page.origin()
    page.picture("sentiment.png", charts.sentiment_chart, rows, list(dict.fromkeys(shots.stage)),
                 caption="Accuracy by number of demonstrations, with 95% intervals over sentences; "
                         "dashed: always the commonest label.")
    spread = rows[rows.metric.str.endswith(", over draws")].set_index(["stage", "metric"])
    lines = []
    for row in shots.to_dict("records"):
        draws = (row["stage"], f"{row['metric']}, over draws")
        lines.append({
            "stage": row["stage"], "demonstrations": row["shots"], "method": row["method"],
            "accuracy": interval(row), "n": int(row["n"]),
            "worst and best draw": f"{number(spread.low[draws])} … {number(spread.high[draws])}"
                                   if draws in spread.index else "",
            "": "; ".join(part for part in row["protocol"].split("; ") if "constant answer" in part)
        })
    page.add(folded("All shots and methods", markdown_table(lines)))


def contamination(page: Page) -> None:
    page.add("## Was it in the training text?")
    table = page.run.frame("eval/contamination.csv")
    if page.missing("eval"):
        return
    if table.empty:
        page.add("Not compared: what the model was trained on is not known to this run, or "
                 "`eval.overlap_words` is 0.")
        return
    words = page.run.record.get("config", {}).get("eval", {}).get("overlap_words", 13)
    page.add(f"Runs of {words} words that an evaluation item shares with a training source. Items "
             "under 8 words are too short to tell.")
    page.origin()
    columns = ["source", "set", "items", "too_short", "hit", "hit_share", "found_share"]
    page.add(markdown_table(
        table.sort_values("found_share", ascending=False)[columns].to_dict("records")))
    hits = (table[table.found > 0].sort_values("found_share", ascending=False)
                .drop_duplicates("set").head(4))
    page.add(folded(
        "An example of each set",
        text_block([(f"{row.set} in {row.source}", row.example) for row in hits.itertuples()])))
    scores = page.run.frame("eval/clean_scores.csv")
    if len(scores):
        page.add("The scores on all items, and on those without any shared run. Clean items are "
                 "not a random part: short and easy ones share more, so where items have groups, "
                 "the last column mixes the clean ones as all are mixed.")
        lines: dict[tuple, dict] = {}
        for row in scores.to_dict("records"):
            metric = row["metric"].removesuffix(f", {row['subset']}")
            line = lines.setdefault((row["stage"], row["task"], metric),
                                    {"stage": row["stage"], "task": row["task"], "metric": metric})
            line[row["subset"]] = f"{interval(row)} (n = {int(row['n'])})"
        subsets = [name for name in ("all", "clean", "clean, groups as in all")
                   if name in set(scores.subset)]
        page.add(markdown_table([line for line in lines.values() if len(line) > 4],
                                ["stage", "task", "metric", *subsets]))


def baselines(page: Page) -> None:
    page.add("## Beside third-party models")
    if page.missing("eval"):
        return
    found = page.run.json("eval/baseline_comparison.json")
    if not found:
        page.add("None was asked for: `-p eval.baselines=gpt2,/path/to/model` measures others by "
                 "the same functions.")
        return
    page.origin()
    absent = [{"model": name, "": f"not available here: {reason}"}
              for name, reason in found.get("not available here", {}).items()]
    last = list(found["models"].values())[-1]
    named = [(task, metric) for task, family in FAMILIES.items() for metric in last.get(task, {})
             if family.leads(metric) and " minus " not in metric]
    lines = [{"task": task, "metric": metric,
              **{model: interval(tasks[task][metric]) for model, tasks in found["models"].items()
                 if metric in tasks.get(task, {})}} for task, metric in named]
    page.add(markdown_table(lines, ["task", "metric", *found["models"]]))
    if absent:
        page.add(markdown_table(absent))


def verifier(page: Page) -> None:
    from modern_llm.evaluation import charts

    page.add("## What the verifier is worth")
    if page.missing("verifier"):
        return
    found = page.run.results["verifier"]
    page.origin([page.run.record.get("config", {}).get("verifier", {}).get("problems", "")])
    telling = ("within-problem AUC", "pooled AUC", "calibration error", "weighted", "best_of_n")
    page.add(measures(row for row in found.get("table", []) if row["metric"].startswith(telling)))
    if found.get("rerank"):
        table = measured(found["rerank"])
        page.picture("rerank.png", charts.rerank_curves,
                     table, caption="The verifier stage's held-out problems: share right by way of "
                                    "choosing; bands are 95% intervals.")
        last = table[table["size"] == table["size"].max()]
        page.add(markdown_table(
            {"way to choose": row["method"].replace("_", " "), "answers": row["size"],
             "share right": interval(row), "n": row.get("n")} for row in last.to_dict("records")))
    if found.get("calibration"):
        page.picture("calibration.png", charts.reliability_curve, measured(found["calibration"]),
                     caption="Calibration: below the dashed line the verifier is too sure.")
    curves = page.run.json("eval/gsm8k_analysis.json").get("curves", {})
    for stage in dict.fromkeys(row["stage"] for rows in curves.values() for row in rows):
        rows = [{"method": method, **row} for method, line in curves.items()
                for row in line if row["stage"] == stage]
        page.picture(f"rerank_eval_{stage}.png", charts.rerank_curves,
                     measured(rows), caption=f"The evaluation's problems, samples of {stage}; "
                                             "pass: at least one of them is right.")
    for kind, mistakes in page.run.json("eval/verifier_mistakes.json").items():
        shown = [("score " + ("unknown" if one["score"] is None else f"{one['score']:.2f}"),
                  f"{one['question']}\n→ {one['answer']}\ngold: {one['gold']}") for one in mistakes]
        which = "wrong answers it likes most"
        if "positives" not in kind:
            which = "right answers it likes least"
        page.add(folded(f"{kind.capitalize()}: {which}", text_block(shown)))
