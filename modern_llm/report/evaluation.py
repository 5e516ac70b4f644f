"""What the evaluation found, as sections of a report: results, changes, perplexity, sentiment,
contamination, baselines.

A plain module without torch; every section is made of the files that the evaluation left.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modern_llm.config import STAGES
from modern_llm.evaluation.families import FAMILIES, SAMPLED, is_aside
from modern_llm.evaluation.ledger import STAGE_NAMES, in_order
from modern_llm.report.page import (
    Page, bullets, interval, markdown_table, measures, model_name, number, quoted,
)
from modern_llm.report.verdicts import variants_at_chance

if TYPE_CHECKING:
    import pandas as pd

MOST_VARIANTS = 3  # of asking for a sentiment


def main_rows(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger without differences, costs, and what has a section of its own or is part of a
    measure (levels, kinds of errors); of a curve the largest @k only.
    """
    elsewhere = ["cost", *(family.name for family in FAMILIES.values() if family.section)]
    kept = ledger[~ledger.metric.str.contains(" minus ") & ~ledger.task.isin(elsewhere)
                  & ~is_aside(ledger)].copy()
    there = set(zip(kept.stage, kept.task, kept.metric))
    headlines = {(family.name, metric) for family in FAMILIES.values()
                 for metric in family.headline}
    part = [", " in row.metric and (row.task, row.metric) not in headlines
            and (row.stage, row.task, row.metric.rpartition(", ")[0]) in there
            for row in kept.itertuples()]
    kept = kept[[not (is_part and task != "perplexity") for is_part, task in zip(part, kept.task)]]
    sizes = kept.metric.str.extract(r"@(\d+)$")[0].astype(float)
    largest = sizes.groupby([kept.stage, kept.task]).transform("max")
    return kept[sizes.isna() | (sizes == largest)]


def shown(ledger: pd.DataFrame) -> pd.DataFrame:
    """The table with its stages called as prose calls them."""
    return ledger.assign(**{column: ledger[column].map(model_name)
                            for column in ("stage", "against") if column in ledger})


def results(page: Page) -> None:
    import pandas as pd

    from modern_llm.evaluation import charts
    from modern_llm.report import pictures

    page.add("## Results")
    ledger = page.run.ledger
    if page.missing("eval"):
        return
    page.origin()
    if ledger.empty:
        page.add(measures(page.run.results["eval"].get("table", [])))
        return
    ledger = shown(ledger)
    rows = main_rows(ledger)
    stages = list(dict.fromkeys(ledger.stage))
    by_measure = {}
    for row in rows.to_dict("records"):
        line = by_measure.setdefault((row["task"], row["metric"]),
                                     {"task": row["task"], "metric": row["metric"]})
        line[row["stage"]] = interval(row)
        line["n"] = int(row["n"]) if row["n"] == row["n"] else None
    panels = [row | {"panel": f"{task}\n{textwrap.fill(row['metric'], 24)}"}
              for task, family in FAMILIES.items()
              for row in rows[rows.task.eq(task) & rows.low.notna()].to_dict("records")
              if row["metric"].startswith(
                  family.headline if family.panels is None else family.panels)]
    if panels:
        page.picture("results.png", pictures.stage_results, pd.DataFrame(panels),
                     caption="Each measure by stage, with 95% intervals.")
    chosen = {name for one in page.results["verifier"] if "key" in one
              for name in one["key"][2:]}  # the first page has them beside each other
    page.add(markdown_table([line for line in by_measure.values() if line["metric"] not in chosen],
                            ["task", "metric", *stages, "n"]))
    page.add(f"All {len(ledger)} rows, with levels and kinds, are [ledger.csv]({page.files}/"
             f"ledger.csv), with one column a stage [comparison_table.csv]({page.files}/"
             f"comparison_table.csv); how each was measured is [protocols.csv]({page.files}/"
             "protocols.csv).")
    page.picture("levels.png", charts.levels_chart, ledger, stages, "level",
                 caption="Word problems by number of steps, greedy answers.")


def stage_gains(page: Page) -> None:
    from modern_llm.evaluation import charts

    page.add("## Stage gains")
    table = page.run.gains
    if table.empty:
        if not page.missing("eval"):
            page.add("`eval/stage_gains.csv` is empty: there was only one stage to measure.")
        return
    kept = shown(table[~is_aside(table)])
    page.add("Two stages are compared item by item. A change is *significant* if its paired 95% "
             "interval leaves out 0, McNemar's p is below 0.05 where items are right or "
             f"wrong, and there are at least six items; of {len(kept)} comparisons, about "
             f"{0.05 * len(kept):.0f} would be so by chance. The first page has the most telling, "
             "the table the other significant ones, and "
             f"[stage_gains.csv]({page.files}/stage_gains.csv) all.")
    page.origin()
    shares = kept[~kept.task.eq("perplexity")]
    labels = shares.stage + " − " + shares.against + ": " + shares.task + ", " + shares.metric
    if len(shares):
        page.picture("gains.png", charts.change_chart, labels.head(40), shares.head(40),
                     caption="Changes with their paired intervals; grey ones are not significant.")
    first = {one.get("key") for lines in page.results.values() for one in lines}
    rows = [row for row in table[~is_aside(table)].to_dict("records") if row["significant"]
            and not row["metric"].startswith(("easy ", "flexible "))  # exact match in other words
            and (row["stage"], row["task"], row["metric"], row["against"]) not in first]
    page.add(markdown_table(
        {"stage": model_name(row["stage"]), "against": model_name(row["against"]),
         **{name: row[name] for name in ("task", "metric", "value")},
         "change [95% interval]": interval({**row, "value": row["change"]}), "n": int(row["n"]),
         "McNemar p": "" if row["p"] != row["p"] else f"{row['p']:.2g}"}
        for row in rows) if rows else "No other change is significant.")


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
    ledger = page.run.ledger
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
    rows = shown(rows)
    page.add(by_stage(rows.to_dict("records"), dict.fromkeys(rows.stage)))


def sentiment(page: Page) -> None:
    import pandas as pd

    from modern_llm.evaluation import charts

    rows = of_task(page, "Sentiment by demonstrations", "sentiment", r"-shot, |^majority class$")
    if rows is None:
        return
    rows = shown(rows)
    shots = rows.join(rows.metric.str.extract(
        r"^accuracy, (?P<shots>\d+)-shot, (?P<method>\w+)$")).dropna(subset="shots")
    chance = variants_at_chance(rows)
    at = pd.Series([(row.stage, row.metric) in chance for row in shots.itertuples()], shots.index,
                   dtype=bool)
    if at.any():
        page.add(f"**At chance, {at.sum()} of {len(shots)} variants** (their accuracy less that of "
                 "the commonest label has an interval that reaches 0 or lies below): "
                 + ("every one of every stage." if at.all() else variants_named(shots, at)))
    if at.all():
        return
    page.add("The likelier label word behind `Sentiment:`, as it is (direct), less its prior "
             "(contextual, pmi), by how likely it makes the sentence (channel), and with the "
             "demonstrations in the order that uses the labels most evenly (ordered).")
    page.origin()
    page.picture("sentiment.png", charts.sentiment_chart, rows, list(dict.fromkeys(shots.stage)),
                 caption="Accuracy by number of demonstrations, with 95% intervals over sentences; "
                         "dashed: always the commonest label.")
    spread = rows[rows.metric.str.endswith(", over draws")].set_index(["stage", "metric"])
    lines = []
    best = shots[~at].sort_values("value", ascending=False, kind="stable")
    for row in best.head(MOST_VARIANTS).to_dict("records"):
        draws = (row["stage"], f"{row['metric']}, over draws")
        lines.append({
            "stage": row["stage"], "demonstrations": row["shots"], "method": row["method"],
            "accuracy": interval(row), "n": int(row["n"]),
            "worst and best draw": f"{number(spread.low[draws])} … {number(spread.high[draws])}"
                                   if draws in spread.index else "",
            "": "; ".join(part for part in row["protocol"].split("; ") if "constant answer" in part)
        })
    rest = len(best) - len(lines)
    page.add(f"The {len(lines)} highest of {len(best)} above chance, or not compared with it:"
             if rest else "Those above chance, or not compared with it:" if at.any() else "",
             markdown_table(lines))


def variants_named(shots: pd.DataFrame, at: pd.Series) -> str:
    """Which variants are at chance, stage by stage, on one line."""
    named = shots.shots + "-shot " + shots.method
    return "; ".join(
        f"{stage}: {'all' if at[of].all() else ', '.join(named[of][at[of]])}"
        for stage in dict.fromkeys(shots.stage[at]) for of in [shots.stage.eq(stage)]) + "."


MOST_SETS, MOST_EXAMPLES = 3, 1  # that are shown


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
    columns = ["source", "set", "items", "too_short", "hit", "hit_share", "found_share"]
    worst = table.sort_values("found_share", ascending=False, kind="stable")
    page.add(markdown_table(worst[columns].head(MOST_SETS).to_dict("records")))
    if len(worst) > MOST_SETS:
        page.add(f"The {MOST_SETS} that share most; all {len(worst)} are "
                 f"[contamination.csv]({page.files}/contamination.csv).")
    hits = worst[worst.found > 0].drop_duplicates("set").head(MOST_EXAMPLES)
    page.add(bullets(f"{row.set} in {row.source}: {quoted(row.example)}"
                     for row in hits.itertuples()))
    scores = page.run.frame("eval/clean_scores.csv")
    if len(scores):
        judge = STAGES["verifier"].called
        own = [stage for stage in in_order(scores.stage) if stage in STAGE_NAMES]
        last = [stage for stage in own if stage != judge][-1:]
        scores = (scores[scores.stage.isin(last) & scores.task.ne(SAMPLED) | scores.stage.eq(judge)]
                  if own else scores)
        page.add("The last model's scores on all items, and on those without any shared run. "
                 "Clean items are not a random part: short and easy ones share more, so where "
                 "items have groups, the last column mixes the clean ones as all are mixed. Of "
                 f"every stage: [clean_scores.csv]({page.files}/clean_scores.csv).")
        lines: dict[tuple, dict] = {}
        for row in scores.to_dict("records"):
            metric = row["metric"].removesuffix(f", {row['subset']}")
            line = lines.setdefault((row["stage"], row["task"], metric),
                                    {"stage": model_name(row["stage"]), "task": row["task"],
                                     "metric": metric})
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
              **{model_name(model): interval(tasks[task][metric])
                 for model, tasks in found["models"].items() if metric in tasks.get(task, {})}}
             for task, metric in named]
    page.add(markdown_table(lines, ["task", "metric", *map(model_name, found["models"])]))
    if absent:
        page.add(markdown_table(absent))
