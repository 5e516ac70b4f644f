"""The pages of items: every number that is linked is that of the items behind the link, whatever
the texts hold; and what is published without items, or with those of another run.
"""

import gzip
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modern_llm.data.chat import Answer
from modern_llm.data.tasks import word_problems
from modern_llm.evaluation.ledger import item_rows, ledger_rows, write_ledger
from modern_llm.evaluation.measuring import told
from modern_llm.evaluation.written import mark_problems, problem_items
from modern_llm.report import item_pages
from modern_llm.report.item_pages import site_pages
from modern_llm.report.page import ITEM_FILES, Run, interval, markdown_table, number
from modern_llm.report.write import publish_results, without_copied_texts
from modern_llm.statistics import perplexity_of

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert("1")</script> | `code` ``` $x_1$ *a* &amp; \\frac\n```\n</table>'


def small_run(folder: Path) -> pd.DataFrame:
    """A run with two stages and a real ledger: problems whose answers were marked, texts, and
    reviews.
    """
    random, problems, found, answers = np.random.default_rng(0), word_problems("synthetic", "test",
                                                                               30), [], []
    for stage, skill in (("base", 0.3), ("sft", 0.8)):
        said = [Answer(p.answer if random.random() < skill else f"{HOSTILE} #### 1000", [0], [-1.0],
                       random.random() < 0.9) for p in problems]
        table = mark_problems(problems, said)
        nats, tokens = random.uniform(5, 50, 12), random.integers(5, 20, 12)
        found += [problem_items(stage, "problems", table),
                  item_rows(stage, "perplexity", "nats per token, synthetic", range(12), nats,
                            weight=tokens),
                  item_rows(stage, "sentiment", "accuracy", range(8), random.random(8).round(1))]
        answers.append(told(table.problem, [HOSTILE + p.question for p in problems],
                            [p.answer for p in problems], table.text).assign(
                                stage=stage, task="problems"))
    items = pd.concat(found, ignore_index=True)
    perplexity = [{"stage": stage, "task": "perplexity", "metric": "perplexity, synthetic",
                   "value": perplexity_of(of.value.sum() / of.weight.sum()), "low": 1.0,
                   "high": 99.0, "n": 12}
                  for stage, of in items[items.task == "perplexity"].groupby("stage")]
    (folder / "eval").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stages": {}, "config": {"eval": {
        "problems": "synthetic", "sentiment": "sst2"}, "dpo": {"sources": ["hh-rlhf"]}}}))
    ledger = write_ledger(folder / "eval", ledger_rows(items, {}, {}, extra=perplexity))
    items.to_csv(folder / "eval" / ITEM_FILES[0], index=False)
    pd.concat(answers).to_json(folder / "eval" / ITEM_FILES[1], orient="records", lines=True)
    return ledger


def report_of(ledger: pd.DataFrame) -> str:
    """A report with the tables of the published ones that have numbers of the ledger."""
    values = ledger[~ledger.metric.str.contains(" minus ")]
    lines: dict[tuple, dict] = {}
    for row in values.to_dict("records"):
        line = lines.setdefault((row["task"], row["metric"]),
                                {"task": row["task"], "metric": row["metric"]})
        line[{"base": "pretrained", "sft": "SFT"}[row["stage"]]] = interval(row)
    by = ledger.set_index(["stage", "task", "metric"])
    match, change = (by.loc["sft", "problems", name].to_dict()
                     for name in ("exact match", "exact match minus base"))
    first = {"result": "SFT: problems, exact match", "value": interval(match),
             "beside": "the pretrained model",
             "control": interval(by.loc["base", "problems", "exact match"].to_dict())}
    gain = {"stage": "SFT", "against": "pretrained", "task": "problems", "metric": "exact match",
            "value": match["value"], "change [95% interval]": interval(change)}
    return "\n\n".join(("# Report", markdown_table([first]), markdown_table(lines.values()),
                        markdown_table([gain]), "| no | table |", "The end."))


@pytest.fixture
def published(tmp_path):
    """The folder of reports, with one of a small run."""
    ledger = small_run(tmp_path / "runs" / "small")
    report = tmp_path / "report"
    publish_results(Run(tmp_path / "runs" / "small"), report / "results" / "small")
    (report / "small_report.md").write_text(report_of(ledger), encoding="utf-8")
    return report


class ItemPage(HTMLParser):
    """The numbers of a page of items by their ids, and every score that stands on it."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers, self.scores, self.said, self.tags = {}, [], {}, set()
        self.stage = self.anchor = ""
        self.rows = 0
        self.feed(text[text.index("```{raw} html"):])

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.rows += tag == "tr"
        if "data-best" in found:
            self.numbers[found["id"]], self.anchor = found, found["id"]
        elif "data-stage" in found:
            self.stage = found["data-stage"]
        elif "data-value" in found:
            self.scores.append((self.stage, found["data-metric"], found["data-group"],
                                float(found["data-value"]), float(found["data-weight"])))

    def handle_data(self, data):
        if self.anchor:
            self.said[self.anchor] = self.said.get(self.anchor, "") + data

    def handle_endtag(self, tag):
        if tag == "a":
            self.anchor = ""

    def mean(self, anchor: str) -> float:
        """What the items behind a number give, from what the page shows."""
        of = self.numbers[anchor]
        kept = [(value, weight) for stage, metric, group, value, weight in self.scores
                if (stage, metric) == (of["data-stage"], of["data-metric"])
                and of["data-group"] in ("", group)]
        return sum(value for value, _ in kept) / sum(weight for _, weight in kept)


def check_numbers(report: Path, run: str) -> int:
    """Every link of a run's report leads to a number that its page's items give again: how many."""
    pages, _ = site_pages(report)
    found = {name: ItemPage(text)
             for name, text in pages.items() if name.startswith(f"items/{run}/")}
    links = re.findall(r'href="(items/[^"#]+)\.html#([^"]+)">([^<]+)</a>',
                       pages[f"{run}_report.md"])
    checked = 0
    for page, anchor, shown in links:
        of, value = found[f"{page}.md"], found[f"{page}.md"].mean(anchor)
        if "tax" in anchor:
            value -= of.mean(re.sub(r"perplexity-tax(.*)-\w+$", r"nats-per-token\1-base", anchor))
        value = math.exp(value) if anchor.startswith("perplexity") else value
        said = of.said[anchor]
        assert said.split(" ")[0] == number(value), (page, anchor)
        # a change is of the number it leads to, and no other text of the report is a link
        checked += said == shown or said.split(" ")[0] == shown
    assert checked > 0.8 * len(links)
    return checked


def test_every_linked_number_is_that_of_its_items(published):
    assert check_numbers(published, "small") > 20


@pytest.mark.parametrize("run", sorted(
    path.parent.name for path in (ROOT / "report" / "results").glob(f"*/{ITEM_FILES[0]}.gz")))
def test_every_linked_number_of_the_published_reports(run):
    assert check_numbers(ROOT / "report", run) > 50


def test_what_is_linked(published):
    text = site_pages(published)[0]["small_report.md"]
    table = text.split("\n\n")
    link = lambda place: rf'<a class="items" href="items/small/problems\.html#{place}">'
    first = link("exact-match-sft") + r".*the pretrained model.*" + link("exact-match-base")
    assert re.search(first, table[2]), "value and control"
    assert len(re.findall(link("exact-match-level-1-(base|sft)"), text)) == 2
    assert len(re.findall(link("exact-match-sft"), table[4])) == 2, "value and change"
    assert text.endswith("| no | table |\n\nThe end.")


def test_texts_cannot_become_html_or_markdown(published):
    text = site_pages(published)[0]["items/small/problems.md"]
    raw = text[text.index("```{raw} html"):]
    assert raw.count("```") == 2 and "`" not in raw.removeprefix("```{raw} html").rstrip("`\n")
    assert raw.count("<script") == 1 and "alert(&quot;1&quot;)" in raw and "$" not in raw
    assert ItemPage(text).tags == {"div", "table", "thead", "tbody", "tr", "th", "td", "a", "p",
                                   "ul", "li", "details", "summary", "script"}


def test_large_tables_say_how_many_items_there_are(published, monkeypatch):
    assert "All 30, also in [items.csv.gz]" in site_pages(published)[0]["items/small/problems.md"]
    monkeypatch.setattr(item_pages, "MOST_ITEMS", 5)
    text = site_pages(published)[0]["items/small/problems.md"]
    assert "The first 5 of 30; all in [items.csv.gz](../../results/small/items.csv.gz)" in text
    assert ItemPage(text).rows < 30


def test_scores_alone_where_no_answers_were_published(published):
    (published / "results" / "small" / f"{ITEM_FILES[1]}.gz").unlink()
    text = site_pages(published)[0]["items/small/problems.md"]
    assert "exact match: 1" in text and "alert" not in text and ITEM_FILES[1] not in text


def test_without_items_the_report_stays_plain(published):
    (published / "results" / "small" / f"{ITEM_FILES[0]}.gz").unlink()
    assert site_pages(published) == ({}, ["small"])


def test_what_is_not_known_is_no_link(published):
    """A model that has diverged: its cell of the ledger is empty, and so is the report's."""
    place = published / "results" / "small"
    ledger = pd.read_csv(place / "ledger.csv", keep_default_na=False, dtype=str)
    ledger.loc[(ledger.stage == "sft") & (ledger.task == "perplexity"),
               ["value", "low", "high"]] = ""
    ledger.to_csv(place / "ledger.csv", index=False)
    report = published / "small_report.md"
    before = report.read_text(encoding="utf-8")
    report.write_text(re.sub(r"(\| perplexity \|.*\| )[^|]+ \|$", r"\1 |", before, flags=re.M),
                      encoding="utf-8")
    text = site_pages(published)[0]["small_report.md"]
    assert "-base" in text and not re.search("perplexity-synthetic-sft|></a>", text)
    assert text != before


def test_items_of_another_run_are_refused(published):
    place = published / "results" / "small" / f"{ITEM_FILES[0]}.gz"
    items = pd.read_csv(place, keep_default_na=False)
    first = (items.stage == "sft") & (items.metric == "exact match") & (items.value == 1)
    items.loc[first.idxmax(), "value"] = 0.0
    items.to_csv(place, index=False)
    with pytest.raises(ValueError, match=r"small/ledger\.csv has 0\.\d+ for sft, problems, exact "
                                         r"match, its items in items\.csv\.gz 0\.\d+: they are of "
                                         "two runs, write the report of one again"):
        site_pages(published)


@pytest.mark.parametrize("name", ITEM_FILES)
@pytest.mark.parametrize("damage", [lambda data: b"no gzip", lambda data: data[:len(data) // 2],
                                    lambda data: gzip.compress(b"a,b\n1,2\n")])
def test_damaged_items_are_named(published, name, damage):
    place = published / "results" / "small" / f"{name}.gz"
    place.write_bytes(damage(place.read_bytes()))
    with pytest.raises(ValueError, match="small has items that cannot be read .*write the report"):
        site_pages(published)


def test_the_same_items_are_published_as_the_same_bytes(published, tmp_path):
    run = Run(tmp_path / "runs" / "small")
    publish_results(run, tmp_path / "again")
    for name in ITEM_FILES:
        packed = (tmp_path / "again" / f"{name}.gz").read_bytes()
        assert packed == (published / "results" / "small" / f"{name}.gz").read_bytes()
        assert gzip.decompress(packed) == (run.folder / "eval" / name).read_bytes()
    assert json.loads(gzip.decompress(packed).splitlines()[0])["prompt"].startswith(HOSTILE)


def test_texts_of_other_peoples_data_sets_are_not_copied():
    row = lambda task, expected: {"stage": "sft", "task": task, "item": 7, "prompt": "A text.",
                                  "expected": expected, "answer": "positive"}
    told = "".join(json.dumps(row(*of)) + "\n" for of in (
        ("sentiment, asked", "negative"), ("problems", "#### 2"), ("preferences", "chosen: Yes.")))
    config = {"eval": {"problems": "synthetic", "sentiment": "sst2"},
              "dpo": {"sources": ["hh-rlhf", "synthetic"]}}
    found = [json.loads(line) for line in without_copied_texts(told, config).splitlines()]
    assert [(row["prompt"], row["expected"], row["answer"]) for row in found] == [
        ("sst2, item 7", "negative", "positive"), ("A text.", "#### 2", "positive"),
        ("hh-rlhf, item 7", "", "positive")]
    built_in = {"eval": {"problems": "synthetic", "sentiment": "synthetic"},
                "dpo": {"sources": ["synthetic"]}}
    assert without_copied_texts(told, built_in) == told
