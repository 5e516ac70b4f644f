"""The one thread that owns the models: it admits what has come in, and writes a token for every
row, over and over.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import GENERATORS
from modern_llm.data.chat import is_chat_model
from modern_llm.data.tokens import load_tokenizer
from modern_llm.files import previous_of
from modern_llm.interchange.hub import find_checkpoint, is_model
from modern_llm.messages import StageError, say
from modern_llm.models.saving import load_model, read_config
from modern_llm.runs.parameters import chosen_folder
from modern_llm.serving.batching import Batch, Job
from modern_llm.training.verifier_scores import Scorer, load_scorer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from modern_llm.models.decoder import ModernDecoderLM


@dataclass(frozen=True)
class Limits:
    """What a server does at most."""

    rows: int = 32  # answers that one model writes together
    requests: int = 64  # under way or waiting; what is beyond is refused
    max_new_tokens: int = 1024  # of an answer
    seconds: float = 120.0  # of a request
    body_bytes: int = 1_000_000  # of a request's text


class Unavailable(RuntimeError):
    """Nothing is wrong with the request, but it is not answered now: try again later."""


@dataclass(frozen=True)
class Served:
    """A checkpoint under the name that requests call it by. What it holds is read when it is needed
    and kept; the weights are the worker's.
    """

    name: str
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    @functools.cached_property
    def chats(self) -> bool:
        """Whether it was tuned for chat."""
        return is_chat_model(self.folder, self.tokenizer)

    @functools.cached_property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return read_config(self.folder).context_length


def served_models(run: str | None, stages: tuple[str, ...], checkpoint: str | None,
                  output_dir: str | None) -> tuple[dict[str, Served], Path | None]:
    """The models that the words name, in the order of the stages, and the folder of the verifier
    that judges their answers, if there is one.

    Raises:
        StageError: there is no model, or none of a stage that was asked for.
    """
    for stage in stages:
        if stage not in GENERATORS:
            raise StageError(f"stage {stage!r} makes no language model; use one of "
                             f"{', '.join(reversed(GENERATORS))}")
    folder = chosen_folder(run, checkpoint, output_dir)
    there = [stage for stage in reversed(GENERATORS)
             if any(map(is_model, _kept(folder / stage)))]
    if missing := [stage for stage in stages if stage not in there]:
        raise StageError(f"{folder} has no model of stage {missing[0]}; it has "
                         f"{', '.join(there) or 'none'}")
    models = {stage: Served(stage, find_checkpoint(folder / stage))
              for stage in stages or there}
    if not models:
        place = find_checkpoint(folder)
        name = place.parent.name if place.name.startswith("checkpoint") else folder.resolve().name
        models = {name: Served(name, place)}
    judge = any((place / "verifier.json").is_file() for place in _kept(folder / "verifier"))
    return models, folder if judge else None


def _kept(stage: Path) -> tuple[Path, Path]:
    """Where a stage's checkpoint is, or was left by a kill between two renames."""
    return stage / "checkpoint", previous_of(stage / "checkpoint")


class Worker(threading.Thread):
    """Owns the models and writes all answers; what others want of it, it does between two tokens.

    Args:
        device: where the models are loaded, each when it is first asked.
        limits: how many rows are written together.
        judge: the folder of the verifier.
    """

    def __init__(self, device: torch.device | str = "cpu", limits: Limits = Limits(),
                 judge: Path | None = None):
        super().__init__(name="worker", daemon=True)
        self.device, self.limits, self.judge = device, limits, judge
        self.changed = threading.Condition()
        self.waiting: list[tuple[Served, Job]] = []
        self.calls: list[tuple[Future, Callable[[], object]]] = []
        self.batches: dict[str, Batch] = {}
        self.closing = self.draining = False

    def submit(self, served: Served, job: Job) -> None:
        """Let a job be answered, as soon as its rows have room. Unavailable while closing."""
        with self.changed:
            if self.draining or self.closing:
                raise Unavailable("the server is shutting down")
            self.waiting.append((served, job))
            self.changed.notify()

    def ask(self, function: Callable[[], object]) -> Future:
        """The result of a function that may use the models, called in this thread."""
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise Unavailable("the server is shutting down")
            self.calls.append((future, function))
            self.changed.notify()
        return future

    def model(self, served: Served) -> ModernDecoderLM:
        """Its weights, loaded if they were not. For this thread."""
        if served.name not in self.batches:
            say(f"loading {served.name}: {served.folder}")
            model = load_model(served.folder, device=self.device).eval()
            self.batches[served.name] = Batch(model, served.tokenizer)
        return self.batches[served.name].model

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The verifier, loaded at its first use. For this thread."""
        return load_scorer(self.judge, self.device)

    def drain(self, seconds: float) -> None:
        """Refuse what is new; what is under way ends within so many seconds."""
        with self.changed:
            self.draining, last = True, time.monotonic() + seconds
            written = [job for batch in list(self.batches.values()) for job in batch.jobs()]
            for job in [*written, *(job for _, job in self.waiting)]:
                job.ends_at = min(job.ends_at, last)

    def close(self) -> None:
        """End, at the next token."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.calls or self.waiting or any(
                    batch.lines for batch in self.batches.values()))
                if self.closing:
                    break
                calls, self.calls = self.calls, []
                joining = self._admitted()
            for future, function in calls:
                _answer(future, function)
            for served, jobs in joining.items():
                try:
                    self.model(served)
                    self.batches[served.name].join(jobs)
                except Exception as error:  # these jobs' alone: the thread goes on
                    _end(jobs, served.name, error)
            for name, batch in self.batches.items():
                try:
                    batch.step()
                except Exception as error:
                    jobs = batch.jobs()
                    batch.clear()
                    _end(jobs, name, error)
        gone = Unavailable("the server is shutting down")
        for future, _ in self.calls:
            if future.set_running_or_notify_cancel():  # else nobody waits for it any more
                future.set_exception(gone)
        for job in [*(job for _, job in self.waiting),
                    *(job for batch in self.batches.values() for job in batch.jobs())]:
            job.tell(gone)

    def _admitted(self) -> dict[Served, list[Job]]:
        """The waiting jobs whose rows have room now; none overtakes another of its model."""
        joining: dict[Served, list[Job]] = {}
        full = {name for name, batch in self.batches.items() if not batch.open}
        left, now = [], time.monotonic()
        free = {name: self.limits.rows - batch.active for name, batch in self.batches.items()}
        for served, job in self.waiting:
            if job.cancelled:
                continue
            if now >= job.ends_at:
                job.tell(Unavailable("the request waited as long as it may take: the server has "
                                     "more to do than it can"))
            elif served.name in full or job.rows > free.setdefault(served.name, self.limits.rows):
                full.add(served.name)
                left.append((served, job))
            else:
                free[served.name] -= job.rows
                joining.setdefault(served, []).append(job)
        self.waiting = left
        return joining


def _answer(future: Future, function: Callable[[], object]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:  # the asker's: the thread goes on
            future.set_exception(error)


def _end(jobs: list[Job], name: str, error: Exception) -> None:
    """Tell jobs why they have no answer, and whoever watches the server."""
    say(f"{name}: {type(error).__name__}: {error}")
    for job in jobs:
        job.tell(error)
