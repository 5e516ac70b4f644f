"""What is asked of a `StageSpec`: its notebook, its settings and how they differ from earlier ones,
what it trains. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from modern_llm.config import STAGES, PipelineConfig, to_dict
from modern_llm.config.datasets import function_of
from modern_llm.files import CHECKOUT

# Those of a stage's own settings that may change while it is under way: how long and how often, by
# which means, and the learning rates of the steps to come. All the others made what is there
# already.
MAY_CHANGE = (
    "max_steps", "max_minutes", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    "micro_batch_size", "precision", "compile", "gradient_checkpointing", "loss_chunk_tokens",
    "lr", "muon_lr", "weight_decay", "betas", "schedule", "warmup_steps", "decay_fraction",
    "final_lr_fraction", "grad_clip",
)


def notebooks_folder() -> Path:
    """`nbs/` of the checkout. FileNotFoundError if the package was installed without it."""
    folder = CHECKOUT / "nbs"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no notebooks at {folder}: run from a checkout installed with `pip install -e .`")
    return folder


def notebook_of(stage: str) -> Path:
    """The notebook that is the stage. FileNotFoundError as `notebooks_folder`."""
    return notebooks_folder() / STAGES[stage].notebook


def recipe_of(stage: str) -> type:
    """The class that prepares and trains a stage on every rank, made of its run; imports torch."""
    return function_of(STAGES[stage].recipe)


def setting(config: PipelineConfig, path: str) -> object:
    """The value at a dotted path."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def sections(config: PipelineConfig, stage: str) -> dict:
    """The settings that the stage's result depends on, as plain JSON values keyed by their dotted
    path.
    """
    found = {}
    for path in STAGES[stage].settings:
        value = setting(config, path)
        found[path] = (to_dict(value) if dataclasses.is_dataclass(value)
                       else json.loads(json.dumps(value)))
    return found


def changes(former: dict, wanted: dict, place: str = "") -> list[str]:
    """`sft.lr: 0.003 -> 0.001` for every setting that differs; what follows the machine is left
    out: micro-batches, and a precision that is "auto" on one side.
    """
    lines = []
    for name in dict.fromkeys([*former, *wanted]):
        path, one, other = f"{place}{name}", former.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += changes(one, other, f"{path}.")
        elif name == "micro_batch_size" or name == "precision" and "auto" in (one, other):
            continue
        elif one != other or (name in former) != (name in wanted):
            values = (json.dumps(side[name]) if name in side else "not there"
                      for side in (former, wanted))
            lines.append(f"{path}: {' -> '.join(values)}")
    return lines
