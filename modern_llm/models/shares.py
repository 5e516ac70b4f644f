"""Scoring that several processes share: each does a part of the items, all get all results.

What scores batch by batch goes through `shared_map`; whoever trains with several ranks says so
around it with `shared_among`. Alone, it is `map`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
# (rank, ranks, a function that gives every rank's value of what each of them puts in)
_ranks: ContextVar[tuple[int, int, Callable] | None] = ContextVar("ranks", default=None)


@contextlib.contextmanager
def shared_among(rank: int, size: int, gather: Callable[[object], list]) -> Iterator[None]:
    """Inside, `shared_map` is shared by `size` ranks, all of which must call it alike.

    Args:
        gather: a value of this rank -> the list of all ranks' values.
    """
    token = _ranks.set((rank, size, gather))
    try:
        yield
    finally:
        _ranks.reset(token)


def shared_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[Result]:
    """`map(work, items)`, in order, of which each rank does an equal part.

    All ranks call `work` equally often, the last ones perhaps on an item that another has too: it
    may be a model whose weights every call gathers from all ranks.
    """
    if _ranks.get() is None:
        return map(work, items)
    (rank, size, gather), items = _ranks.get(), list(items)
    rounds = -(-len(items) // size)
    mine = [work(items[min(i * size + rank, len(items) - 1)]) for i in range(rounds)]
    found = gather(mine)
    return [found[i % size][i // size] for i in range(len(items))]
