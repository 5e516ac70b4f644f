"""Answers of one model that are written together: each token is one pass over all rows, and between
two tokens rows come and go. A row draws numbers of its own, so its text is that of `generate` alone
but for rounding: a batch of another size adds in another order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modern_llm.models.attention import KVCache
from modern_llm.models.generation import Row, Sampling, choose, left_padded, row_uniforms

if TYPE_CHECKING:
    from jaxtyping import Float
    from tokenizers import Tokenizer

    from modern_llm.models.decoder import ModernDecoderLM

ROWS_A_STEP = 8  # for so many rows, newcomers wait one step more: a join costs as much as one


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer."""

    index: int  # which answer of the job, prompt by prompt
    text: str
    tokens: int  # drawn for this answer so far, the one that ended it included
    finish: str = ""  # with the last piece "stop" or "length"


@dataclass(eq=False)
class Job:
    """Prompts that one request wants continued, each `sampling.samples` times.

    Args:
        prompts: token ids of each, shorter than the context.
        sampling: how; answer k of every prompt draws stream k of its seed.
        tell: is given each `Piece`, or the exception that ended the job, in the worker's thread.
        stops: texts that end an answer and are no part of it.
        ends_at: `time.monotonic()` from which on nothing more is written.
        cancelled: whether nobody waits for it any more; its rows then leave.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    tell: Callable[[Piece | Exception], None]
    stops: Sequence[str] = ()
    ends_at: float = math.inf
    cancelled: bool = False

    @property
    def rows(self) -> int:
        """How many answers are written."""
        return len(self.prompts) * self.sampling.samples


def ready_text(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    """How many letters can be shown, and whether one of the `stops` comes behind them. An end that
    may grow into a stop, or is half of a character, is held back.
    """
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        return min(ends), True
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
               default=0)
    return min(len(text) - held, len(text.rstrip("\ufffd"))), False


@dataclass(eq=False)
class Line:
    """One answer while it is written: its tokens, and the text that was told of them."""

    job: Job
    index: int
    row: Row
    uniforms: list[float]  # that its tokens are drawn with
    tokens: list[int] = field(default_factory=list)
    said: str = ""
    done: bool = False

    @property
    def next_uniform(self) -> float:
        """What its next token is drawn with."""
        return self.uniforms[min(len(self.row.tokens), len(self.uniforms) - 1)]

    def advance(self, token: int, log_prob: float, tokenizer: Tokenizer) -> None:
        """Add a token, and tell the job what text it made certain."""
        self.tokens += self.row.advance(token, log_prob, self.job.sampling)
        text = tokenizer.decode(self.tokens)
        ready, stopped = ready_text(text, self.job.stops)
        self.done = stopped or self.row.done or time.monotonic() >= self.job.ends_at
        if self.done and not stopped:
            ready = len(text)
        new, self.said = text[len(self.said):ready], text[:max(ready, len(self.said))]
        if new or self.done or len(self.row.tokens) == 1:  # the first says that it has begun
            ended = stopped or self.row.reason == "ending"
            finish = ("stop" if ended else "length") if self.done else ""
            self.job.tell(Piece(self.index, new, len(self.row.tokens), finish))


def joined(caches: Sequence[KVCache], room: int) -> KVCache:
    """One cache with the rows of several, which then end at the same index, and `room` for further
    tokens; padding that no row needs is left out. A key keeps the position it was turned by.
    """
    pads = [torch.zeros(cache.keys.shape[1], dtype=torch.long, device=cache.keys.device)
            if cache.pad_lengths is None else cache.pad_lengths for cache in caches]
    lengths = torch.cat([cache.length - pad for cache, pad in zip(caches, pads)])
    longest = int(lengths.max())
    layers, _, groups, _, width = caches[0].keys.shape
    whole = KVCache(layers, len(lengths), groups, longest + room, width, caches[0].keys.dtype,
                    caches[0].keys.device, longest - lengths)
    first = 0
    for cache in caches:
        taken, behind = min(cache.length, longest), first + cache.keys.shape[1]
        new, old = slice(longest - taken, longest), slice(cache.length - taken, cache.length)
        whole.keys[:, first:behind, :, new] = cache.keys[..., old, :]
        whole.values[:, first:behind, :, new] = cache.values[..., old, :]
        first = behind
    whole.length = longest
    return whole


class Batch:
    """The rows that one model writes at a time.

    Args:
        model: in evaluation.
        tokenizer: its own.
    """

    def __init__(self, model: ModernDecoderLM, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.embed_tokens.weight.device
        self.lines: list[Line] = []
        self.cache: KVCache | None = None
        self.ids: Tensor | None = None  # (rows, 1) the last token of each
        self.steps = 0  # since somebody joined

    @property
    def active(self) -> int:
        """Rows that are still written."""
        return sum(not line.done for line in self.lines)

    @property
    def open(self) -> bool:
        """Whether somebody may join now: the more rows wait meanwhile, the rarer it is."""
        return self.steps >= self.active // ROWS_A_STEP

    def jobs(self) -> list[Job]:
        """Whose rows are here, each once."""
        return list(dict.fromkeys(line.job for line in self.lines))

    @torch.inference_mode()
    def join(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of some jobs, together, and let their answers go on with the others.

        Raises:
            ValueError: the model's logits are not finite; the other rows are as they were.
        """
        asked = [(job, prompt) for job in jobs for prompt in job.prompts]
        ids, pads = left_padded([prompt for _, prompt in asked], self.device)
        cache = self.model.new_cache(len(asked), ids.shape[1], pads)
        logits, lines = self._logits(ids, cache), []
        for job in jobs:
            for number in range(job.rows):
                prompt, stream = divmod(number, job.sampling.samples)
                context = self.model.cfg.context_length - len(job.prompts[prompt])
                room = min(job.sampling.max_new_tokens, context)
                uniforms = row_uniforms(job.sampling.seed, [stream], room)[0].tolist()
                lines.append(Line(job, number, Row(room), uniforms))
        copies = torch.tensor([i for i, (job, _) in enumerate(asked)
                               for _ in range(job.sampling.samples)], device=self.device)
        cache.select(copies)
        tokens = self._draw(lines, logits[copies])
        self._keep([i for i, line in enumerate(self.lines) if not line.done])
        before = [] if self.cache is None else [(self.cache, self.ids)]
        caches, last = zip(*before, (cache, tokens[:, None]))
        lines = self.lines + lines
        whole = joined(caches, max(line.row.room - len(line.row.tokens) for line in lines))
        self.lines, self.cache, self.ids, self.steps = lines, whole, torch.cat(last), 0
        self._leave()

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row. ValueError: the model's logits are not finite."""
        for line in self.lines:
            line.done = line.done or line.job.cancelled
        self._leave()
        self.steps += 1
        if self.lines:
            self.ids = self._draw(self.lines, self._logits(self.ids, self.cache))[:, None]
            self._leave()

    def clear(self) -> None:
        """Without any rows."""
        self.lines, self.cache, self.ids = [], None, None

    def _logits(self, ids: Tensor, cache: KVCache) -> Float[Tensor, "b v"]:
        return self.model.lm_head(self.model.hidden(ids, cache=cache)[0][:, -1]).float()

    def _draw(self, lines: Sequence[Line], logits: Float[Tensor, "b v"]) -> Tensor:
        """The next token of each row, which the lines that are not done are told."""
        log_p = logits.log_softmax(-1)
        if not log_p[:, 0].isfinite().all():  # one bad logit spoils its whole row
            raise ValueError("the model's logits are not finite: its weights have diverged or are "
                             "damaged; serve an earlier checkpoint")
        u = torch.tensor([line.next_uniform for line in lines], device=self.device)
        tokens = torch.zeros(len(lines), dtype=torch.long, device=self.device)
        log_probs = torch.zeros(len(lines), device=self.device)
        alike: dict[tuple, list[int]] = {}  # rows whose distribution is made in the same way
        for i, line in enumerate(lines):
            how = line.job.sampling
            alike.setdefault((how.temperature, how.top_k, how.top_p, how.min_p), []).append(i)
        for rows in alike.values():
            tokens[rows], log_probs[rows] = choose(log_p[rows], lines[rows[0]].job.sampling,
                                                   u[rows])
        for line, token, log_prob in zip(lines, tokens.tolist(), log_probs.tolist()):
            if not line.done:
                line.advance(token, log_prob, self.tokenizer)
        return tokens

    def _leave(self) -> None:
        """Let finished rows go, once they are half of the batch: each time copies the cache."""
        active = [i for i, line in enumerate(self.lines) if not line.done]
        if 2 * len(active) <= len(self.lines):
            self._keep(active)

    def _keep(self, rows: list[int]) -> None:
        if not rows:
            self.clear()
        elif len(rows) < len(self.lines):
            self.cache.select(torch.tensor(rows, device=self.device))
            self.ids, self.lines = self.ids[rows], [self.lines[i] for i in rows]
