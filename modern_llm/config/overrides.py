"""A config as plain values and back: from JSON objects or from words like `model.width=64`, each
value checked, none converted silently.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import sys
import types
import typing

from modern_llm.config.checks import ConfigError, nearest, require
from modern_llm.config.schema import PipelineConfig

_hints = functools.cache(typing.get_type_hints)
# Python's words, which the parameters of a notebook are written in
PLAIN = {"True": "true", "False": "false", "None": "null"}


def to_dict(config: object) -> dict:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: typing.Any, values: dict, place: str = "") -> typing.Any:
    """A copy of a config dataclass with the (nested) `values` set; unknown keys and wrong types
    raise ConfigError.
    """
    hints = _hints(type(config))
    changed = {}
    for key, value in values.items():
        where = (f"{place}: {key}" if place and ":" not in place
                 else f"{place}.{key}" if place else key)
        if key not in hints:
            raise ConfigError(f"{where} is not a setting of {type(config).__name__}"
                              f"{nearest(str(key), hints)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            require(isinstance(value, dict),
                    f"{where}={value!r} must be a JSON object of {type(current).__name__}")
            changed[key] = override(current, value, where)
        else:
            changed[key] = _checked(where, value, hints[key])
    return dataclasses.replace(config, **changed)


def _checked(place: str, value: typing.Any, hint: typing.Any) -> typing.Any:
    """`value` as the annotated type says, without silent conversions other than int → float and
    list → tuple.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        fitting = [option for option in options if isinstance(value, option)] if (
            len(options) > 1) else options
        return _checked(place, value, (fitting or options)[0])
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        require(len(inner) == len(value), f"{place}={value!r} must have {len(inner)} entries")
        return tuple(_checked(f"{place}[{i}]", v, h) for i, (v, h) in enumerate(zip(value, inner)))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        # false of NaN, too
        require(abs(value) <= sys.float_info.max, f"{place}={value!r:.40} must be a finite number")
        return float(value)
    wanted = origin or hint
    name = {tuple: "a list"}.get(wanted, getattr(wanted, "__name__", str(wanted)))
    ok = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    require(wanted is not int or not ok or abs(value) < 2**63,
            f"{place}={value!r:.40} must lie in -2**63..2**63")
    require(ok, f"{place}={value!r} is {type(value).__name__}, should be {name}")
    return value


def parse_overrides(text: str) -> dict:
    """`"model.num_experts=4 data.sources=synthetic"` as the nested dict that `override` takes.

    A value is read as its setting wants it: text stays text, a comma makes a list, nothing behind
    the sign an empty one; all else is as in JSON or in a notebook (True, None, .5).
    """
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"overrides={text!r} cannot be read: {error}") from error
    nested: dict = {}
    for item in items:
        path, equals, raw = item.partition("=")
        *parents, leaf = (path := path.strip()).split(".")
        if not equals or not leaf:
            raise ConfigError(f"overrides: {item!r} must look like model.width=256")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"overrides: {path!r} is set both as a value and as a section")
        value, former = _as_wanted(raw, _hint(path)), place.get(leaf, {})
        if isinstance(former, dict) != isinstance(value, dict) and leaf in place:
            raise ConfigError(f"overrides: {path!r} is set both as a value and as a section")
        place[leaf] = {**former, **value} if isinstance(value, dict) else value
    return nested


def _hint(path: str) -> object:
    """The annotated type of the setting at a dotted path; None if there is none."""
    hint: object = PipelineConfig
    for name in path.split("."):
        hint = _hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint


def _as_wanted(raw: str, hint: object) -> object:
    """A word as a value for a setting of this type; what does not fit is left for `override` to
    refuse.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if raw in ("null", "None") else _as_wanted(
            raw, next(option for option in options if option is not type(None)))
    if origin is tuple:
        return _names(raw) if options[0] is str else _numbers(raw)
    value = json_or_text(raw)
    # a model may be called 2024, or true
    return raw if hint is str and not isinstance(value, str) else value


def _names(raw: str) -> list:
    """A JSON list or text; else one name, if something is called so; else the names between the
    commas.
    """
    value = json_or_text(f"[{raw}]" if raw[:1] == '"' else raw)
    if isinstance(value, list):
        return value
    return ([raw] * (raw != "") if "," not in raw or os.path.lexists(os.path.expanduser(raw))
            else raw.split(","))


def _numbers(raw: str) -> list:
    """A JSON list; else the values between the commas."""
    value = json_or_text(raw)
    return (value if isinstance(value, list)
            else [json_or_text(part) for part in raw.split(",")] if raw else [])


def json_or_text(raw: str) -> object:
    """What a word says as JSON, or in Python's and people's spelling: True, None, .5, 5., +5; the
    word itself, if it is nothing of that.
    """
    plain = PLAIN.get(word := raw.strip(), word)
    if found := re.fullmatch(r"([+-]?)(\d+|(?=\.\d))(?:\.(\d*))?([eE][+-]?\d+)?", word, re.ASCII):
        sign, whole, part, power = found.groups()
        plain = (sign.strip("+") + (whole.lstrip("0") or "0")
                 + (f".{part or 0}" if part is not None else "") + (power or ""))
    try:
        return json.loads(plain)
    except (ValueError, RecursionError):
        return raw
