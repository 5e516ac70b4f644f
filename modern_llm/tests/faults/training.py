"""Faults of a training run: of the disk, of its checkpoints, of the process and of the device; each
function gives a row of the table.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modern_llm.tests.faults.disturb import (
    AT, TRAIN, Row, arm, forked, operations, paused, resumed, trainer, undisturbed, weights,
)
from modern_llm.training.checkpoints import read_metrics

# ---- the disk ------------------------------------------------------------------------------------


def chosen(names: list[str], count: int) -> list[int]:
    """The numbers, from 1, of `count` operations spread evenly, the first and the last among them,
    and of the first of each name; of all operations if `count` is 0.
    """
    spread = torch.linspace(1, len(names), count or len(names)).round().int().tolist()
    return sorted({*spread, *(names.index(name) + 1 for name in names)})


def every_operation(place: Path, count: int, dies: bool) -> tuple[Row, list[dict]]:
    """Disturb every file operation that writes a checkpoint, kept weights and a row of metrics, or
    those that are `chosen`: each fails, or ends the process, once.
    """
    wanted, write = undisturbed(place / "straight"), paused(place / "base")

    def disturbed(number: int) -> tuple[int, dict, Path]:
        folder = shutil.copytree(place / "base", place / f"{number}")

        def work() -> dict:
            arm(folder, number, dies)
            write(folder)
            return {"operations": operations()}

        return *forked(work), folder

    found, names = [], disturbed(0)[1]["operations"]
    for number in chosen(names, count):
        code, said, folder = disturbed(number)
        ended = resumed(folder)
        found.append({"operation": names[number - 1], "of": len(names), "code": code,
                      "error": said.get("error", ""), **ended,
                      "same": ended.get("weights") == wanted})
        shutil.rmtree(folder)
    lost = max(AT - TRAIN.checkpoint_every - one.get("start", 0) for one in found)
    fault = (f"{'the process dies' if dies else 'the disk is full'} in one file operation of a "
             "checkpoint, each in turn")
    how = (
        "half a write is left behind; the next start finds the last whole checkpoint" if dies
        else "the trainer stops and names the file; what can be cleaned up later does not stop it")
    return Row(fault, len(found), sum(one["same"] for one in found), max(0, lost), how), found


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """Mount a disk of `size` bytes at `place`, as root only; yields whether that was possible."""
    place.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place],
                                 capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def full_disk(place: Path, times: int) -> Row:
    """A disk with too little room left for a checkpoint; then room is made. Without root: a limit
    on the size of files.
    """
    wanted, write, luck = undisturbed(place / "straight"), paused(place / "base"), random.Random(0)
    biggest = (place / "straight" / "checkpoint" / "training_state.pt").stat().st_size
    survived = lost = 0
    with small_disk(place / "disk", 1 << 20) as mounted:
        for i in range(times):
            folder, room = (shutil.copytree(place / "base", place / "disk" / f"{i}"),
                            luck.randrange(biggest))

            def work() -> dict:
                if not mounted:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                write(folder)
                return {}

            if mounted:
                (place / "disk" / "ballast").write_bytes(bytes(
                    shutil.disk_usage(place / "disk").free - room))
            code, said = forked(work)
            (place / "disk" / "ballast").unlink(missing_ok=True)
            ended = resumed(folder)
            survived += (code == 1 and "CheckpointError" in said["error"]
                         and str(folder) in said["error"] and ended.get("weights") == wanted)
            lost = max(lost, AT - TRAIN.checkpoint_every - ended.get("start", 0))
            shutil.rmtree(folder)
    fault = ("a disk (tmpfs) too full for the next checkpoint" if mounted
             else "files may not grow as large as a checkpoint (RLIMIT_FSIZE)")
    return Row(fault, times, survived, lost,
               "the trainer stops, names the folder, and goes on when there is room")


def damaged_checkpoint(place: Path, times: int) -> Row:
    """One bit of one file of the newest checkpoint flipped, or its end cut off; every file in turn,
    `times` each.
    """
    wanted, write, luck = undisturbed(place / "straight"), paused(place / "base"), random.Random(0)
    write(place / "base")
    names = sorted(path.name for path in (place / "base" / "checkpoint").iterdir())
    survived = lost = 0
    for i, name in enumerate(names * times):
        folder = shutil.copytree(place / "base", place / f"{i}")
        flip(folder / "checkpoint" / name, luck, cut=i >= len(names) * (times - 1))
        ended = resumed(folder)
        survived += ended.get("weights") == wanted and name in ended["said"]
        lost = max(lost, AT - TRAIN.checkpoint_every - ended.get("start", 0))
        shutil.rmtree(folder)
    return Row("a bit flips, or bytes are missing, in one file of the newest checkpoint",
               len(names) * times, survived, lost,
               "its sha256 differs: the file is named and the checkpoint before it is used")


def flip(path: Path, luck: random.Random, cut: bool = False) -> None:
    """Flip a random bit of a file, or cut it off at a random place."""
    content = bytearray(path.read_bytes())
    at = luck.randrange(len(content))
    if cut:
        content = content[:at]
    else:
        content[at] ^= 1 << luck.randrange(8)
    path.write_bytes(content)


# ---- the process ---------------------------------------------------------------------------------


LONG = {"max_steps": 60, "checkpoint_every": 4, "keep_checkpoints": 0}


def in_a_process(folder: Path, resume: bool) -> int:
    """Start training in a fork that tells nobody how it ends; returns its number once it has
    trained a step.
    """
    before = len(read_metrics(folder / "metrics.jsonl"))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            trainer(folder, resume, **LONG).fit()
        os._exit(0)
    deadline = time.monotonic() + 60
    while (len(read_metrics(folder / "metrics.jsonl")) <= before and time.monotonic() < deadline
           and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        time.sleep(0.002)
    return child


def signalled(place: Path, times: int, numbers: tuple[int, ...]) -> Row:
    """Send `times` signals to training processes at random moments before their end, resume each
    time, and compare how they end.
    """
    wanted, luck = undisturbed(place / "straight", **LONG), random.Random(0)
    arrived = survived = lost = run = 0
    while arrived < times:
        run, ended = run + 1, False
        folder, hits = place / f"{run}", 0
        while not ended:
            child = in_a_process(folder, resume=folder.exists())
            if arrived < times:
                time.sleep(luck.uniform(0, 0.15))
                os.kill(child, numbers[arrived % len(numbers)])
            os.waitpid(child, 0)
            rows = read_metrics(folder / "metrics.jsonl")
            ended = not rows or rows[-1]["step"] >= LONG["max_steps"]
            if not ended:
                start = resumed(folder, train=False, **LONG).get("start", 0)
                last = rows[-1]["step"]
                whole = (last // LONG["checkpoint_every"] * LONG["checkpoint_every"]
                         if signal.SIGKILL in numbers else last)
                hits, arrived, lost = hits + 1, arrived + 1, max(lost, whole - start)
        survived += hits if weights(folder) == wanted else 0
        shutil.rmtree(folder)
    if signal.SIGKILL in numbers:
        return Row("kill -9 of a training process at a random moment", arrived, survived, lost,
                   "the next start finds the last whole checkpoint")
    return Row("SIGTERM or SIGUSR1 to a training process at a random moment", arrived, survived,
               lost, "the step is finished and checkpointed; the next start goes on there")


class Vanishing(TorchDispatchMode):
    """The device is gone from the n-th operation on."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # else it imports torch's compiler: 3 s

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.left -= 1
        if self.left <= 0:
            raise torch.AcceleratorError("CUDA error: the device is gone (simulated)")
        return function(*arguments, **(options or {}))


def lost_device(place: Path, times: int) -> Row:
    """Every operation of torch fails from a random one on, as on a GPU that fell off its bus; the
    run goes on in a new process.
    """
    wanted, luck, survived, lost = undisturbed(place / "straight"), random.Random(0), 0, 0
    for i in range(times):
        def work() -> dict:
            run = trainer(place / f"{i}")
            with Vanishing(luck.randrange(500, 9_000)):
                run.fit()
            return {}

        code, said = forked(work)
        luck.random()
        rows = read_metrics(place / f"{i}" / "metrics.jsonl")
        ended = resumed(place / f"{i}")
        survived += (ended.get("weights") == wanted
                     and (code == 0 or "AcceleratorError" in said["error"]))
        whole = (rows[-1]["step"] if rows else 0) // TRAIN.checkpoint_every * TRAIN.checkpoint_every
        lost = max(lost, whole - ended.get("start", 0))
    return Row("the device is lost at a random operation (simulated in torch's dispatcher)", times,
               survived, lost, "torch's error ends the stage, which says where it goes on")
