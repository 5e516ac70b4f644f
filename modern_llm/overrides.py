"""A config as plain values and back: from JSON objects or from words like `model.width=64`, each value checked, none converted silently."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import types
import typing

from modern_llm.config import ConfigError, nearest, require

# Settings where one word is a list of one; those of names, where a file may be called `2024` or `a, b.txt`.
LISTS = ("weights", "levels", "sampled_levels", "shots")
NAMES = ("sources", "replay_sources", "protocol_sources", "baselines")


def to_dict(config: object) -> dict:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: typing.Any, values: dict, place: str = "") -> typing.Any:
    """A copy of a config dataclass with the (nested) `values` set; unknown keys and wrong types raise ConfigError."""
    hints = typing.get_type_hints(type(config))
    changed = {}
    for key, value in values.items():
        where = f"{place}: {key}" if place and ":" not in place else f"{place}.{key}" if place else key
        require(key in hints, f"{where} is no setting of {type(config).__name__}{nearest(str(key), hints)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            require(isinstance(value, dict), f"{where}={value!r} must be a JSON object of {type(current).__name__}")
            changed[key] = override(current, value, where)
        else:
            changed[key] = _checked(where, value, hints[key])
    return dataclasses.replace(config, **changed)


def _checked(place: str, value: typing.Any, hint: typing.Any) -> typing.Any:
    """`value` as the annotated type says, without silent conversions other than int → float and list → tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _checked(place, value, next(option for option in options if option is not type(None)))
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        require(len(inner) == len(value), f"{place}={value!r} must have {len(inner)} entries")
        return tuple(_checked(f"{place}[{i}]", v, h) for i, (v, h) in enumerate(zip(value, inner)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or hint
    name = {tuple: "a list"}.get(wanted, getattr(wanted, "__name__", str(wanted)))
    ok = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    require(ok, f"{place}={value!r} is {type(value).__name__}, should be {name}")
    return value


def parse_overrides(text: str) -> dict:
    """`"model.num_experts=4 data.sources=synthetic"` as the nested dict that `override` takes.

    Values are JSON where they parse as JSON, else strings; a comma makes a list, nothing behind the sign an empty one.
    Names of sources and models stay text.
    """
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"overrides={text!r} cannot be read: {error}") from error
    nested: dict = {}
    for item in items:
        path, equals, raw = item.partition("=")
        *parents, leaf = path.split(".")
        if not equals or not leaf:
            raise ConfigError(f"overrides: {item!r} must look like model.width=256")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"overrides: {path!r} is set both as a value and as a section")
        value = _json_or_text(raw) if raw[:1] in '[{"' or "," not in raw else [_json_or_text(r) for r in raw.split(",")]
        listed = [value] * (raw != "") if leaf in LISTS and not isinstance(value, list) else value
        place[leaf] = _names(raw) if leaf in NAMES else listed
    return nested


def _names(raw: str) -> list:
    """A JSON list or text; else one name, if something is called so; else the names between the commas."""
    value = _json_or_text(raw)
    if isinstance(value, list) or raw[:1] == '"' and value != raw:
        return value if isinstance(value, list) else [value]
    return [raw] * (raw != "") if "," not in raw or os.path.lexists(os.path.expanduser(raw)) else raw.split(",")


def _json_or_text(raw: str) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return raw
