"""What a stage starts from: earlier checkpoints of its run, or one given by hand.

Plain plumbing under `stage`. Also the facts about stages that both a stage and the pipeline need: which notebook it is,
which settings it depends on, which data it reads. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from modern_llm.config import BUILT_IN, PipelineConfig
from modern_llm.files import find_folder, read_json, sha256
from modern_llm.overrides import to_dict

NOTEBOOKS = {"pretrain": "03_pretrain.ipynb", "sft": "04_sft.ipynb", "dpo": "05_dpo.ipynb", "verifier": "06_verifier.ipynb",
             "eval": "07_eval.ipynb", "attention": "08_attention_viz.ipynb"}  # in the order of the pipeline

# Settings that a stage's result depends on, besides the checkpoints it starts from.
SECTIONS = {
    "pretrain": ("model", "data", "pretrain", "seed"),
    "sft": ("data", "sft", "seed"),
    "dpo": ("data", "dpo", "seed"),
    "verifier": ("data", "verifier", "seed"),
    "eval": ("data", "eval", "sft.sources", "dpo.sources", "seed"),
    "attention": ("data", "seed"),
}
# Those of a stage's own settings that may change while it is under way: how long and how often, by which means, and the learning rates
# of the steps to come. All the others made what is there already.
MAY_CHANGE = (
    "max_steps", "max_minutes", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    "micro_batch_size", "precision", "compile", "gradient_checkpointing", "loss_chunk_tokens",
    "lr", "muon_lr", "weight_decay", "betas", "schedule", "warmup_steps", "decay_fraction", "final_lr_fraction", "grad_clip",
)
# Where data sets are named that a stage reads.
DATA = {
    "pretrain": ("data.sources",),
    "sft": ("sft.sources", "data.sources"),
    "dpo": ("dpo.sources", "dpo.replay_sources", "data.sources"),
    "verifier": ("verifier.problems",),
    "eval": ("data.sources", "dpo.sources", "eval.problems", "eval.sentiment", "eval.protocol_sources"),
    "attention": (),
}
GENERATORS = ("dpo", "sft", "pretrain")  # the stages that make a language model, the last one first
FIRST_OF = {"sft": ("pretrain",), "dpo": ("sft",), "verifier": ("dpo", "sft"), "attention": GENERATORS}
ALL_OF = {"eval": ("pretrain", "sft", "dpo", "verifier")}
BASES = {"sft": ("pretrain",), "dpo": ("pretrain", "sft"), "verifier": ("pretrain", "sft"), "eval": ("pretrain", "sft"),
         "attention": ("pretrain",)}  # what is made for the preset "lesson" when there is nothing


class StageError(RuntimeError):
    """The stage cannot start. The message names the value, the place and the remedy."""


class Preempted(BaseException):
    """SIGTERM or SIGUSR1 came, a scheduler's warning: what runs ends now and goes on at its next start."""


WARNINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # signals of a scheduler


def say(text: str) -> None:
    """A line for whoever watches, not for the notebook's record: it may name times and places."""
    print(text, file=sys.stderr, flush=True)


def read_record(path: Path) -> dict:
    """A JSON object that a stage wrote. StageError if it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{path} is damaged ({getattr(error, 'what', error)})") from error


def notebooks_folder() -> Path:
    """`nbs/` of the checkout. FileNotFoundError if the package was installed without it."""
    folder = Path(__file__).resolve().parent.parent / "nbs"
    if not folder.is_dir():
        raise FileNotFoundError(f"no notebooks at {folder}: run from a checkout installed with `pip install -e .`")
    return folder


# ---- settings and data of a stage ------------------------------------------------------------------------------------


def setting(config: PipelineConfig, path: str) -> object:
    """The value at a dotted path."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def sections(config: PipelineConfig, stage: str) -> dict:
    """The settings that the stage's result depends on, as plain JSON values keyed by their dotted path."""
    found = {}
    for path in SECTIONS[stage]:
        value = setting(config, path)
        found[path] = to_dict(value) if dataclasses.is_dataclass(value) else json.loads(json.dumps(value))
    return found


def changes(former: dict, wanted: dict, place: str = "") -> list[str]:
    """`sft.lr: 0.003 -> 0.001` for every setting that differs; micro-batches are left out: they follow the memory."""
    lines = []
    for name in dict.fromkeys([*former, *wanted]):
        path, one, other = f"{place}{name}", former.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += changes(one, other, f"{path}.")
        elif (one != other or (name in former) != (name in wanted)) and name != "micro_batch_size":
            lines.append(f"{path}: {' -> '.join(json.dumps(side[name]) if name in side else 'not there' for side in (former, wanted))}")
    return lines


def data_names(config: PipelineConfig, stage: str) -> list[str]:
    """The data sets that the stage reads and that have to be found; what is built in is always there."""
    found: list[str] = []
    for path in DATA[stage]:
        value = setting(config, path)
        found += [value] if isinstance(value, str) else list(value)
    return [name for name in dict.fromkeys(found) if name not in ("text", *BUILT_IN)]  # "text": data.sources


def missing_data(config: PipelineConfig, stages: Iterable[str]) -> list[str]:
    """Why each data set that the stages read and that is not here cannot be had; nothing is downloaded."""
    from modern_llm.sources import DatasetNotFound, dataset_info, find_source, missing_reason, remedy

    problems, absent, files = [], {}, {}
    for name in config.data.sources:
        with contextlib.suppress(DatasetNotFound):  # an unknown name is a case of its own
            info = dataset_info(name)
            first = files.setdefault(tuple(map(os.path.realpath, info.files["train"])) if info.licence == "your own" else info.name, name)
            if first != name:
                problems.append(f"data: data.sources names the same source twice: {first!r} and {name!r}")
    for name in dict.fromkeys(name for stage in stages for name in data_names(config, stage)):
        try:
            find_source(name)
        except DatasetNotFound as error:
            try:
                absent[name] = missing_reason(dataset_info(name))
            except DatasetNotFound:  # an unknown name: the message knows the nearest one
                problems.append(f"data: {error}")
    if absent:
        name, reason = next(iter(absent.items()))
        problems.append(f"data: {', '.join(absent)} not found. Tried, for {name}, {reason}. Remedy, for each: {remedy()}")
    if "pretrain" in stages and config.data.tokenizer == "gpt2":
        from modern_llm.tokens import gpt2_tokenizer

        try:
            gpt2_tokenizer()
        except DatasetNotFound as error:
            problems.append(f"data: {error}")
    return problems


def cut_data(config: PipelineConfig, stage: str) -> tuple[list[str], list[str]]:
    """Of the plain files that a stage reads: how those are split that came without a held-out part, and why others cannot be used."""
    from modern_llm.reading import how_split
    from modern_llm.sources import DataError, DatasetNotFound, find_source

    said, problems = [], []
    for name in data_names(config, stage):
        try:
            if find_source(name).files and (how := how_split(name)):
                said.append(f"{name}: {how}")
        except DatasetNotFound:  # `missing_data` says so
            continue
        except DataError as error:
            problems.append(f"data: {error}")
    return said, problems


def data_files(config: PipelineConfig, stage: str, known: dict | None = None) -> dict[str, dict]:
    """Path, size, time of change and sha256 of every plain file of the data sets that a stage reads (the hub has versions of its own).

    What `known` says of a file is believed as long as path, size and time are the same.
    """
    from modern_llm.sources import DatasetNotFound, find_source

    found = {}
    for name in data_names(config, stage):
        try:
            source = find_source(name)
        except DatasetNotFound:  # `missing_data` says so
            continue
        for path in sorted({path for paths in source.files.values() for path in paths}):
            facts = {"source": name, "path": str(path), "bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
            former = (known or {}).get(f"{name}/{path.name}", {})
            same = all(former.get(fact) == value for fact, value in facts.items())
            found[f"{name}/{path.name}"] = {**facts, "sha256": former["sha256"] if same else sha256(path)}
    return found


def changed_data(config: PipelineConfig, stage: str, former: dict) -> list[str]:
    """A line for every file in `former` (see `data_files`) whose content is another one now, or that is gone."""
    now, read = data_files(config, stage, former), data_names(config, stage)
    lines = []
    for key, entry in former.items():
        if entry["source"] in read and key not in now:
            lines.append(f"data file {entry['path']} is gone")
        elif entry["source"] in read and now[key]["sha256"] != entry["sha256"]:
            lines.append(f"data file {now[key]['path']}: sha256 {entry['sha256'][:12]} -> {now[key]['sha256'][:12]}")
    return lines


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def is_model(folder: Path) -> bool:
    """Whether a folder holds a saved model."""
    return os.path.isfile(folder / "config.json") and os.path.isfile(folder / "model.safetensors")  # false, too, of what is no possible name


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: that folder itself, the one of a stage folder, or the last one of a run folder.

    The folder or GGUF file of another program is imported into the cache first, and so is a model of the hub's local cache that is
    named as there. StageError lists what was tried.
    """
    if not str(path).strip():
        raise StageError(f"checkpoint={str(path)!r} names nothing. Give a checkpoint folder, a stage's folder or a run's folder.")
    given = Path(os.path.abspath(os.path.expanduser(path)))
    given = given if given.is_file() else Path(os.path.realpath(given))  # a link to a .gguf file may lead to one without that ending
    if not os.path.exists(given) and not Path(path).is_absolute() and str(path).count("/") == 1:
        from modern_llm import hub

        with contextlib.suppress(FileNotFoundError):
            given = hub.find_model(str(path))
    if os.path.exists(given):
        from modern_llm import hub

        if hub.is_foreign(given):
            try:
                return hub.imported(given, chat_tokens=True)
            except ValueError as error:
                raise StageError(f"checkpoint={str(path)!r}: {error}") from error
    if given.is_file():
        raise StageError(f"checkpoint={str(path)!r} is a file: name the folder of the model, which has its config.json, too"
                         + f" ({given.parent})" * (given.parent / "config.json").is_file())
    tried = [given, given / "checkpoint", *(given / stage / "checkpoint" for stage in GENERATORS)]
    for folder in tried:
        for candidate in (folder, folder.with_name(folder.name + ".previous")):  # left by a kill between two renames
            if is_model(candidate) and candidate != given.with_name(given.name + ".previous"):
                if (candidate / "verifier.json").is_file():
                    raise StageError(f"checkpoint={str(path)!r} is a verifier, whose score comes from a head beside the language model: it "
                                     f"writes no text. Give a generator: {', '.join(GENERATORS)}")
                return candidate
    raise StageError(f"checkpoint={str(path)!r}: no folder with config.json and model.safetensors. Tried "
                     + ", ".join(map(str, tried)) + ". Give a checkpoint folder, a stage's folder or a run's folder.")


def own_checkpoint(run_folder: Path, stage: str) -> Path | None:
    """The checkpoint of a finished stage of a run."""
    if not (run_folder / stage / "results.json").is_file():
        return None
    try:
        return find_folder(run_folder / stage / "checkpoint")
    except FileNotFoundError:
        return None


def own_inputs(stage: str, run_folder: Path) -> dict[str, Path]:
    """The checkpoints of earlier stages of the same run that the stage starts from or judges; empty if there are none."""
    there = {name: folder for name in FIRST_OF.get(stage, ALL_OF.get(stage, ()))
             if (folder := own_checkpoint(run_folder, name))}
    if stage in FIRST_OF:
        return dict(list(there.items())[:1])
    if "sft" in there and "pretrain" not in there:  # a run that began at SFT: its base is what it was given
        made_from = read_record(run_folder / "sft" / "params.json").get("inputs", {})
        given = made_from.get("checkpoint") or made_from.get("pretrain")
        if given and is_model(Path(given["path"])):
            there = {"pretrain": Path(given["path"]), **there}
    return there if there.keys() & set(GENERATORS) else {}


def found_inputs(stage: str, run_folder: Path, config: PipelineConfig) -> dict[str, Path]:
    """`own_inputs`, or the model from elsewhere that the preset starts from. StageError says how to get that."""
    own = own_inputs(stage, run_folder)
    if own or stage == "pretrain" or not config.start_from:
        return own
    from modern_llm import hub

    try:
        return {"checkpoint": find_checkpoint(hub.find_model(config.start_from))}
    except FileNotFoundError as error:
        raise StageError(f"preset {config.name!r} starts from a model instead of pretraining, and it is not here: {error}; or name a folder "
                         "with --checkpoint PATH (in a notebook, checkpoint = \"PATH\")") from error


def start_of(inputs: dict[str, Path]) -> Path | None:
    """The checkpoint to start from: the one given by hand, else of the last stage that made a language model."""
    return next((inputs[name] for name in ("checkpoint", *GENERATORS) if name in inputs), None)


def weights_digest(folder: Path) -> str:
    """A digest of a checkpoint's weights: from its `meta.json`, else of the files themselves."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    known = read_record(folder / "meta.json").get("sha256", {}) if (folder / "meta.json").is_file() else {}
    digests = [known.get(name) or sha256(folder / name) for name in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def described(inputs: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Path and digest of every input, as they go into `params.json`."""
    return {name: {"path": str(folder), "sha256": weights_digest(folder)} for name, folder in inputs.items()}


def no_inputs(stage: str, run_folder: Path, preset: str) -> StageError:
    """The error of a stage that has nothing to start from."""
    needs = BASES[stage][-1] if stage != "attention" else "pretrain"
    return StageError(
        f"stage {stage} starts from an earlier checkpoint, and {run_folder} has none: no finished stage "
        f"{' or '.join(FIRST_OF.get(stage, GENERATORS))}. Run `modern-llm run --preset {preset} --run {run_folder.name} --stage "
        f"{needs}` first, or `--stage all`, or give a checkpoint: --checkpoint PATH (in a notebook, checkpoint = \"PATH\").")


# ---- executing a notebook --------------------------------------------------------------------------------------------

# jsonschema, when it finds this package, builds 39 grammars for a format that no notebook uses: two seconds of every start.
SLOW_AND_UNUSED = "rfc3987_syntax"
