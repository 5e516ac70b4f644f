"""The shell's scripts where others play what they meet of a machine: no SLURM, no package index."""

import os
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
