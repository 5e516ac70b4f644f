"""What every setting is checked by: an error that names the value, the place and the remedy. No
torch.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

from modern_llm.config.datasets import columns_of, names_of
from modern_llm.messages import UserError


class ConfigError(UserError, ValueError):
    """A setting that cannot be used. The message names the value, the place and the remedy."""


def nearest(value: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, else the list of valid ones."""
    options = list(options)
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(options)}"


def require(claim: bool, message: str) -> None:
    """Raise ConfigError with the message if the claim is false."""
    if not claim:
        raise ConfigError(message)


def device_parts(place: str, name: str) -> tuple[str, int | None]:
    """What a device is called, taken apart: kind and number, None where it has none. ConfigError if
    it is not a name of a device.
    """
    found = re.fullmatch(r"(auto|cpu|mps|cuda)|(cpu|mps):(0)|(cuda):(0|[1-9][0-9]{0,3})", name)
    require(found is not None,
            f"{place}={name!r} is unknown: say auto (the best there is), cpu, mps (Apple silicon), "
            "cuda (an NVIDIA or AMD GPU), or cuda:1 for the second of several GPUs")
    kind, *number = filter(None, found.groups())
    return kind, int(number[0]) if number else None


def divisors(number: int, times: int = 1) -> list[int]:
    """What divides a number, also when multiplied by `times`: those up to 1024."""
    return [n for n in range(1, min(number, 1024) + 1) if number % (times * n) == 0]


def require_sources(section: str, names: tuple[str, ...], *kinds: str) -> None:
    require(len(names) > 0,
            f"{section}.sources is empty; name at least one, for example 'synthetic'")
    require(len(set(names)) == len(names), f"{section}.sources={list(names)} names a source twice")
    if kinds:
        valid, (own, columns) = names_of(*kinds), columns_of(kinds[0])
        for name in names:
            require(name in valid,
                    f"{section}.sources={name!r} is unknown{nearest(name, valid)}; rows of your "
                    f"own, with {columns}, are read from $MODERN_LLM_DATA/{own}/train.jsonl by the "
                    f"name {own!r}")


def require_one_of(place: str, value: str, options: tuple[str, ...]) -> None:
    require(value in options, f"{place}={value!r} is unknown{nearest(str(value), options)}")


def require_positive(place: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{place}.{name}={value} must be greater than 0, and finite")
