"""Small models trained side by side, for a chapter that is an experiment: the same text in an order
that the seed decides, and differences over the seeds with an interval.

A plain module; chapters 55 to 59 use it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from modern_llm.config import TrainConfig
from modern_llm.data.reading import documents
from modern_llm.data.tokens import encode_documents, end_of_text_id, train_tokenizer
from modern_llm.training.checkpoints import read_metrics
from modern_llm.training.optim import lm_loss
from modern_llm.training.trainer import Trainer

# Student's quantile of 97.5% by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


def joined(texts: Iterable[str], tokenizer: Tokenizer, wanted: int) -> Tensor:
    """The ids of documents, one behind the other, each behind the token that ends a text; at most
    `wanted` of them.
    """
    ids, end, texts = [], end_of_text_id(tokenizer), iter(texts)
    while len(ids) < wanted and (part := list(islice(texts, 500))):
        for document in encode_documents(tokenizer, part):
            ids += [end, *document]
    return torch.tensor(ids[:wanted])


@dataclass(frozen=True)
class SmallText:
    """A tokenizer learned on a source, and the ids of its documents to train on and held out."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, source: str, vocabulary: int, train: int, held_out: int) -> SmallText:
        """At most so many tokens of each part. ValueError if the text held out is shorter."""
        tokenizer = train_tokenizer(islice(documents(source, "train"), 4000), vocabulary)
        found = cls(tokenizer, joined(documents(source, "train"), tokenizer, train),
                    joined(documents(source, "validation"), tokenizer, held_out))
        if len(found.held_out) < held_out:
            raise ValueError(f"{source}, validation: has {len(found.held_out):,} tokens, of which "
                             f"{held_out:,} are wanted: ask for fewer")
        return found

    def batch(self, step: int, rows: int, context: int, seed: int) -> dict[str, Tensor]:
        """Rows from random places of the training text: a function of seed and step."""
        starts = np.random.default_rng([seed, step]).integers(len(self.train) - context - 1,
                                                              size=rows)
        ids = torch.stack([self.train[start:start + context + 1] for start in starts.tolist()])
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def train_small(model: nn.Module, text: SmallText, cfg: TrainConfig, context: int, seed: int,
                change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch,
                evaluate: Callable[[nn.Module], dict[str, float]] | None = None) -> pd.DataFrame:
    """Train a model in place by the trainer of every stage; returns the rows of its metrics.

    Args:
        change: what becomes of a batch of `SmallText.batch`.
        evaluate: as `Trainer` has it.
    """
    batches = lambda step: change(text.batch(step, cfg.batch_size, context, seed))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, lm_loss, batches, cfg, folder, evaluate=evaluate, device="cpu",
                seed=seed, progress_bar=False).fit()
        return pd.DataFrame(read_metrics(Path(folder) / "metrics.jsonl"))


def seed_differences(table: pd.DataFrame, column: str, names: Iterable[str],
                     against: str) -> pd.DataFrame:
    """Mean over the seeds of a model's value less another's, with the 95% interval of that many
    numbers (Student): a row for each of `names`.

    Args:
        table: a row for each `model` and `seed`.
    """
    wide = table.pivot(index="seed", columns="model", values=column)
    found = {}
    for name in names:
        each = wide[name] - wide[against]
        half = STUDENT[len(each) - 1] * each.std() / len(each) ** 0.5
        found[name] = {"difference": each.mean(), "low": each.mean() - half,
                       "high": each.mean() + half}
    return pd.DataFrame(found).T
