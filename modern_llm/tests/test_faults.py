"""Everything that can go wrong with a run does, in real processes; the scenarios are those of the
fault table.
"""

import csv
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from modern_llm.tests.faults import table
from modern_llm.tests.faults.disturb import CannotInject, Row, build_library, prepared

ROOT = Path(__file__).resolve().parents[2]

# In short a third of the file operations are disturbed, each kind among them; in the thorough
# variant every one.
THOROUGH = bool(os.environ.get("MODERN_LLM_THOROUGH_TESTS"))
NEED_ROOT = ("full-disk", "read-only", "kill", "warning", "device", "checkpoint", "tokens", "data")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """What the scenarios gave, all in one prepared process."""
    names = [*table.OPERATIONS, "pickles",
             *NEED_ROOT * (sys.platform == "linux" and not os.geteuid())]
    try:
        done = prepared("modern_llm.tests.faults", "--times", "2", "--operations",
                        "0" if THOROUGH else "22", "--only", *names,
                        capture_output=True, text=True, timeout=900)
    except CannotInject as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr
    return {row["scenario"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", table.OPERATIONS)
def test_a_checkpoint_disturbed_at_any_file_operation_costs_no_step_and_no_bit(rows, name):
    row = rows[name]
    seen = row["seen"]
    kinds = [one["operation"] for one in seen]
    least = seen[0]["of"] if THOROUGH else 20
    assert (seen[0]["of"] > 60 and row["times"] == len(seen) >= least
            and {"open", "write", "fsync", "rename", "mkdir", "unlink"} <= set(kinds))
    assert ([one for one in seen if not one["same"]] == []
            and row["survived"] == row["times"] and row["lost"] == 0)
    assert {one["start"] for one in seen} == {4, 6}, "some disturb before the rename, some after"
    if name == "dying-operation":
        assert {one["code"] for one in seen} == {137}
    else:
        errors = [one["error"] for one in seen if one["code"]]
        assert len(errors) > 0.75 * len(seen) and all(
            error.startswith("CheckpointError: ") and ("cannot write" in error) for error in errors)


def test_every_other_fault_of_the_table_is_survived_or_refused(rows):
    if "read-only" not in rows:
        pytest.skip("mounting a small disk needs root")
    others = {name: rows[name] for name in NEED_ROOT}
    assert ({name: (row["survived"], row["lost"]) for name, row in others.items()}
            == {name: (row["times"], 0) for name, row in others.items()})
    assert (all(row["times"] > 0 for row in others.values())
            and "tmpfs" in others["full-disk"]["fault"])


def test_no_file_that_is_loaded_can_run_code(rows):
    row = rows["pickles"]
    assert row["survived"] == row["times"] == len(row["seen"]) == 20
    for file in ("training_state.pt", "model.safetensors", "config.json", "tokens.bin",
                 "offsets.npy", "reference.jsonl"):
        answers = [said for name, said in row["seen"].items() if file in name]
        assert len(answers) == 2 and all(file in said for said in answers), answers


def test_the_payload_would_have_run(tmp_path):
    """The pickle of the test above is a real one."""
    import pickle

    pickle.loads(pickle.dumps(table.Payload(tmp_path / "it ran")))
    assert (tmp_path / "it ran").is_dir()


def test_the_table_is_written_and_says_how_it_was_made(tmp_path):
    table.write_table([Row("a fault", 3, 2, 1, "somehow, loudly")], tmp_path, "the command", 4.0)
    rows = list(csv.DictReader((tmp_path / "results" / "faults.csv").open()))
    assert [list(row.values()) for row in rows] == [["a fault", "3", "2", "1", "somehow, loudly"]]
    assert "steps lost beyond the last checkpoint" in rows[0]
    text = (tmp_path / "faults.md").read_text()
    assert ("3 faults were injected and 2 survived" in text and "`the command`" in text
            and "| a fault | 3 | 2 | 1 | somehow, loudly |" in text)
    assert "Found by people" not in text
    (tmp_path / "results" / "fault_cases.csv").write_text(
        'kind,places found,cases,what happens now\nmarking,"here, there",12,read whole\n')
    text = table.write_page(tmp_path).read_text()
    assert ("12 cases are tests" in text and "| marking | here, there | 12 | read whole |" in text
            and "3 faults were injected" in text)


def test_the_published_page_is_what_its_files_say(tmp_path):
    shutil.copytree(ROOT / "report" / "results", tmp_path / "results",
                    ignore=lambda folder, names: [n for n in names if not n.startswith("fault")])
    assert table.write_page(tmp_path).read_text() == (ROOT / "report" / "faults.md").read_text()


def test_the_published_table_counts_the_cases(request):
    """As `scripts/fault_cases.py --check` does, where all tests are collected anyway."""
    config, files = request.config, Path(__file__).parent.glob("test_*.py")
    marked = {path for path in files if 'mark.fault("' in path.read_text(encoding="utf-8")}
    if (config.option.keyword or config.option.markexpr
            or not marked <= {item.path for item in request.session.items}):
        pytest.skip("some tests are not collected here: python scripts/fault_cases.py --check")
    collected = Counter(kind for item in request.session.items
                        for mark in item.iter_markers("fault") for kind in mark.args)
    rows, _ = table.table_of(ROOT / "report" / "results" / "fault_cases.csv")
    assert {row["kind"]: int(row["cases"]) for row in rows} == collected, (
        "python scripts/fault_cases.py")


def test_a_machine_that_cannot_inject_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotInject, match="need Linux, a C compiler"):
        build_library(tmp_path)
