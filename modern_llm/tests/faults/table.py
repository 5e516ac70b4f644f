"""Bad luck on purpose, counted: `python -m modern_llm.tests.faults` injects every fault into real
training processes and writes the table.

Each scenario returns one row of it. What survives ends with the weights of an undisturbed run, bit
for bit, or was refused before it could do harm. Linux only; see `disturb` for how it is done.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import json
import multiprocessing
import os
import pickle
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from modern_llm.config import DataConfig
from modern_llm.data.corpus import build_token_cache
from modern_llm.data.tokens import make_tokenizer
from modern_llm.files import CHECKOUT, cached_frame, read_json, sha256, write_json, write_text
from modern_llm.messages import StageError
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model
from modern_llm.runs.locks import RunLock
from modern_llm.runs.stage import begin
from modern_llm.tests.faults.disturb import (
    MODEL, CannotInject, Row, forked, paused, prepared, trainer,
)
from modern_llm.tests.faults.training import (
    damaged_checkpoint, every_operation, flip, full_disk, lost_device, signalled, small_disk,
)


def two_at_once(place: Path, times: int) -> Row:
    """Two processes take one run's lock at the same moment; every second time they find what a
    killed owner left.
    """
    context, folder = multiprocessing.get_context("fork"), place / "it"
    # leaves its lock behind, as a killed process does
    forked(lambda: RunLock(folder, "stage pretrain").take() and {})
    left = (folder / ".lock").read_bytes()
    barrier, wins = context.Barrier(2), context.Array("i", 2 * times)

    def contend(number: int) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for i in range(times):
            if i % 2 and number == 0:
                folder.mkdir(exist_ok=True)
                (folder / ".lock").write_bytes(left)
            barrier.wait(60)
            lock = RunLock(folder, "stage sft")
            try:
                lock.take()
                wins[number * times + i] = 1
            except StageError as error:
                assert "is in use: stage sft, by process" in str(error)
            barrier.wait(60)
            lock.release()
            barrier.wait(60)

    pair = [context.Process(target=contend, args=(number,)) for number in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    one_owner = (sum(wins[i] + wins[times + i] == 1 for i in range(times))
                 if not any(process.exitcode for process in pair) else 0)
    return Row("two processes start on one run at the same moment", times, one_owner, 0,
               "one works, the other is refused at once and told whose the run is")


# ---- what is read --------------------------------------------------------------------------------


def begin_stage(runs: Path, **values) -> dict:
    """Begin the pretraining stage as its notebook does."""
    names = {"preset": "lesson", "run": "it", "seed": 0, "max_steps": None, "max_minutes": None,
             "device": "cpu", "overrides": "",
             "output_dir": str(runs), "resume": False, "force": False, **values}
    begin("pretrain", {**names, "In": []}, list(names))
    return {}


def changed_data(place: Path) -> Row:
    """A file of text is changed, extended or removed between two sessions of a run; and changed
    back.
    """
    path, survived = place / "mine.txt", 0
    changes = (lambda text: text.replace("3", "4", 1), lambda text: text + "One more.\n",
               lambda text: None)
    for i, change in enumerate(changes):
        whole = "\n".join(f"Tom has {n} hats." for n in range(200))
        path.write_text(whole)
        values = {"run": f"{i}",
                  "overrides": f"data.sources={path} data.max_validation_tokens=1000"}
        began = forked(lambda: begin_stage(place / "runs", **values))
        new = change(whole)
        path.write_text(new) if new else path.unlink()
        refused = forked(lambda: begin_stage(
            place / "runs", **values, resume=True))[1].get("error", "")
        path.write_text(whole)
        again = forked(lambda: begin_stage(place / "runs", **values, resume=True))
        survived += began[0] == again[0] == 0 and "StageError" in refused and str(path) in refused
    return Row("a data file changes between two sessions of a run",
               len(changes), survived, 0, "its sha256 differs: refused, and the file is named")


def damaged_tokens(place: Path, times: int) -> Row:
    """A bit flips in one file of a cache of tokens; every file in turn, `times` each."""
    tokenizer, luck, survived = (make_tokenizer(DataConfig(tokenizer_vocab_size=300), place),
                                 random.Random(0), 0)
    build = lambda: build_token_cache("synthetic", "train", tokenizer, 5_000, place, progress=False)
    folder = build().folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in sorted(whole) * times:
        flip(folder / name, luck)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            build()
        repaired = all((folder / other).read_bytes() == content for other, content in whole.items())
        survived += repaired and any(name in str(one.message) for one in said)
    return Row("a bit flips in one file of a cache of tokens", len(whole) * times, survived, 0,
               "its sha256 differs: the file is named and the cache built again")


def read_only(place: Path) -> Row:
    """A run's folder on a disk that may only be read; a stage begins there. Needs root."""
    with small_disk(place / "disk", 1 << 20) as mounted:
        if not mounted:
            raise CannotInject("a read-only disk needs root, to mount it")
        (place / "disk" / "it").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place / "disk"], check=True)
        refused = forked(lambda: begin_stage(place / "disk"))[1].get("error", "")
    survived = "StageError: cannot write to" in refused and "Read-only file system" in refused
    return Row("a stage begins on a read-only disk", 1,
               int(survived), 0, "refused before anything is done; the folder is named")


class Payload:
    """What an attacker would put into a file: unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickles(place: Path) -> tuple[Row, dict[str, str]]:
    """A pickle that runs code in place of every file that is loaded, with sums that fit; what each
    reader said.
    """
    mark = place / "it ran"
    paused(place / "base")(place / "base")
    shutil.rmtree(place / "base" / "checkpoint.previous", ignore_errors=True)
    table = place / "base" / "reference.jsonl"
    kept = lambda: cached_frame(table, dict)
    tokenizer = make_tokenizer(DataConfig(tokenizer_vocab_size=300), place)
    cache = build_token_cache("synthetic", "train", tokenizer, 5_000, place, progress=False).folder
    resume, model = ((lambda: trainer(place / "base", resume=True)),
                     (lambda: load_model(place / "base" / "checkpoint")))
    tokens = lambda: build_token_cache("synthetic", "train", tokenizer, 5_000, place,
                                       progress=False)
    checkpoint = place / "base" / "checkpoint"
    readers = {checkpoint / "training_state.pt": resume, checkpoint / "model.safetensors": model,
               checkpoint / "config.json": model, checkpoint / "meta.json": resume, table: kept,
               **{path: tokens for path in sorted(cache.iterdir())}}
    said, survived = {}, 0
    for path, read in readers.items():
        for form in ("pickle", "torch"):
            former = path.read_bytes() if path.exists() else b""
            (path.write_bytes(pickle.dumps(Payload(mark))) if form == "pickle"
             else torch.save({"module": Payload(mark)}, path))
            meta = path.parent / "meta.json"
            if path != meta and path != table:
                known = read_json(meta)
                fits = {**known, "sha256": {**known["sha256"], path.name: sha256(path)}}
                fits["sha256"].pop("meta.json", None)
                if "sizes" in fits:
                    fits["sizes"] = {**fits["sizes"], path.name: path.stat().st_size}
                write_json(meta, fits)

            def work() -> dict:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message="the token cache is damaged")
                    read()
                return {"error": "nothing"}

            code, answer = forked(work)
            said[f"{path.parent.name.split('-')[0]}/{path.name}, {form}"] = answer["error"]
            survived += code == 1 and not mark.exists()
            path.write_bytes(former) if former else path.unlink(missing_ok=True)
            if path != meta and path != table:
                write_json(meta, known)
    row = Row("a pickle that runs code, in place of a file that is loaded",
              len(said), survived, 0, "refused by name; nothing of it runs")
    return row, said


# ---- the table -----------------------------------------------------------------------------------


KILL, WARN = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGUSR1)
# how often (0: as often as there is something to disturb), and what
SCENARIOS: dict[str, tuple[int, Callable[[Path, int], object]]] = {
    "full-operation": (0, lambda place, times: every_operation(place, times, dies=False)),
    "dying-operation": (0, lambda place, times: every_operation(place, times, dies=True)),
    "full-disk": (5, full_disk), "read-only": (0, lambda place, times: read_only(place)),
    "kill": (30, lambda place, times: signalled(place, times, KILL)),
    "warning": (20, lambda place, times: signalled(place, times, WARN)),
    "device": (5, lost_device), "two": (200, two_at_once), "checkpoint": (4, damaged_checkpoint),
    "tokens": (3, damaged_tokens), "data": (0, lambda place, times: changed_data(place)),
    "pickles": (0, lambda place, times: pickles(place)),
}
OPERATIONS = ("full-operation", "dying-operation")


def run_scenario(name: str, times: int | None = None,
                 operations: int | None = None) -> tuple[Row, object]:
    """The row of one scenario and, where there is one, what was seen each time."""
    times = operations if name in OPERATIONS else times
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of fsyncs
    usual, scenario = SCENARIOS[name]
    with tempfile.TemporaryDirectory(dir=fast) as place:
        result = scenario(Path(place), usual if times is None else times)
    return result if isinstance(result, tuple) else (result, None)


def write_table(rows: list[Row], folder: Path, command: str, seconds: float) -> Path:
    """Write results/faults.csv and faults.json (how it was measured) below `folder`, and faults.md
    again.
    """
    (folder / "results").mkdir(parents=True, exist_ok=True)
    columns = ["fault", "times", "survived", "steps lost beyond the last checkpoint",
               "how it shows"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *map(dataclasses.astuple, rows)])
    write_text(folder / "results" / "faults.csv", text.getvalue())
    where = (f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch "
             f"{torch.__version__}")
    write_json(
        folder / "results" / "faults.json",
        {"command": command, "date": f"{datetime.date.today()}",
         "seconds": round(seconds), "where": where,
         "parameters": sum(weight.numel() for weight in ModernDecoderLM(MODEL).parameters())})
    return write_page(folder)


def table_of(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a csv file, and the same as lines of a Markdown table."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *body = csv.reader(file)
    return ([dict(zip(header, cells)) for cells in body],
            [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)])


def write_page(folder: Path) -> Path:
    """Write faults.md from what lies in `folder`/results: faults.csv and faults.json, and
    fault_cases.csv where it is.
    """
    rows, lines = table_of(folder / "results" / "faults.csv")
    how = read_json(folder / "results" / "faults.json")
    total = {name: sum(int(row[name]) for row in rows) for name in ("times", "survived")}
    page = ["# Faults", "", "## Injected into a run",
            "", f"{total['times']} faults were injected and {total['survived']} survived: the run "
                "was resumed and ended with the weights of an undisturbed one, bit for bit, or "
                "the fault was refused before it could do harm.",
            "", *lines, "",
            f"Measured by `{how['command']}` on {how['date']} in {how['seconds']} s "
            f"({how['where']}), with a real trainer of a model of {how['parameters']:,} parameters "
            "(dropout, Muon, averaged weights, two micro-batches a step, float32).", ""]
    if (cases := folder / "results" / "fault_cases.csv").is_file():
        rows, lines = table_of(cases)
        page += [
            "## Found by people who tried it",
            "", f"{len(rows)} kinds of fault, each found first as one case, then looked for "
                f"everywhere; {sum(int(row['cases']) for row in rows)} cases are tests now, marked "
                "by their kind (`pytest -m fault`; `python scripts/fault_cases.py` counts them).",
            "", *lines, ""]
    return write_text(folder / "faults.md", "\n".join(page))


def main() -> None:
    """Inject every fault and write the table; or the faults of some scenarios, and print what was
    seen.
    """
    parser = argparse.ArgumentParser(prog="python -m modern_llm.tests.faults",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO",
                        help="print what these give, a line of JSON each, and write nothing: "
                             f"{', '.join(SCENARIOS)}")
    parser.add_argument("--times", type=int,
                        help="how often each fault is injected, where that can be chosen")
    parser.add_argument("--operations", type=int, metavar="COUNT",
                        help="disturb so many of the file operations, instead of every one")
    parser.add_argument("--report", type=Path, default=CHECKOUT / "report",
                        help="where the table is written")
    options = parser.parse_args()
    if "file_faults" not in os.environ.get("LD_PRELOAD", ""):
        try:
            sys.exit(prepared("modern_llm.tests.faults", *sys.argv[1:]).returncode)
        except CannotInject as error:
            sys.exit(str(error))
    torch.set_num_threads(1)
    began, rows = time.time(), []
    for name in options.only or SCENARIOS:
        row, seen = run_scenario(name, options.times, options.operations)
        rows.append(row)
        text = f"{row.fault}: {row.survived} of {row.times} survived, {row.lost} steps lost"
        print(json.dumps({"scenario": name, **dataclasses.asdict(row), "seen": seen})
              if options.only else text, flush=True)
    if not options.only:
        print(write_table(rows, options.report, "python -m modern_llm.tests.faults",
                          time.time() - began))
