"""What a stage brings to its training, and what it is told of its run: two protocols. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from modern_llm.config import PipelineConfig

if TYPE_CHECKING:
    from torch import nn

    from modern_llm.training.train_step import Batch, LossFunction
    from modern_llm.training.trainer import TrainResult, Trainer


@runtime_checkable
class Run(Protocol):
    """A stage under way, as far as training has to know it (`runs.record.StageRun`)."""

    config: PipelineConfig
    device: str
    folder: Path  # of the stage

    @property
    def start(self) -> Path | None:
        """The checkpoint to start from; None for pretraining."""

    def trainer(self, model: nn.Module, loss: LossFunction, batches: Callable[[int], Batch],
                recipe: Recipe, **others) -> Trainer:
        """A Trainer with the stage's settings, folder and device; `others` are arguments of Trainer
        that differ.
        """


@runtime_checkable
class Recipe(Protocol):
    """What a stage trains with, made of its Run alone: every rank makes the same.

    What is dear and made before the first step, rank 0 has kept in the stage's folder by the time
    that another rank makes its recipe; that one reads it there.
    """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What is measured while it trains; `loss` among it."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model as other programs read it."""

    def fit(self) -> TrainResult:
        """Train, from the beginning or where a session before this one ended."""
