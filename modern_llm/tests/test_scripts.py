"""The shell's scripts where others play what they meet of a machine: no SLURM, no package index."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from modern_llm.files import CHECKOUT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shell scripts")


# ---- slurm/array.slurm ---------------------------------------------------------------------------


def array(folder: Path, task: int, *words: object) -> subprocess.CompletedProcess:
    """The array's job file in a folder where `job.sh` only prints the words, one a line."""
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "job.sh").write_text(
        "open_log() { :; }\nrun_or_requeue() { printf '<%s>\\n' \"$@\"; }\n")
    return subprocess.run(["bash", CHECKOUT / "slurm" / "array.slurm", *map(str, words)],
                          cwd=folder, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)},
                          text=True, capture_output=True)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_a_sweep_from_any_system(tmp_path, end):
    sweep = tmp_path / "my rates.txt"
    text = f"-p sft.lr=1e-3{end}--stage sft -p sft.lr=2e-3{end}{end}-p seed=4"
    sweep.write_bytes(text.encode())
    for task, words in ((1, ["-p", "sft.lr=1e-3"]), (4, ["-p", "seed=4"]),
                        (2, ["--stage", "sft", "-p", "sft.lr=2e-3"])):
        done = array(tmp_path, task, "lesson", "rate", sweep)
        assert done.returncode == 0 and done.stdout.split() == [f"<{word}>" for word in (
            "--preset", "lesson", "--run", f"rate-{task}", *words)], done
    for task in (3, 5):  # blank; behind the last, which has no line's end
        done = array(tmp_path, task, "lesson", "rate", sweep)
        assert done.returncode == 2 and f"no line {task}: choose --array=1-4" in done.stderr
    assert array(tmp_path, 7, "lesson", "seeds").stdout.split()[-2:] == ["<-p>", "<seed=7>"]


# ---- scripts/environment.sh ----------------------------------------------------------------------

PYTHON = """#!/bin/bash
here=$(dirname "$0")
echo "$*" >> "$here/said"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip ;;
  "-m ensurepip") touch "$here/pip" ;;
  "-m pip install"*) [ -f "$here/pip" ] && echo "#!$PWD/.venv/bin/python" > .venv/bin/modern-llm ;;
  "-m pip"*) [ -f "$here/pip" ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the script reads, and `python`, which notes what it is asked for."""
    folder = tmp_path / "my models"
    (folder / "scripts").mkdir(parents=True)
    for name in ("settings.ini", "setup.py", "constraints.txt", "scripts/environment.sh"):
        shutil.copy(CHECKOUT / name, folder / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def environment(folder: Path, python: Path) -> str:
    """What the script says; an error unless it ends well."""
    done = subprocess.run(["bash", folder / "scripts" / "environment.sh"], text=True, cwd="/",
                          env=os.environ | {"PYTHON": str(python)}, capture_output=True)
    assert done.returncode == 0, done
    return done.stdout


def test_an_environment_that_was_left_without_pip_gets_it(checkout):
    inside = checkout / ".venv" / "bin"
    inside.mkdir(parents=True)
    shutil.copy(checkout.parent / "python", inside)
    assert "ready: .venv" in environment(checkout, checkout.parent / "python")
    assert "-m ensurepip" in (inside / "said").read_text()
    assert environment(checkout, checkout.parent / "python") == ""  # up to date


def test_a_copy_has_an_environment_of_its_own(checkout):
    python, copy = checkout.parent / "python", checkout.parent / "copy"
    assert "Making .venv" in environment(checkout, python)
    assert environment(checkout, python) == ""
    shutil.copytree(checkout, copy)
    assert f"moved or copied from {checkout}, and" in environment(copy, python)
    assert (copy / ".venv/bin/modern-llm").read_text() == f"#!{copy}/.venv/bin/python\n"
    assert environment(copy, python) == environment(checkout, python) == ""
    shutil.rmtree(copy / ".venv")  # a link to another environment is one on purpose
    (copy / ".venv").symlink_to(checkout / ".venv")
    assert environment(copy, python) == ""
