"""A scheduler's warnings reach the stage in its kernel: it ends with what it has, and the next
start ends in the same weights.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from modern_llm.files import read_json
from modern_llm.runs.locks import STAGE_LOCK, owner_of
from modern_llm.runs.execution import EXIT_PREEMPTED
from modern_llm.training.checkpoints import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("data.max_train_tokens=20000 data.max_validation_tokens=2000 pretrain.max_steps=80 "
         "pretrain.eval_every=80 pretrain.batch_size=4 "
         "pretrain.checkpoint_every=30 pretrain.log_every=1 pretrain.keep_checkpoints=1")


def started(*words: object) -> subprocess.Popen:
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True)


def command(place: Path, stage: str = "pretrain", *more: str) -> subprocess.Popen:
    words = ["run", "--preset", "lesson", "--stage", stage, "--run", "it", "--output-dir", place,
             "-p", f"overrides={SMALL}"]
    return started(Path(sys.executable).parent / "modern-llm", *words, *more)


def papermill(place: Path, name: str = "it") -> subprocess.Popen:
    """As a batch script starts it."""
    line = (f"trap '' TERM USR1; exec {sys.executable} -m papermill nbs/03_pretrain.ipynb "
            f"{place / 'out.ipynb'} --no-progress-bar -p run {name} "
            f"-p output_dir {place} -p overrides '{SMALL}'")
    return started("bash", "-c", line)


def wait_for(condition, process: subprocess.Popen, seconds: float = 150) -> None:
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert condition(), process.communicate()[0] if process.poll() is not None else "not in time"


def steps(folder: Path) -> int:
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def stage_entry(place: Path, stage: str = "pretrain") -> dict:
    return read_json(place / "it" / "run.json")["stages"][stage]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of two commands that begin one run at the same moment, one makes it; the other has refused at
    once.
    """
    place = tmp_path_factory.mktemp("straight")
    pair = [command(place), command(place)]
    texts = [process.communicate(timeout=300)[0] for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 2], texts
    assert "run 'it' is in use: modern-llm run, pretrain, by process" in texts[codes.index(2)]
    assert not list((place / "it").glob(".*lock"))
    return place


def test_preempted_twice_and_resumed_equals_undisturbed(straight, tmp_path):
    folder = tmp_path / "it" / "pretrain"
    process = command(tmp_path)
    wait_for(lambda: steps(folder) >= 5, process)
    assert owner_of(tmp_path / "it")["what"] == "stage pretrain"
    os.killpg(process.pid, signal.SIGUSR1)  # the group of the command, as SLURM's --signal does
    text, _ = process.communicate(timeout=100)
    assert process.returncode == EXIT_PREEMPTED and "goes on with the same command" in text, text
    first = read_json(folder / "checkpoint" / "meta.json")["step"]
    assert stage_entry(tmp_path)["status"] == "preempted" and 5 <= first < 80 and first % 30
    assert not (folder / "results.json").exists() and not list((tmp_path / "it").glob(".*lock"))

    # the same stage without the command, and without being told to resume
    process = papermill(tmp_path)
    wait_for(lambda: steps(folder) >= first + 5, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # the whole step, kernel included, as `scancel` does
        member.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "was preempted and checkpointed" in text, text
    second = read_json(folder / "checkpoint" / "meta.json")["step"]
    assert stage_entry(tmp_path)["status"] == "preempted" and first < second < 80

    process = command(tmp_path)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "pretrain: resume" in text, text
    one, other = (load_file(place / "it" / "pretrain" / "checkpoint" / "model.safetensors")
                  for place in (straight, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 81))
    assert stage_entry(tmp_path)["status"] == "finished"


def test_a_stage_that_does_not_train_ends_at_once_and_goes_on(straight):
    lock = straight / "it" / STAGE_LOCK
    process = command(straight, "attention")
    wait_for(lock.exists, process)
    wait_for(lambda: "attention" in read_json(straight / "it" / "run.json")["stages"], process)
    process.send_signal(signal.SIGTERM)
    began = time.time()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED and time.time() - began < 30, text
    assert stage_entry(straight, "attention")["status"] == "preempted" and not lock.exists()
    planned, _ = command(straight, "attention", "--dry-run").communicate(timeout=60)
    assert "attention: resume" in planned, planned
