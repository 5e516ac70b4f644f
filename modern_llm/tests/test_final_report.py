"""report/final_report.md: in step with what is published, every number in a committed file, and
bullets only of what a run has.
"""

import csv
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modern_llm.files import CHECKOUT
from modern_llm.report.final import final_report, more_tokens
from modern_llm.report.findings import findings, sentences, told
from modern_llm.report.first_page import first_page
from modern_llm.report.page import Page
from modern_llm.report.published import PublishedRun, published_runs
from modern_llm.report.sections import machine
from modern_llm.report.verdicts import BETTER, WORSE
from modern_llm.statistics import proportion_interval
from modern_llm.tests.test_first_page import run_with

REPORT = CHECKOUT / "report"
PAGE = (REPORT / "final_report.md").read_text(encoding="utf-8")
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
ROW = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\](?: of ([\d,]+)(?!\w))?"
                 rf"(?:(?<=\]), p = ({NUMBER}))?")


# ---- numbers, looked up without the writer ---------------------------------------------------


def rows_in(value: object) -> list[dict]:
    """Every dictionary with an interval in a JSON value."""
    if isinstance(value, list):
        return [row for item in value for row in rows_in(item)]
    if isinstance(value, dict):
        return [value] * ("low" in value) + rows_in(list(value.values()))
    return []


def leaves(value: object) -> list[float]:
    """Every number in a JSON value that is no part of a row with an interval."""
    if isinstance(value, dict):
        return [] if "low" in value else leaves(list(value.values()))
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


class Committed:
    """The numbers of some files: rows with intervals, numbers alone, and numbers as written."""

    def __init__(self, paths: list[Path]):
        self.rows, self.alone, self.written, self.text = [], [], set(), ""
        for path in paths:
            text = path.read_text(encoding="utf-8")
            self.text += text
            self.written |= {found.lstrip("-+").replace(",", "")
                             for found in re.findall(NUMBER, text)}
            if path.suffix == ".json":
                self.rows += rows_in(json.loads(text))
                self.alone += leaves(json.loads(text))
            elif path.suffix == ".csv":
                self.rows += list(csv.DictReader(text.splitlines()))

    @functools.cache
    def has_row(self, *said: str) -> bool:
        """A row of this value or change, both ends, and its n and p, where they are said."""
        names = (("low", said[1]), ("high", said[2]), ("n", said[3]), ("p", said[4]))
        return any(any(same(said[0], row.get(name)) for name in ("value", "change"))
                   and all(not text or same(text, row.get(name)) for name, text in names)
                   for row in self.rows)

    @functools.cache
    def has(self, text: str) -> bool:
        plain = text.lstrip("-+").replace(",", "")
        return plain in self.written or any(same(text, number) for number in self.alone)


def same(text: str, number: object) -> bool:
    """Whether a number, rounded as the text is, is the text."""
    try:
        found, said = float(number), float(text.replace(",", ""))
    except (TypeError, ValueError):
        return False
    if "e" in text:
        return f"{found:.{len(text.partition('e')[0].replace('.', '').lstrip('-')) - 1}e}" == (
            f"{said:.{len(text.partition('e')[0].replace('.', '').lstrip('-')) - 1}e}")
    if "." not in text and said < 10_000:
        return found == said
    return abs(found - said) <= 0.5001 * 10.0 ** -len(text.partition(".")[2])


def sections(page: str) -> list[tuple[str, str]]:
    """Title and text of every part of the page; the numbers of the head are none."""
    return [tuple(part.split("\n", 1)) for part in page.split("\n## ")[1:]]


def files_of(title: str) -> list[Path]:
    """Where the numbers of a section must be: a run's in its own files and report, the others' in
    any published file, the diary's titles in the diary.
    """
    everything = sorted(path for path in (REPORT / "results").rglob("*")
                        if path.suffix in (".json", ".csv"))
    pages = [path for path in REPORT.glob("*.md") if path.name != "final_report.md"]
    if not title.startswith("`"):
        return [REPORT / "log.md"] if "diary" in title else [
            *everything, *(page for page in pages if page.name != "log.md")]
    name = title.strip("`")
    own = [path for path in everything if path.parent.name == name
           or path.stem.removeprefix("pretrain_") == name]
    return own + [page for page in pages if page.name == f"{name}_report.md"]


@functools.cache
def committed_of(title: str) -> Committed:
    return Committed(files_of(title))


def lost(page: str) -> list[str]:
    """Numbers of a page that are in none of the files of their section."""
    missing = []
    for title, text in sections(page):
        committed = committed_of(title)
        # addresses, chapters, and what the rules call chance and no tax
        text = re.sub(r"\]\([^)]*\)|\bchapter \d+|\b0(\.5)?, chance|\bchance, 0\.500|"
                      r"\bno tax, 1\b", "]", text)
        missing += [match[0] for match in ROW.finditer(text)
                    if not committed.has_row(*match.groups())]
        whole = re.compile(r"(?<=git checkout )\w+|\d{4}-\d\d-\d\d")  # commits and dates
        missing += [found for found in whole.findall(text) if found not in committed.text]
        rest = whole.sub("", ROW.sub("", text))
        missing += [text for text in re.findall(rf"(?<![\w.-]){NUMBER}(?!\w)", rest)
                    if not committed.has(text)]
    return missing


def test_every_number_is_in_a_committed_file():
    assert sections(PAGE)[0][0] == "`local-smoke`" and len(ROW.findall(PAGE)) > 90
    assert lost(PAGE) == []


def test_a_changed_number_is_found():
    """One digit of one number at a time: a row's value, its n, a count of tokens, a commit."""
    rows = [match[0] for match in ROW.finditer(PAGE)]
    changed = lambda text, place: (text[:place] + str((int(text[place]) + 3) % 10)
                                   + text[place + 1:])
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        digits = [place for place, sign in enumerate(row) if sign.isdigit()]
        for place in (digits[0], digits[len(digits) // 2], digits[-1]):
            assert lost(PAGE.replace(row, changed(row, place), 1)), row
    tokens = re.search(r"[\d,]{7,} tokens", PAGE)[0]
    commit = re.search(r"git checkout \w+", PAGE)[0]
    for text, place in ((tokens, 0), (commit, re.search(r"\d", commit).start())):
        assert lost(PAGE.replace(text, changed(text, place), 1)), text
    counted = next(row for row in rows if " of " in row)
    assert lost(PAGE.replace(counted, counted + "7", 1))


# ---- the page --------------------------------------------------------------------------------


def test_the_page_is_what_is_published():
    script = CHECKOUT / "scripts" / "final_report.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
    committed = subprocess.run(["git", "ls-files", "report/results"], cwd=CHECKOUT,
                               capture_output=True, text=True).stdout
    runs = [run.name for run in published_runs(REPORT / "results")
            if f"report/results/{run.folder.name}" in committed]
    named = re.findall(r"^## `(.+)`$", PAGE, re.M)
    assert set(runs) <= set(named) and len(named) >= 5
    assert len(PAGE.splitlines()) <= 160


def test_an_unpublished_run_leaves_the_page_alone(tmp_path):
    shutil.copytree(REPORT, tmp_path / "report", ignore=shutil.ignore_patterns("figures"))
    report = tmp_path / "report"
    shutil.copytree(report / "results" / "local-cpu-14min", report / "results" / "mine")
    shutil.copyfile(report / "local-cpu-14min_report.md", report / "mine_report.md")
    named = re.findall(r"^## `(.+)`$", PAGE, re.M)
    assert final_report(report, named) == PAGE
    assert "## `mine`" in final_report(report)


@pytest.mark.parametrize("gone", ["ledger.csv", "stage_gains.csv", "pretrain.json", "sft.json",
                                  "verifier.json", "attention.json", "contamination.csv", "report"])
def test_what_a_run_has_not_measured_has_no_bullet(tmp_path, gone):
    source = REPORT / "results" / "local-smoke"
    shutil.copytree(source, tmp_path / "results" / "local-smoke")
    if gone != "report":
        (tmp_path / "results" / "local-smoke" / gone).unlink()
        shutil.copyfile(REPORT / "local-smoke_report.md", tmp_path / "local-smoke_report.md")
    text = final_report(tmp_path)
    assert ("## `local-smoke`" in text) == (gone != "report")
    stage = gone.removesuffix(".json")
    word = {"pretrain": "pretrain on", "sft": "sft on", "verifier": "the stage's held-out problems",
            "attention": "induction", "ledger.csv": "sentiment, accuracy",
            "stage_gains.csv": "SFT: instructions, exact match"}.get(stage)
    if word:
        kept = next((line for line in text.splitlines() if word in line), "")
        assert not kept or gone == "stage_gains.csv" and "**Measured, no control:**" in kept
    assert "nan" not in text and "None" not in text
    assert "## Faults" not in text and "## Speed" not in text


def test_nothing_published_is_a_short_page(tmp_path):
    (tmp_path / "results" / "empty").mkdir(parents=True)
    text = final_report(tmp_path)
    assert text.startswith("# Final report") and "## `" not in text


# ---- the rules -------------------------------------------------------------------------------


def run_of(folder: Path, **results: dict) -> PublishedRun:
    folder.mkdir(parents=True)
    for stage, found in results.items():
        (folder / f"{stage}.json").write_text(json.dumps(found))
    return PublishedRun(folder)


def verifier_table(*controls: tuple[str, int]) -> dict:
    return {"kind": "generator", "table": [
        {"metric": metric, **proportion_interval(right, 120)} for metric, right in controls],
        "rerank": [{"method": "weighted_vote", "size": 16, **proportion_interval(76, 120)}]}


def test_a_gain_stands_beside_the_control_that_a_row_names(tmp_path):
    found = verifier_table(("greedy exact match, the generator trained on", 96),
                           ("majority@16, the generator trained on", 40))
    one, other = findings(run_of(tmp_path / "with", verifier=found))
    assert "the stage's held-out problems" in one["what"]
    assert (one["beside"], told(one), one["said"]) == (
        "the generator trained on the same further problems, one greedy answer", "below", WORSE)
    assert other["beside"].endswith("same further problems, majority of 16")
    assert (told(other), other["said"]) == ("above", BETTER)
    assert "(not paired)" in sentences([other])[0]
    assert findings(run_of(tmp_path / "without", verifier=verifier_table())) == []
    found["table"].append({"metric": "weighted_vote@16 - majority@16, the generator trained on",
                           "value": 0.3, "low": 0.2, "high": 0.4, "n": 120})
    said = sentences(findings(run_of(tmp_path / "paired", verifier=found)))
    assert any("difference +0.300 [0.200, 0.400]" in text for text in said)


def test_more_tokens_is_said_only_where_every_step_is_told(tmp_path):
    row = lambda value: {"metric": "bits per byte, text", "value": value, "low": value - 0.05,
                         "high": value + 0.05, "n": 40, "protocol": "the same"}
    runs = lambda *values: [run_of(tmp_path / str(values) / str(place), pretrain={
        "table": [row(value)], "tokens": place + 1, "parameters": 9})
        for place, value in enumerate(values)]
    assert len(more_tokens(runs(2.0, 1.5, 1.0))) == 1
    assert more_tokens(runs(2.0, 1.99)) == [] and more_tokens(runs(1.0)) == []


def test_a_report_of_today_tells_its_facts(tmp_path):
    run = run_with(tmp_path / "runs" / "new", [], pretrain={"table": [], "steps": 3, "tokens": 5})
    record = json.loads((run.folder / "run.json").read_text())
    record |= {"seed": 4, "threads": 2, "device_name": "x86_64", "git_commit": "abc123+changes",
               "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"}}
    for entry in record["stages"].values():
        entry["started"] = "2026-11-28T01:02:03+00:00"
    (run.folder / "run.json").write_text(json.dumps(record))
    page = Page(type(run)(run.folder), tmp_path, "figures", "results")
    first_page(page)
    machine(page)
    published = run_of(tmp_path / "results" / "new", pretrain={"table": [], "tokens": 5})
    (tmp_path / "new_report.md").write_text("\n\n".join(page.parts) + "\n")
    facts = published.facts
    assert published.report.is_file() and facts.pop("parameters").replace(",", "").isdigit()
    assert facts.pop("changes").startswith("The tree had changes")
    assert facts == {"preset": "lesson", "seed": "4", "minutes": "5.0", "begun": "2026-11-28",
                     "device": "cpu", "machine": "x86_64", "threads": "2", "python": "3.11.7",
                     "torch": "2.13.0+cpu"}
    assert published.minutes["pretrain"] == "1.000"
    assert published.commands[0] == "git checkout abc123"
    assert published.commands[1].startswith("modern-llm run --preset lesson --run new --stage ")
