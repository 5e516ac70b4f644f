"""A click on a number shows its items: pages of what was asked, answered and scored, from the items
published beside a report, and the report with its numbers linked to them.

The site's builder writes them; no server, no JavaScript is needed to read them. No torch.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from modern_llm.evaluation.families import FAMILIES
from modern_llm.evaluation.ledger import in_order, read_ledger
from modern_llm.report.page import ITEM_FILES, interval, model_name, number
from modern_llm.report.verdicts import less_is_better
from modern_llm.statistics import perplexity_of

MOST_ITEMS = 1000  # on one page
SHORT = 400  # letters of an answer that are shown without a click
Key = tuple[str, str, str]  # stage, task, metric
SCRIPT = '<script src="../../../_static/items.js" defer></script>'


class Published:
    """The ledger of a published run with the items it was made from.

    Attributes:
        ledger: (stage, task, metric) -> its row.
        items: (stage, task, metric) -> value, weight and group of each item.
        asked: (task, item) -> prompt and expected answer; said: (stage, task, item) -> the answer.
        places: (stage, task, metric) -> the page and the anchor of its items.

    Raises:
        ValueError: a file cannot be read, or a number is not that of its items.
    """

    def __init__(self, folder: Path):
        self.name, self.has_answers = folder.name, (folder / f"{ITEM_FILES[1]}.gz").is_file()
        rows = read_ledger(folder).to_dict("records")
        self.ledger: dict[Key, dict] = {(r["stage"], r["task"], r["metric"]): r for r in rows}
        try:
            items = pd.read_csv(folder / f"{ITEM_FILES[0]}.gz", keep_default_na=False,
                                na_values={"value": [""]})
            answers = (pd.read_json(folder / f"{ITEM_FILES[1]}.gz", lines=True, dtype=False)
                       .to_dict("records") if self.has_answers else [])
            self.items = {key: part.set_index("item")[["value", "weight", "group"]]
                          for key, part in items.groupby(["stage", "task", "metric"], sort=False)}
            self.asked = {(r["task"], r["item"]): (r["prompt"], r["expected"]) for r in answers}
            self.said: dict[tuple, str] = {}
            for row in answers:
                key = (row["stage"], row["task"], row["item"])
                before = f"{self.said[key]}\n\n" if key in self.said else ""
                self.said[key] = before + row["answer"]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} has items that cannot be read ({error}): write the report "
                             "of the run again, or delete them") from error
        self.parts = {key: part for key, row in self.ledger.items()  # NaN: of a model that diverged
                      if row["value"] == row["value"] and (part := self.items_of(*key))}
        self.places: dict[Key, str] = {}
        for key, (metric, _, value) in self.parts.items():
            told = self.ledger[key]["value"]
            if not math.isclose(value, told, rel_tol=1e-9, abs_tol=1e-12):
                raise ValueError(f"{folder / 'ledger.csv'} has {told} for {', '.join(key)}, its "
                                 f"items in {ITEM_FILES[0]}.gz {value}: they are of two runs, "
                                 "write the report of one again")
            stage, task, name = key
            shown = name.partition(" minus ")[0]
            self.places[key] = f"{self.page_of(task, metric)}.html#{slug(f'{shown} {stage}')}"

    def items_of(self, stage: str, task: str, metric: str) -> tuple[str, str, float] | None:
        """The items' metric and group that a metric of the ledger is made of, and its value made of
        them again: a mean, that of a group, a difference of two stages, or the perplexity; None if
        it is made of something else.
        """
        if metric.startswith("perplexity"):
            kind = metric.removeprefix("perplexity")
            of = self.items_of(stage, task, "nats per token" + (
                f"{kind.removeprefix(' tax')} minus base" if kind.startswith(" tax") else kind))
            return of and (*of[:2], perplexity_of(of[2]))
        name, _, against = metric.partition(" minus ")
        whole, group = name, ""
        if (stage, task, name) not in self.items:
            whole, _, group = name.rpartition(", ")
        part, other = self.items.get((stage, task, whole)), None
        if part is not None and group:
            part = part[part.group.eq(group)]
        if against:
            other = self.items.get((against, task, whole))
        if part is None or not len(part) or against and other is None:
            return None
        values = part.value if other is None else (part.value - other.value).dropna()
        return whole, group, float(values.sum() / part.weight[values.index].sum())

    def page_of(self, task: str, metric: str) -> str:
        """The name of the page of an items' metric: texts, which weigh by their tokens, have one
        each, all others of a task one together.
        """
        weighs = any(part.weight.ne(1).any() for (_, of, name), part in self.items.items()
                     if (of, name) == (task, metric))
        return slug(f"{task} {metric}" if weighs else task)


def slug(text: str) -> str:
    """A text as part of an address."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- the pages -----------------------------------------------------------------------------------


def item_pages(of: Published) -> dict[str, str]:
    """The pages of a run's items, by name, as Markdown around HTML."""
    pages: dict[str, tuple[str, list[str]]] = {}
    for _, task, metric in of.items:
        metrics = pages.setdefault(of.page_of(task, metric), (task, []))[1]
        metrics += [metric] * (metric not in metrics)
    return {name: _page(of, name, task, metrics) for name, (task, metrics) in pages.items()}


def _page(of: Published, page: str, task: str, metrics: Sequence[str]) -> str:
    stages = in_order(stage for stage, which, metric in of.items
                      if which == task and metric in metrics)
    weighs = page != slug(task)
    title = f"{task}, {metrics[0]}" if weighs else task
    numbers = [key for key, (metric, *_) in of.parts.items()
               if key[1] == task and metric in metrics and " minus " not in key[2]]
    ids = list(dict.fromkeys(item for stage in stages for metric in metrics
                             if (stage, task, metric) in of.items
                             for item in of.items[stage, task, metric].index))
    files = " and ".join(f"[{name}.gz](../../results/{of.name}/{name}.gz)"
                         for name in ITEM_FILES[:1 + of.has_answers])
    protocols = dict.fromkeys(of.ledger[key]["protocol"] for key in numbers)
    some = f"The first {MOST_ITEMS:,} of {len(ids):,}; all" if len(ids) > MOST_ITEMS else (
        f"All {len(ids):,}, also")
    lines = "\n".join(_item(of, task, item, stages, metrics, weighs) for item in ids[:MOST_ITEMS])
    heads = "".join(f"<th>{_text(name)}</th>" for name in (
        "item", *(() if weighs else ("asked", "expected")), *map(model_name, stages)))
    raw = (f'{_numbers(of, numbers, stages)}\n<div class="items-table pre">'
           f'<table class="items">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>'
           f"</table></div>\n{SCRIPT}")
    return (f"---\norphan: true\nnosearch: true\n---\n\n# `{of.name}`: items of {title}\n\n"
            f"What the numbers of [the report](../../{of.name}_report.md) are made of. {some} in "
            f"{files}. Each stage beside the others"
            + (": nats per token, and the tokens that it weighs by.\n\n" if weighs else
               ", with what it answered and how that was scored. Texts of other people's data "
               "sets are not copied here: their items have the number they have there.\n\n")
            + "".join(f"* {_text(text)}\n" for text in protocols if text)
            + f"\n```{{raw}} html\n{raw}\n```\n")


def _numbers(of: Published, keys: Sequence[Key], stages: Sequence[str]) -> str:
    """The table of a page's numbers, each with the place that the report's links lead to."""
    lines: dict[str, dict[str, str]] = {}
    for key in keys:
        metric, group, _ = of.parts[key]
        stage, task, name = key
        lines.setdefault(name, {})[stage] = (
            f'<a id="{of.places[key].partition("#")[2]}" href="#{of.places[key].partition("#")[2]}"'
            f' data-stage="{_text(stage)}" data-metric="{_text(metric)}" '
            f'data-group="{_text(group)}" data-best="{best(task, metric)}">'
            f"{_text(interval(of.ledger[key]))}</a> (n = {of.ledger[key]['n']})")
    rows = "\n".join(
        f"<tr><th>{_text(name)}</th>"
        + "".join(f"<td>{cells.get(stage, '')}</td>" for stage in stages) + "</tr>"
        for name, cells in lines.items())
    heads = "".join(f"<th>{_text(model_name(stage))}</th>" for stage in stages)
    return (f'<div class="items-table"><table class="items-numbers">\n<thead><tr><th></th>{heads}'
            f"</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>")


def best(task: str, metric: str) -> int:
    """The score of an item that is right."""
    return 0 if less_is_better(task) or metric.startswith("error, ") else 1


def _item(of: Published, task: str, item: object, stages: Sequence[str], metrics: Sequence[str],
          weighs: bool) -> str:
    """An item as a row: what was asked, and of each stage the answer and its scores."""
    cells, groups = [], []
    leads = FAMILIES[task].leads if task in FAMILIES else lambda metric: False
    for stage in stages:
        scores, wrong = {}, False
        for metric in metrics:
            part = of.items.get((stage, task, metric))
            if part is None or item not in part.index:
                continue
            value, weight, group = part.loc[item]
            groups += [group] * (group not in ("", *groups))
            said = f"{number(value / weight)} × {int(weight)}" if weighs else (
                f"{metric}: {value:.3g}")
            scores[metric] = (f'<li data-metric="{_text(metric)}" data-value="{float(value)!r}" '
                              f'data-weight="{float(weight)!r}" data-group="{_text(group)}">'
                              f"{_text(said)}</li>")
            wrong |= bool(not weighs and leads(metric) and value != best(task, metric))
        first = [metric for metric in scores if leads(metric)] or list(scores)[:1]
        rest = "".join(line for metric, line in scores.items() if metric not in first)
        cells.append(
            f'<td data-stage="{_text(stage)}"{" class=wrong" * wrong}>'
            + _answer(of.said.get((stage, task, item), ""))
            + (f"<ul>{''.join(scores[metric] for metric in first)}</ul>" if first else "")
            + (f"<details><summary>other scores</summary><ul>{rest}</ul></details>" if rest else "")
            + "</td>")
    asked = "" if weighs else "".join(f"<td>{_answer(text)}</td>"
                                      for text in of.asked.get((task, item), ("", "")))
    return f"<tr><th>{_text(', '.join((str(item), *groups)))}</th>{asked}{''.join(cells)}</tr>"


def _answer(text: str) -> str:
    """A text, a long one behind its beginning."""
    if len(text) <= SHORT:
        return f"<p>{_text(text)}</p>" if text else ""
    return (f"<details><summary>{_text(text[:SHORT // 2])} […]</summary><p>{_text(text)}</p>"
            "</details>")


def _text(text: object) -> str:
    """A text that is neither HTML nor Markdown."""
    return re.sub(r"[`*_$\\\n]", lambda found: f"&#{ord(found[0])};", html.escape(str(text)))


# ---- the report ----------------------------------------------------------------------------------


def linked_report(text: str, of: Published) -> str:
    """A report with every number of its tables that has items as a link to them. A cell is linked
    if it says, to the letter, what the ledger's row of its stage, task and metric does.
    """
    keys = {(model_name(stage), task, metric): (stage, task, metric)
            for stage, task, metric in of.places}
    labels = {label: key for key in keys for label in (f"{key[0]}: {key[1]}, {key[2]}",
                                                       f"{key[0]}: {key[2]}")}
    called = {model_name(stage): stage for stage, *_ in of.ledger}
    tasks, head, lines = list(dict.fromkeys(task for _, task, _ in keys)), [], []
    for line in text.split("\n"):
        if not line.startswith("| "):
            head = head if line.startswith("|--") else []
            lines.append(line)
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not head:
            head = cells
        else:
            row = dict(zip(head, cells))
            metric, against = row.get("metric", ""), row.get("against", "")
            label = row.get("result", "").replace("pretraining:", "pretrained:")
            beside = next((stage for stage in called
                           if stage in row.get("beside", "").partition(",")[0].split()), "")
            changed = []
            for name, cell in row.items():
                stage, task, what = labels.get(label, (row.get("stage", name), row.get("task"),
                                                       metric))
                if name == "control":
                    stage = beside
                elif name.startswith("change"):
                    what += f" minus {called.get(against, against)}"
                found = filter(None, (keys.get((stage, of_task, what))
                                      for of_task in ([task] if task else tasks)))
                changed.append(_linked(cell, next(found, None), of))
            line = f"| {' | '.join(changed)} |" if changed != cells else line
        lines.append(line)
    first = next(place for place, line in enumerate(lines) if line.startswith("# ")) + 1
    lines[first:first] = ["", "A number that is a link opens its items: what was asked, what each "
                              "stage answered, and how that was scored."]
    return "\n".join(lines)


def _linked(cell: str, key: Key | None, of: Published) -> str:
    """The cell as a link, if it says what the ledger's row `key` does."""
    row = of.ledger.get(key, {})
    said = next((said for said in (interval(row), number(row.get("value")))
                 if key and cell in (said, f"{said} (n = {row['n']})")), None)
    return cell if said is None else (
        f'<a class="items" href="items/{of.name}/{of.places[key]}">{said}</a>'
        + cell.removeprefix(said))


def site_pages(report: Path) -> tuple[dict[str, str], list[str]]:
    """The pages of a published folder, by their places in it: every report whose run has its items
    beside it, and the items; and the names of the runs that have none.
    """
    pages, without = {}, []
    for ledger in sorted((report / "results").glob("*/ledger.csv")):
        written = report / f"{ledger.parent.name}_report.md"
        if not written.is_file():
            continue
        if not (ledger.parent / f"{ITEM_FILES[0]}.gz").is_file():
            without.append(ledger.parent.name)
            continue
        of = Published(ledger.parent)
        pages[written.name] = linked_report(written.read_text(encoding="utf-8"), of)
        pages |= {f"items/{of.name}/{name}.md": text for name, text in item_pages(of).items()}
    return pages, without
