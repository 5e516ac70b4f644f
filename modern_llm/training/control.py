"""A stage's control at equal cost: the same start, as many steps on the same batches, without what
the stage is for. It is trained behind the stage itself, by the same ranks, into the folder
`control/` of the stage.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import TrainConfig
from modern_llm.training.recipe import Run

if TYPE_CHECKING:
    from modern_llm.training.trainer import TrainResult, Trainer

FOLDER = "control"  # of the stage's folder; no later stage starts from what is in it


def train_control(run: Run, cfg: TrainConfig, result: TrainResult,
                  make: Callable[[TrainConfig, Path], Trainer]) -> TrainResult:
    """Train the control for as many steps as the stage was, or go on where a session before this
    one ended.

    Its learning rate falls with its steps; that of a stage which its minutes ended fell with those.

    Args:
        cfg: the stage's settings; all that its optimizer reads is the control's too.
        result: how the stage's own training ended.
        make: (settings, folder) -> the control's trainer.

    Returns:
        `result`; where the control was stopped, with its reason, so that the stage is resumed.
    """
    if result.stopped not in ("finished", "max_minutes"):
        return result
    gc.collect()  # the stage's own optimizer: its memory is the control's now
    trainer = make(replace(cfg, max_steps=result.step, max_minutes=None, keep_checkpoints=0),
                   run.folder / FOLDER)
    trainer.files.stop_file = run.folder / "STOP"
    stopped = trainer.fit().stopped
    return result if stopped == "finished" else replace(result, stopped=stopped)
