"""What a stage is: its notebook, the settings and data that its result depends on, and what it
starts from. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from modern_llm.config import GENERATORS, PipelineConfig, to_dict
from modern_llm.files import CHECKOUT

NOTEBOOKS = {"pretrain": "03_pretrain.ipynb", "sft": "04_sft.ipynb", "dpo": "05_dpo.ipynb",
             "verifier": "06_verifier.ipynb", "eval": "07_eval.ipynb",
             "attention": "08_attention_viz.ipynb"}  # in the order of the pipeline
# Settings that a stage's result depends on, besides the checkpoints it starts from.
SECTIONS = {
    "pretrain": ("model", "data", "pretrain", "seed"),
    "sft": ("data", "sft", "seed"),
    "dpo": ("data", "dpo", "seed"),
    "verifier": ("data", "verifier", "seed"),
    "eval": ("data", "eval", "sft.sources", "dpo.sources", "seed"),
    "attention": ("data", "seed"),
}
# Those of a stage's own settings that may change while it is under way: how long and how often, by
# which means, and the learning rates of the steps to come. All the others made what is there
# already.
MAY_CHANGE = (
    "max_steps", "max_minutes", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    "micro_batch_size", "precision", "compile", "gradient_checkpointing", "loss_chunk_tokens",
    "lr", "muon_lr", "weight_decay", "betas", "schedule", "warmup_steps", "decay_fraction",
    "final_lr_fraction", "grad_clip",
)
# Where data sets are named that a stage reads.
DATA = {
    "pretrain": ("data.sources",),
    "sft": ("sft.sources", "data.sources"),
    "dpo": ("dpo.sources", "dpo.replay_sources", "data.sources"),
    "verifier": ("verifier.problems",),
    "eval": ("data.sources", "dpo.sources", "eval.problems", "eval.sentiment",
             "eval.protocol_sources"),
    "attention": (),
}
FIRST_OF = {"sft": ("pretrain",), "dpo": ("sft",),
            "verifier": ("dpo", "sft"), "attention": GENERATORS}
ALL_OF = {"eval": ("pretrain", "sft", "dpo", "verifier")}
# what is made for the preset "lesson" when there is nothing
BASES = {"sft": ("pretrain",), "dpo": ("pretrain", "sft"), "verifier": ("pretrain", "sft"),
         "eval": ("pretrain", "sft"), "attention": ("pretrain",)}


def notebooks_folder() -> Path:
    """`nbs/` of the checkout. FileNotFoundError if the package was installed without it."""
    folder = CHECKOUT / "nbs"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no notebooks at {folder}: run from a checkout installed with `pip install -e .`")
    return folder


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
    for path in SECTIONS[stage]:
        value = setting(config, path)
        found[path] = (to_dict(value) if dataclasses.is_dataclass(value)
                       else json.loads(json.dumps(value)))
    return found


def changes(former: dict, wanted: dict, place: str = "") -> list[str]:
    """`sft.lr: 0.003 -> 0.001` for every setting that differs; micro-batches are left out: they
    follow the memory.
    """
    lines = []
    for name in dict.fromkeys([*former, *wanted]):
        path, one, other = f"{place}{name}", former.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += changes(one, other, f"{path}.")
        elif (one != other or (name in former) != (name in wanted)) and name != "micro_batch_size":
            lines.append(
                f"{path}: "
                f"{' -> '.join(json.dumps(side[name]) if name in side else 'not there' for side in (former, wanted))}")
    return lines
