"""What the stages of a run were trained on, and what of it the evaluation's items share: chapter 29
looks it up. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import pandas as pd

from modern_llm.config import TRAINED, PipelineConfig, to_dict, trained_on
from modern_llm.data import synth
from modern_llm.data.reading import documents, rows
from modern_llm.data.sources import dataset_info
from modern_llm.evaluation.overlap import find_overlap


def _built_in_problems() -> Iterator[synth.Problem]:
    """The levels in turn, as the stages draw them."""
    return chain.from_iterable(
        zip(*(synth.problems("train", 0, [level]) for level in (1, 2, 3, 4, 5))))


_BUILT_IN = {
    "text": lambda world, seed: (d.text for d in synth.documents("train", 0, world)),
    "chats": lambda world, seed: ("\n".join(f"{turn.request}\n{turn.output}" for turn in turns)
                                  for turns in synth.conversations("train", 0, world)),
    "pairs": lambda world, seed: (f"{p.prompt}\n{text}"
                                  for p in synth.preferences("train", seed, world)
                                  for text in (p.chosen, p.rejected)),
    "problems": lambda world, seed: (f"{p.question}\n{p.answer}" for p in _built_in_problems()),
    "sentences": lambda world, seed: (r.text for r in synth.sentiment("train", 0)),
}
# what a built-in source of a kind is called in the tables
_CALLED = {"text": "text", "chats": "instruction", "pairs": "preference", "problems": "problem",
           "sentences": "sentiment"}


def training_texts(name: str, kind: str = "", limit: int | None = None,
                   world_seed: int = 0, seed: int = 0) -> Iterator[str]:
    """The training documents of a source, whatever kind it is.

    Args:
        name: a name of DATASET_REGISTRY, or your own file.
        kind: which of the built-in sources, a name of KINDS. Other sources have one kind.
        limit: documents to read; None = all, and of the built-in source, which never ends, 20,000.
        seed: of the run, by which DPO draws the built-in pairs.

    Raises:
        ValueError: the built-in source has no such kind. DatasetNotFound: the source is unknown or
            not here.
    """
    info = dataset_info(name)
    if info.name == "synthetic":
        if (kind := kind or "text") not in _BUILT_IN:
            raise ValueError(f"training_texts: the built-in source has no kind {kind!r}; use one "
                             f"of {', '.join(_BUILT_IN)}")
        return islice(_BUILT_IN[kind](world_seed, seed), 20_000 if limit is None else limit)
    if info.kind == "pairs":  # both answers were read, with the dialogue before them
        return islice((row[side] for row in rows(name, "train")
                       for side in (*info.fields, *info.needed_columns) if row.get(side)), limit)
    return islice(documents(name, "train", world_seed), limit)


def training_sources(config: PipelineConfig, stages: Iterable[str] = TRAINED) -> pd.DataFrame:
    """What the stages of a run train on: source (a label), name, kind, stages ("sft, verifier"),
    one line each.
    """
    kinds = {"synthetic-problems": ("synthetic", "problems")}
    by_source: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for name, kind in (kinds.get(name, (name, kind))
                           for name, kind in trained_on(stage, to_dict(config))):
            info = dataset_info(name)
            place = by_source.setdefault(
                (name, kind if info.name == "synthetic" else info.kind), [])
            place += [stage] * (stage not in place)
    label = lambda name, kind: f"built-in {_CALLED[kind]}" if name == "synthetic" else name
    return pd.DataFrame([{"source": label(name, kind), "name": name, "kind": kind,
                          "stages": ", ".join(used)} for (name, kind), used in by_source.items()])


def run_overlap(sets: Mapping[str, Sequence[str]], sources: pd.DataFrame, limit: int | None = None,
                world_seed: int = 0, seed: int = 0, progress: bool = False,
                **options) -> pd.DataFrame:
    """`find_overlap` of the sets with each line of `training_sources`: its columns behind "source".

    Args:
        limit, world_seed, seed: of `training_texts`.
        options: n and shortest of `find_overlap`.
    """
    return pd.concat([find_overlap(sets, training_texts(row.name_, row.kind, limit, world_seed,
                                                        seed),
                                   progress=f"overlap with {row.source}" * progress, **options)
                          .assign(source=row.source)
                      for row in sources.rename(columns={"name": "name_"}).itertuples()],
                     ignore_index=True)[["source", "set", "item", "ngrams", "found", "share",
                                         "example"]]
