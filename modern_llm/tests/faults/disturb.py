"""A small real training run that can be disturbed: its file operations fail or kill it, and a
further process resumes it.

Faults of the disk come from a library in C (`file_faults.c`) that stands between the process and
the system, so that the writes of Python, C++ and Rust are all seen. A prepared process is forked
for every fault, so that a fault costs a tenth of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from modern_llm.config import ModelConfig, TrainConfig
from modern_llm.files import sha256
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model
from modern_llm.training.checkpoints import RunFolder
from modern_llm.training.optim import lm_loss
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import restore_random_states

MODEL = ModelConfig(vocab_size=32, context_length=16, width=16, num_layers=1, num_heads=2,
                    num_kv_heads=1, ffn_width=16, dropout=0.1)
TRAIN = TrainConfig(max_steps=7, batch_size=4, micro_batch_size=2, warmup_steps=2, ema_decay=0.9,
                    log_every=1, eval_every=100, checkpoint_every=2, keep_checkpoints=3)
AT = 6  # the step whose checkpoint is disturbed; those of steps 2 and 4 were written before


class CannotInject(RuntimeError):
    """This machine lacks something that a fault needs. The message says what."""


@dataclasses.dataclass
class Row:
    """One line of the fault table; `lost` is the most steps that were gone beyond the last whole
    checkpoint.
    """

    fault: str
    times: int
    survived: int
    lost: int
    noticed: str  # how the fault shows


# ---- the library in C ----------------------------------------------------------------------------


def build_library(folder: Path) -> Path:
    """Compile `file_faults.c`. CannotInject where there is no Linux or no C compiler."""
    source, library = Path(__file__).with_name("file_faults.c"), Path(folder) / "file_faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler or not source.is_file():
        raise CannotInject("faults of single file operations need Linux, a C compiler (cc) and "
                           "modern_llm/tests/faults/file_faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True,
                   capture_output=True)
    return library


def arm(folder: Path, number: int, dies: bool) -> None:
    """From now on operation `number` below `folder` fails with a full disk, or is this process's
    last; 0 only counts.
    """
    ctypes.CDLL(None).fault_arm(str(folder).encode(),
                                ctypes.c_long(number), int(dies), errno.ENOSPC)


def operations() -> list[str]:
    """The names of the file operations since `arm`."""
    names = ctypes.CDLL(None).fault_names
    names.restype = ctypes.c_char_p
    return names().decode().split()


def prepared(*words: str, **options) -> subprocess.CompletedProcess:
    """A module as a command, `python -m` and `words`, in a process with the library in C."""
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ,
                       "LD_PRELOAD": str(build_library(Path(place))), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", *words], env=environment, **options)


# ---- a run that can be disturbed -----------------------------------------------------------------


def forked(work: Callable[[], dict]) -> tuple[int, dict]:
    """Exit code and result of `work` in a fork of this process; code 1 and {"error": …} if it
    raised.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code, value = 0, {}
        try:
            value = work()
        except BaseException as error:
            code, value = 1, {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(into, "w") as file:
            json.dump(value, file)
        os._exit(code)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(text or "{}")


def batches(step: int) -> dict[str, torch.Tensor]:
    """A learnable batch that depends on the step alone."""
    ids = torch.randint(0, MODEL.vocab_size, (TRAIN.batch_size, MODEL.context_length),
                        generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": (3 * ids + 1) % MODEL.vocab_size}


def save(model: torch.nn.Module, folder: Path) -> None:
    """The model's files of a checkpoint."""
    save_model(folder, model)


def trainer(folder: Path, resume: bool = False, loss_fn=lm_loss, **settings) -> Trainer:
    """A real trainer of a very small model, with dropout, Muon, averaged weights and two
    micro-batches a step.
    """
    torch.manual_seed(0)
    return Trainer(ModernDecoderLM(MODEL), loss_fn, batches, dataclasses.replace(TRAIN, **settings),
                   folder, save_model=save, device="cpu", progress_bar=False, resume=resume)


def weights(folder: Path) -> str:
    """What must be the same however often a run was disturbed."""
    return sha256(folder / "checkpoint" / "model.safetensors")


def undisturbed(folder: Path, **settings) -> str:
    """The weights at the end of a run that nothing happens to."""
    trainer(folder, **settings).fit()
    return weights(folder)


def resumed(folder: Path, train: bool = True, **settings) -> dict:
    """Resume in a new process and train to the end: where it went on, the weights it ended with,
    what it said; or the error.
    """
    def work() -> dict:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            again = trainer(folder, resume=True, **settings)
            start = again.state.step
            if train:
                again.fit()
        return {"start": start, "weights": weights(folder) if train else "",
                "said": said.getvalue()}
    return forked(work)[1]


def paused(folder: Path) -> Callable[[Path], None]:
    """Train in `folder` until the checkpoint of step AT is due; returns what writes it, and its
    metrics, into a copy of the folder.
    """
    run = trainer(folder)
    observe, held = run.recorder.observe, []

    class Paused(Exception):
        """Training stands at step AT."""

    def hold(state, factor, reason) -> None:
        if state.step == AT:
            held.extend((state, factor, reason))
            raise Paused
        observe(state, factor, reason)

    run.recorder.observe = hold
    with contextlib.suppress(Paused):
        run.fit()

    def write(copy: Path) -> None:
        run.recorder.files = RunFolder(copy, save)
        restore_random_states(held[0].random)
        observe(*held)

    return write
