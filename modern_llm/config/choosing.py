"""A preset by its name, or from a JSON file of the same shape, with overrides put in. Imports no
torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from modern_llm.config.checks import ConfigError, nearest, require
from modern_llm.config.overrides import override, parse_overrides
from modern_llm.config.presets import ALIASES, PRESETS
from modern_llm.config.schema import PipelineConfig


def get_pipeline_preset(name_or_path: str = "local-smoke") -> PipelineConfig:
    """The preset of that name (or alias), or the one a JSON file describes.

    A JSON file has the shape of `to_dict`; keys left out keep the default, or the value of the
    preset that its key `base` names; its own name, unless it says one, is the file's. Raises
    ConfigError naming the nearest valid name or key.
    """
    name = ALIASES.get(name_or_path, name_or_path)
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(os.path.expanduser(name_or_path))
    # false, too, of what is no possible name
    if path.suffix != ".json" and not os.path.isfile(path):
        raise ConfigError(
            f"unknown preset {name_or_path!r}{nearest(name_or_path, [*PRESETS, *ALIASES])}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except OSError as error:
        raise ConfigError(f"preset file {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"preset file {str(path)!r} is not valid JSON: {error}") from error
    require(isinstance(values, dict), f"preset file {str(path)!r} must hold a JSON object")
    base = values.pop("base", None)
    require(base is None or isinstance(base, str) and ALIASES.get(base, base) in PRESETS,
            f"{path}: base={base!r} is not a preset{nearest(str(base), PRESETS)}")
    # not the base's: its run is another one
    start = replace(get_pipeline_preset(base) if base else PipelineConfig(), name=path.stem)
    return override(start, values, place=str(path))


def preset_with(name_or_path: str, words: str | None = None) -> PipelineConfig:
    """The preset of that name or file with the overrides that are written in `words`, and with the
    steps of pretraining that its tokens_target wants.
    """
    config = override(get_pipeline_preset(name_or_path), parse_overrides(words or ""), "overrides")
    return override(config, {"pretrain": {"max_steps": steps_wanted(config)}})


def steps_wanted(config: PipelineConfig) -> int:
    """Steps of pretraining: those of data.tokens_target, else pretrain.max_steps."""
    if config.data.tokens_target is None:
        return config.pretrain.max_steps
    return -(-config.data.tokens_target
             // (config.pretrain.batch_size * config.model.context_length))


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError for a key that comes twice, of which JSON would keep the last."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands in one object twice: put both into one")
    return dict(pairs)
