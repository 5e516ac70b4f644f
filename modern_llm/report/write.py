"""`report/<run>_report.md` from the files of a run and nothing else: the same files give the same
text.

A plain module without torch, so that a report can be written on a machine that could not train.
Nothing that is there is overwritten.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from modern_llm.config import BUILT_IN
from modern_llm.data.synth import LABELS
from modern_llm.evaluation.families import FAMILIES
from modern_llm.files import write_text
from modern_llm.report.page import ITEM_FILES, PUBLISHED, Page, ReportError, Run
from modern_llm.report.sections import SECTIONS
from modern_llm.report.seeds import not_comparable, runs_of_other_seeds, summarise_seeds

LINK, FILES = "@figures@", "@results@"  # stand for the folders until the report has a name


def render(run: Run, pictures: Path, seeds: list[Run]) -> str:
    """The text of a report; its pictures are drawn into `pictures` and called by `LINK`, the
    numbers by `FILES`.
    """
    page = Page(run, pictures, LINK, FILES, seeds)
    for section in SECTIONS:
        section(page)
    return "\n\n".join(page.parts) + "\n"


def publish_results(run: Run, folder: Path, seeds: Sequence[Run] = ()) -> None:
    """Copy the numbers behind a report beside it: each stage's results.json, and what the
    evaluation measured; protocols.csv says how, made_from.csv names all files of the report,
    seeds.csv has every measure of every seed, and items.csv.gz and answers.jsonl.gz every item.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in run.results:
        shutil.copyfile(run.folder / stage / "results.json", folder / f"{stage}.json")
    for name in PUBLISHED:
        if (path := run.folder / "eval" / name).is_file():
            shutil.copyfile(path, folder / name)
    for name in ITEM_FILES:
        if (path := run.folder / "eval" / name).is_file():
            told = path.read_text(encoding="utf-8")
            if name == ITEM_FILES[1]:
                told = without_copied_texts(told, run.record["config"])
            # without the time, so that the same items give the same bytes
            (folder / f"{name}.gz").write_bytes(gzip.compress(told.encode(), mtime=0))
    ledger = run.ledger
    if len(ledger):
        protocols = ledger[~ledger.metric.str.contains(" minus ", regex=False)]
        write_text(folder / "protocols.csv",
                   protocols[["stage", "task", "metric", "protocol"]].to_csv(index=False))
    write_text(folder / "made_from.csv", made_from_table(run))
    if len(seeds) > 1:
        table = summarise_seeds([seed.folder for seed in seeds])
        write_text(folder / "seeds.csv", table.to_csv(index=False))


def without_copied_texts(answers: str, config: dict) -> str:
    """An answers.jsonl with the items of other people's data sets by number, not copied; of those
    a label stays.
    """
    table, changed = pd.read_json(StringIO(answers), lines=True, dtype=False), False
    for task in table.task.unique():
        section, _, name = (FAMILIES[task].data if task in FAMILIES else "").partition(".")
        value = config[section][name] if name else ()
        copied = [source for source in ([value] if isinstance(value, str) else value)
                  if source not in BUILT_IN]
        if copied:
            here, changed = table.task.eq(task), True
            table.loc[here, "prompt"] = [f"{', '.join(copied)}, item {item}"
                                         for item in table.item[here]]
            table.loc[here, "expected"] = table.expected[here].where(
                table.expected[here].isin(LABELS), "")
    return table.to_json(orient="records", lines=True, force_ascii=False) if changed else answers


def made_from(run: Run) -> list[dict]:
    """Every file that a report is made from, with the beginning of its SHA-256."""
    return [{"file": str(path.relative_to(run.folder)),
             "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
            for path in run.sources_of_the_report()]


def made_from_table(run: Run) -> str:
    """These files as the made_from.csv beside a report."""
    return pd.DataFrame(made_from(run)).to_csv(index=False)


def linked(text: str, name: str) -> str:
    """The text of a report with the folders of the report `name` in its links."""
    return text.replace(LINK, f"figures/{name}").replace(FILES, f"results/{name}")


def write_report(run: str, runs: Path, out: Path, force: bool = False,
                 seeds: Sequence[str] = ()) -> Path:
    """Write `out`/<run>_report.md, its pictures to `out`/figures/<run>/ and its numbers to
    `out`/results/<run>/.

    Args:
        run: name of the run.
        runs: the folder that holds it.
        out: where reports are kept.
        force: overwrite the report that is there. Without it a report that would say the same is
            kept, and another one gets the time in its name.
        seeds: names of runs to summarise as seeds of one recipe; those named <run>-seed… if empty.

    Returns:
        The path of the report.

    Raises:
        ReportError: there is no such run, or `seeds` are not comparable.
    """
    runs, out = Path(runs), Path(out)
    found = Run(runs / run)
    if not found.record:
        there = sorted(path.parent.name for path in runs.glob("*/run.json"))
        raise ReportError(f"run {run!r}: {found.folder} has no run.json; the runs in {runs} are "
                          f"{', '.join(there) or 'none'}")
    siblings = [Run(runs / name) for name in seeds]
    if seeds and (why := not_comparable(siblings)):
        raise ReportError(why)
    siblings = siblings or runs_of_other_seeds(run, runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as scratch:
            pictures = Path(scratch) / "figures"
            pictures.mkdir()
            text = render(found, pictures, siblings)
            ending = "" if force else free_ending(run, out, text)
            path = out / f"{run}_report{ending or ''}.md"
            if ending is not None:
                publish_results(found, out / "results" / f"{run}{ending}", siblings)
                replace_folder(pictures, out / "figures" / f"{run}{ending}")
                write_text(path, linked(text, f"{run}{ending}"))
            return path
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error.strerror}; choose another "
                          "output folder") from error


def write_again(run: Run, out: Path, called: str) -> Path:
    """Write the report of a run to the new folder `out`, as `write_report` does, with `called` for
    the folders of its pictures and numbers: the path of the report.
    """
    siblings = runs_of_other_seeds(run.folder.name, run.folder.parent)
    pictures = out / "figures" / called
    pictures.mkdir(parents=True)
    text = render(run, pictures, siblings)
    publish_results(run, out / "results" / called, siblings)
    ending = called.removeprefix(run.folder.name)
    return write_text(out / f"{run.folder.name}_report{ending}.md", linked(text, called))


def free_ending(run: str, out: Path, text: str) -> str | None:
    """What to add to the names of a report so that none is overwritten; None if the one that is
    there says the same.
    """
    path = out / f"{run}_report.md"
    if not path.is_file():
        return ""
    if path.read_text(encoding="utf-8") == linked(text, run):
        return None if (out / "figures" / run).is_dir() else ""
    stamp = datetime.datetime.now().strftime("-%Y%m%d-%H%M%S")
    endings = (stamp if count == 1 else f"{stamp}-{count}" for count in itertools.count(1))
    return next(ending for ending in endings if not (out / f"{run}_report{ending}.md").exists())


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old`."""
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    shutil.move(new, old)


# ---- one report beside another -------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A file of the report, made again: how it was compared, and "" or what differs."""

    file: str
    how: str  # "bytes", or "pixels" of a picture
    difference: str


def compare_reports(stored: dict[str, Path], again: dict[str, Path]) -> list[Compared]:
    """Two reports, file by file: the bytes of texts and tables, the pixels of pictures."""
    rows = []
    for name in sorted({**stored, **again}):
        how = "pixels" if name.endswith(".png") else "bytes"
        if name not in again:
            difference = "is in the capsule's report, and was not made again"
        elif name not in stored:
            difference = "was made again, and is not in the capsule's report"
        elif stored[name].read_bytes() == again[name].read_bytes():
            difference = ""
        else:
            difference = (_other_pixels(stored[name], again[name]) if how == "pixels"
                          else _other_line(stored[name], again[name]))
        rows.append(Compared(name, how, difference))
    return rows


def _other_line(stored: Path, again: Path) -> str:
    """The first line in which two texts differ."""
    lines = [path.read_text(encoding="utf-8", errors="replace").split("\n")
             for path in (stored, again)]
    number = next((number for number, pair in enumerate(zip(*lines), 1) if len(set(pair)) > 1),
                  1 + min(map(len, lines)))
    return f"differs, first in line {number}"


def _other_pixels(stored: Path, again: Path) -> str:
    """In what two pictures differ; "" if only in how they are packed."""
    from matplotlib.image import imread

    try:
        one, other = imread(stored), imread(again)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow: not a PNG
        return f"differs, and cannot be read as a picture ({type(error).__name__})"
    if one.shape != other.shape:
        sizes = (f"{image.shape[1]} × {image.shape[0]}" for image in (one, other))
        return f"differs: {' pixels, now '.join(sizes)}"
    count = int((one != other).reshape(*one.shape[:2], -1).any(-1).sum())
    return f"differs in {count} pixel{'s' * (count > 1)}" if count else ""
