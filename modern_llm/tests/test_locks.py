"""Two processes never work on one run, whenever they start; and a dead one does not keep it."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modern_llm.messages import StageError
from modern_llm.runs import locks
from modern_llm.runs.locks import STAGE_LOCK, RunLock, is_alive, owner_of, this_process
from modern_llm.runs.parameters import is_in_use
from modern_llm.tests.test_stage import begin

TAKE = ("import sys, time; from modern_llm.runs.locks import RunLock; RunLock(sys.argv[1], 'stage "
        "sft').take(); print('taken', flush=True); time.sleep(60)")
ROUNDS = 100
TWO = """
import multiprocessing, os, sys
from pathlib import Path
from modern_llm.messages import StageError
from modern_llm.runs.locks import RunLock

def contend(number, barrier, wins, folder, rounds):
    for i in range(rounds):
        if i % 2 and number == 0:  # what a killed process leaves behind
            folder.mkdir(exist_ok=True)
            (folder / ".lock").write_bytes(dead)
        barrier.wait()
        lock = RunLock(folder, "stage sft")
        try:
            lock.take()
            wins[number * rounds + i] = 1
        except StageError as error:
            assert "in use: stage sft, by process" in str(error), error
        barrier.wait()
        lock.release()
        barrier.wait()

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
fork = multiprocessing.get_context("fork")
first = fork.Process(target=lambda: RunLock(folder, "stage pretrain").take())
first.start(); first.join()
dead = (folder / ".lock").read_bytes()
barrier, wins = fork.Barrier(2), fork.Array("i", 2 * rounds)
pair = [fork.Process(target=contend, args=(n, barrier, wins, folder, rounds)) for n in range(2)]
[p.start() for p in pair]; [p.join() for p in pair]
assert [p.exitcode for p in pair] == [0, 0]
print(sum(wins[i] + wins[rounds + i] == 1 for i in range(rounds)), sum(wins[:rounds]))
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the run `it`."""
    process = subprocess.Popen([sys.executable, "-c", TAKE, tmp_path / "it"],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def test_of_two_that_start_at_the_same_moment_exactly_one_works(tmp_path):
    done = subprocess.run([sys.executable, "-c", TWO, tmp_path / "it", str(ROUNDS)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one_owner, won_by_first = map(int, done.stdout.split())
    assert one_owner == ROUNDS and "took over the lock of stage pretrain, by process" in done.stderr
    assert 0 < won_by_first < ROUNDS, "one process was always first: the test shows little"


def test_the_second_is_refused_at_once_and_told_by_whom(tmp_path, holder):
    began = time.time()
    with pytest.raises(StageError, match=f"run 'it' is in use: stage sft, by process {holder.pid} "
                                         f"on {platform.node()}, since 20.*another run"):
        begin(tmp_path, run="it")
    assert time.time() - began < 3 and os.listdir(tmp_path / "it") == [STAGE_LOCK]
    assert owner_of(tmp_path / "it")["pid"] == holder.pid
    assert begin(tmp_path).run == "lesson", "another run is free"


def test_a_command_works_on_its_run_between_two_stages_too(tmp_path):
    take = ("import sys; from pathlib import Path; from modern_llm.runs.locks import *; "
            "RunLock(Path(sys.argv[1]), 'modern-llm run', COMMAND_LOCK).take(); "
            "print('taken', flush=True); sys.stdin.read()")
    assert not is_in_use(tmp_path / "it")
    with subprocess.Popen([sys.executable, "-c", take, tmp_path / "it"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        assert owner_of(tmp_path / "it") is None and is_in_use(tmp_path / "it")
        process.communicate()
    assert not is_in_use(tmp_path / "it")


def test_what_a_killed_process_leaves_is_taken_over_and_said(tmp_path, holder, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "it" / STAGE_LOCK).exists() and owner_of(tmp_path / "it") is None
    run = begin(tmp_path, run="it")
    assert f"took over the lock of stage sft, by process {holder.pid}" in capsys.readouterr().err
    assert owner_of(tmp_path / "it")["pid"] == os.getpid()
    assert begin(tmp_path, run="it", force=True).lock is run.lock, "one process may begin again"
    run.finish({"table": []})
    assert not (tmp_path / "it" / STAGE_LOCK).exists()


def test_a_kernel_whose_parent_died_is_waited_for(tmp_path, capsys):
    """After `kill -9` of papermill its kernel lives on for a second: the next start waits for it.
    """
    orphan = ("import subprocess, sys, os; p = subprocess.Popen([sys.executable, '-c', "
              "sys.argv[2].replace('60', '2'), sys.argv[1]], "
              "stdout=subprocess.PIPE); p.stdout.readline(); os._exit(0)")
    subprocess.run([sys.executable, "-c", orphan, tmp_path / "it", TAKE], check=True)
    assert owner_of(tmp_path / "it")
    began = time.time()
    RunLock(tmp_path / "it", "stage dpo").take().release()
    assert 0.2 < time.time() - began < 15 and list(tmp_path.iterdir()) == [tmp_path / "it"]


def write_owner(folder: Path, seconds_ago: float, **entry) -> None:
    folder.mkdir(exist_ok=True)
    owner = {**this_process(), "what": "stage sft", "since": "a while", "parent": {}, "job": "",
             "attempt": 0, "token": "t", **entry}
    (folder / STAGE_LOCK).write_text(json.dumps(owner))
    os.utime(folder / STAGE_LOCK, (time.time() - seconds_ago,) * 2)


@pytest.mark.parametrize("seconds_ago, entry, environment, free", [
    (3, {}, {}, False),
    (locks.HEARTBEAT_TIMEOUT + 5, {}, {}, True),
    (3, {"job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),  # requeued
    # another task of the same attempt
    (3, {"job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, False),
    (3, {"job": "8"}, {"SAYS": "RUNNING"}, False),
    (3, {"job": "8"}, {"SAYS": "PENDING"}, True),
    (3, {"job": "8"}, {"SAYS": ""}, True),
])
def test_an_owner_on_another_host(tmp_path, monkeypatch, seconds_ago, entry, environment, free):
    """By its last heartbeat, or by what SLURM's `squeue` says (played here by a script)."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    row = ("sys.argv[-1].replace('%A', sys.argv[3]).replace('%i', sys.argv[3]).replace('%T', "
           "os.environ.get('SAYS', 'RUNNING'))")
    (tmp_path / "squeue").write_text(f"#!{sys.executable}\nimport os, sys; print('Good morning,', "
                                     f"'RUNNING', {row}, sep='\\n')\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_owner(tmp_path / "it", seconds_ago, host="c301-001", **entry)
    assert (owner_of(tmp_path / "it") is None) == free
    lock = RunLock(tmp_path / "it", "stage sft")
    if free:
        lock.take().release()
    else:
        with pytest.raises(StageError, match="on c301-001.*last heartbeat [3-9] s ago"):
            lock.take()


def test_where_the_disk_has_no_locks_the_owner_decides(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(locks, "_flock", lambda handle: None)
    with pytest.raises(StageError, match=f"by process {holder.pid} on"):
        RunLock(tmp_path / "it", "stage dpo").take()
    holder.kill()
    holder.wait()
    RunLock(tmp_path / "it", "stage dpo").take().release()
    assert "took over" in capsys.readouterr().err


def test_two_hosts_that_do_not_see_each_others_locks_find_out(tmp_path, monkeypatch):
    """The other host signs after us, within the second that we wait inside a SLURM job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(locks.time, "sleep",
                        lambda seconds: write_owner(tmp_path / "it", 0, host="c301-001"))
    with pytest.raises(StageError, match="in use: stage sft, by process .* on c301-001"):
        RunLock(tmp_path / "it", "stage sft").take()


def test_a_process_number_that_was_given_again_is_somebody_else(holder):
    import psutil

    entry = {**this_process(), "pid": holder.pid,
             "pid_started": psutil.Process(holder.pid).create_time()}
    assert is_alive(entry) and not is_alive({**entry, "pid_started": entry["pid_started"] - 100})
    assert not is_alive({**entry, "host": "elsewhere"}) and not is_alive(this_process())
