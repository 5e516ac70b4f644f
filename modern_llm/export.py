"""A checkpoint for others: plain Hugging Face files, in shards where they are large, and a model card from the run's own files.

A checkpoint folder is a Hugging Face folder as it stands; an export leaves out what only this package reads, may change the
dtype, and says where the model comes from. Imports no torch before it must.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from modern_llm.config import BUILT_IN, ModelConfig, nearest
from modern_llm.counts import parameter_count
from modern_llm.files import atomic_folder, check_folder, read_json, write_json, write_text
from modern_llm.inputs import GENERATORS, say
from modern_llm.report_eval import main_rows
from modern_llm.report_page import ReportError, Run, interval, markdown_table, number
from modern_llm.sources import DatasetInfo, DatasetNotFound, dataset_info
from modern_llm.tokens import end_of_text_id, load_tokenizer

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHARD_GB = 5.0  # of 10**9 bytes, as the Hugging Face hub counts them
LEDGER_NAMES = {"pretrain": "base"}  # how the evaluation calls a stage, where it is not by its name


class ExportError(ValueError):
    """The model cannot be exported. The message names the setting or the place, and the remedy."""


# ---- weights ---------------------------------------------------------------------------------------------------------


def counterpart(folder: Path) -> tuple[ModelConfig, str]:
    """A checkpoint's own config, and the transformers class that computes the same. ExportError names what none of them has."""
    from modern_llm.models import hugging_face_layout, read_config

    cfg = read_config(folder)
    architecture = hugging_face_layout(cfg)[0]
    if architecture == "ModernDecoderLM":
        raise ExportError(f"{folder}: model.use_attention_sinks=true has no counterpart: no Llama, Mistral, Mixtral or Qwen3 of "
                          "transformers adds a learned logit to the softmax. Train with model.use_attention_sinks=false to export; "
                          "modern-llm itself reads this folder as it is")
    if (folder / "verifier.json").is_file():
        raise ExportError(f"{folder} is a verifier: its score comes from a head beside the language model, which no causal model of "
                          "transformers has. Export the generator: --stage dpo, sft or pretrain")
    return cfg, architecture


def shards(sizes: dict[str, int], limit: float) -> list[list[str]]:
    """Names in their order, cut into groups of at most `limit` bytes; a tensor larger than that stands alone."""
    groups, room = [[]], limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def check_values(source: Path, dtype: str) -> None:
    """Raise ExportError, naming the tensor, if a weight is NaN or `dtype` cannot hold one; say how many become 0."""
    import torch
    from safetensors import safe_open

    from modern_llm.models import converted

    zeros, count = 0, 0
    with safe_open(source, "pt") as file:
        for name in file.keys():
            try:
                made = converted(name, tensor := file.get_tensor(name), getattr(torch, dtype), source)
            except ValueError as error:
                raise ExportError(str(error)) from error
            zeros, count = zeros + int((tensor.bool() & ~made.bool()).sum()), count + tensor.numel()
    if zeros:
        say(f"{zeros:,} of {count:,} weights are smaller than {dtype} can hold and become 0")


def write_weights(source: Path, folder: Path, dtype: str, shard_bytes: float) -> int:
    """Copy the tensors of a safetensors file in another dtype, one shard in memory at a time; returns their bytes."""
    import torch
    from safetensors import safe_open

    from modern_llm.models import write_tensors

    kind = getattr(torch, dtype)
    with safe_open(source, "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) * kind.itemsize for name in file.keys()}
        groups = shards(sizes, shard_bytes)
        names = ["model.safetensors"] if len(groups) == 1 else [
            f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        for name, group in zip(names, groups):
            write_tensors({tensor: file.get_tensor(tensor).to(kind).contiguous() for tensor in group}, folder / name)
    total = sum(sizes.values())
    if len(groups) > 1:
        where = {tensor: name for name, group in zip(names, groups) for tensor in group}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


@contextlib.contextmanager
def writing_errors(folder: str | Path) -> Iterator[None]:
    """Turn what an operating system says against a place into an ExportError that names it and the way out."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"--to {str(folder)!r} cannot be written: {error.strerror or error}; choose a folder with room that you may write "
                          "to. Nothing was left there") from error


def target_folder(folder: str | Path, checkpoint: Path) -> Path:
    """The absolute path of a folder to be made. ExportError if it is no name, is there already, or lies in the checkpoint."""
    if not str(folder).strip() or "\0" in str(folder):
        raise ExportError(f"--to {str(folder)!r} names no folder")
    place = Path(os.path.abspath(os.path.expanduser(folder)))
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir()) or place == Path.cwd()):
        raise ExportError(f"--to {str(place)!r} is there already and is never overwritten: choose another folder, or delete it first")
    if Path(os.path.realpath(checkpoint)) in Path(os.path.realpath(place)).parents:
        raise ExportError(f"--to {str(place)!r} lies in the checkpoint {checkpoint} itself, whose files stay as they are: choose another folder")
    return place


def export_model(checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None, shard_gb: float = SHARD_GB) -> Path:
    """Write a checkpoint as a Hugging Face model folder with a model card; it appears whole or not at all.

    Args:
        checkpoint: a checkpoint folder of this package.
        folder: where; nothing that is there is overwritten.
        dtype: of the written weights: "fp32", "bf16", "fp16" or torch's names; None keeps that of the checkpoint.
        shard_gb: weights beyond so many gigabytes are cut into several files with an index.

    Returns:
        `folder`.

    Raises:
        ExportError: the folder is not empty or cannot be written, the dtype is unknown or cannot hold a weight, or transformers has no
            such model.
        DamagedFolder: a file of the checkpoint is truncated or changed.
    """
    checkpoint = Path(checkpoint)
    with writing_errors(folder):
        folder = target_folder(folder, checkpoint)
    known = {**DTYPES, **{name: name for name in DTYPES.values()}}
    if dtype is not None and dtype not in known:
        raise ExportError(f"dtype={dtype!r} is unknown{nearest(dtype, known)}")
    if not 0 < shard_gb < math.inf:
        raise ExportError(f"shard_gb={shard_gb} must be greater than 0")
    meta = check_folder(checkpoint) if (checkpoint / "meta.json").is_file() else {}
    cfg, architecture = counterpart(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    config = {key: value for key, value in read_json(checkpoint / "config.json").items() if key != "modern_llm"}
    dtype, begin = known[dtype or config["dtype"]], end_of_text_id(tokenizer)
    config |= {"dtype": dtype, "torch_dtype": dtype, "bos_token_id": begin}
    settings = read_json(checkpoint / "tokenizer_config.json") | {"model_max_length": cfg.context_length}
    names = settings.pop("modern_llm", {}).get("end_tokens", [])
    ends = list(dict.fromkeys([config["eos_token_id"], *(i for name in names if (i := tokenizer.token_to_id(name)) is not None)]))
    # Padding by another token than the last one would make `generate` take that token, wherever it stands, for padding.
    generation = {"bos_token_id": begin, "eos_token_id": ends if len(ends) > 1 else config["eos_token_id"], "pad_token_id": config["eos_token_id"]}
    facts = {"exported": {"checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}", "step": meta.get("step"), "dtype": dtype,
                          "sha256": meta.get("sha256", {}).get("model.safetensors")}}
    check_values(checkpoint / "model.safetensors", dtype)
    with writing_errors(folder), atomic_folder(folder, facts) as temporary:
        size = write_weights(checkpoint / "model.safetensors", temporary, dtype, shard_gb * 1e9)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", generation)
        write_json(temporary / "tokenizer_config.json", settings)
        shutil.copyfile(checkpoint / "tokenizer.json", temporary / "tokenizer.json")
        write_text(temporary / "README.md", model_card(checkpoint, cfg, architecture, dtype, size, folder.name))
    return folder


# ---- the model card --------------------------------------------------------------------------------------------------


def origin(checkpoint: Path) -> tuple[Run | None, list[str], str]:
    """The run that made a checkpoint, its stages up to there, and the model from elsewhere that the first of them started from."""
    imported = lambda folder: read_json(folder / "meta.json").get("imported", {}).get("source", "") if (folder / "meta.json").is_file() else ""
    place = next((parent for parent in checkpoint.resolve().parents[:2] if parent.name in GENERATORS
                  and (parent.parent / "run.json").is_file()), None)
    if place is None:
        return None, [], imported(checkpoint)
    run, stages, stage = Run(place.parent), [], place.name
    try:
        while stage and stage not in stages:
            stages.insert(0, stage)
            settings = run.params.get(stage, {})
            if "config" not in settings:
                raise ReportError(f"{run.folder / stage / 'params.json'} is absent or has no config")
            inputs = settings.get("inputs", {})
            stage = next((name for name in GENERATORS if name in inputs), None)
        run.record, run.results  # read, so that a damaged one is known here
    except ReportError as error:
        say(f"{error}: the model card says nothing about the run")
        return None, [], imported(checkpoint)
    given = inputs.get("checkpoint")
    return run, stages, (imported(Path(given["path"])) or f"the checkpoint {given['sha256'][:12]}") if given else ""


def data_of(stage: str, settings: dict) -> list[str]:
    """The data sets that a stage trains on, by the settings in its params.json."""
    own, text = settings.get(stage, {}), list(settings["data"]["sources"])
    if stage == "pretrain":
        return text
    replayed = (text if stage == "sft" and own["replay_fraction"] else
                list(own["replay_sources"]) if stage == "dpo" and own["replay_weight"] else [])
    named = [*own["sources"], *replayed]
    return list(dict.fromkeys(name for one in named for name in (text if one == "text" else [one])))


def info_of(name: str) -> DatasetInfo:
    """What the registry knows of a data set; the built-in ones are one entry, an own file that is gone has none."""
    try:
        return dataset_info("synthetic" if name in BUILT_IN else name)
    except DatasetNotFound:
        return DatasetInfo(name, "", "unknown", "text", ())


def data_rows(run: Run, stages: list[str]) -> list[dict]:
    """One row a data set: where it was used, where it comes from, its licence, and the fingerprint of what was read."""
    used: dict[str, list[str]] = {}
    for stage in stages:
        for name in data_of(stage, run.params[stage]["config"]):
            used.setdefault(name, []).append(stage)
    read = {row["source"]: row.get("fingerprint", "") for stage in stages for row in run.results.get(stage, {}).get("data", [])
            if row.get("split") == "train"}
    return [{"data set": name, "used in": ", ".join(where), "from": (info := info_of(name)).hub or "built in" * (name in BUILT_IN),
             "licence": info.licence, "fingerprint": read.get(name, "")} for name, where in used.items()]


def result_table(run: Run, stage: str) -> str:
    """What was measured, with 95% intervals: from the evaluation's ledger, else from the stage's own results; "" if neither."""
    ledger = run.frame("eval/ledger.csv")
    found = [] if ledger.empty else main_rows(ledger[ledger.stage == LEDGER_NAMES.get(stage, stage)]).to_dict("records")
    own = [{"task": f"held out in the {stage} stage", **row} for row in run.results.get(stage, {}).get("table", [])]
    rows = [{"task": row["task"], "metric": row["metric"], "value [95% interval]": interval(row),
             "n": "" if row.get("n") != row.get("n") else row.get("n"), "protocol": row.get("protocol", "")} for row in found or own]
    return markdown_table(rows) if rows else ""


def limits(run: Run | None, stages: list[str], cfg: ModelConfig) -> list[str]:
    """What the files themselves say against the model."""
    found = [f"Texts longer than {cfg.context_length:,} tokens were not seen in training; rotary positions beyond that are untested.",
             "Nothing was done about, and nothing measured of, falsehoods, bias or harm: do not put it in front of people."]
    if run is None:
        return [*found, "It was not made by a run of this package, or the run's files are gone: this card knows no results of it."]
    tokens = sum(run.results.get(stage, {}).get("tokens", 0) for stage in stages)
    found.insert(0, f"{parameter_count(cfg)['total']:,} parameters and {tokens:,} tokens of training here, one seed: the intervals are over "
                    "items, not over training runs.")
    if any(row["data set"] in BUILT_IN for row in data_rows(run, stages)):
        found.append("Data sets named synthetic are written by a program in a small world of their own: figures on them say what the "
                     "method does, not how the model fares on human text.")
    overlap = run.frame("eval/contamination.csv")
    if len(overlap) and overlap.hit_share.max() > 0:
        worst = overlap.loc[overlap.hit_share.idxmax()]
        found.append(f"{100 * worst.hit_share:.1f}% of the items of {worst['set']} share a run of words with the training source {worst.source}.")
    for alarm in run.results.get("dpo", {}).get("alarms", []) if "dpo" in stages else []:
        found.append(f"Preference tuning raised an alarm: {alarm.get('alarm')} at step {number(alarm.get('step'))} ({alarm.get('detail')}).")
    return found


def front_matter(datasets: list[str], base: str) -> str:
    """The block of YAML that the hub reads: no licence is claimed for the weights."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "license: other", "license_name: see-data-and-licences"]
    lines += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    lines += [f"base_model: {base}"] if "/" in base else []
    return "\n".join(["---", *lines, "---"])


USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{ids}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=60)[0]))"""
CHAT_IDS = """request = [{"role": "user", "content": "What is 3 plus 4?"}]
ids = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
TEXT_IDS = """ids = tokenizer("<|endoftext|>One day", return_tensors="pt")"""


def model_card(checkpoint: Path, cfg: ModelConfig, architecture: str, dtype: str, size: int, name: str) -> str:
    """README.md of an export: what it is, how to use it, how it was made, from which data, what was measured, what to beware of."""
    from modern_llm.chat import speaks_chat

    run, stages, base = origin(checkpoint)
    count, rows, tokenizer = parameter_count(cfg), data_rows(run, stages) if run else [], load_tokenizer(checkpoint)
    chats = speaks_chat(checkpoint, tokenizer)  # a base model may have a template all the same
    closing = tokenizer.id_to_token(read_json(checkpoint / "config.json").get("eos_token_id") or 0)
    made = f"stage `{stages[-1]}` of the run `{run.folder.name}`" if run else "a checkpoint"
    active = f", {count['active']:,} of them active for a token" if count["active"] != count["total"] else ""
    parts = [front_matter(list(dict.fromkeys(info.hub for row in rows if (info := info_of(row["data set"])).hub)), base), f"# {name}",
             f"{count['total']:,} parameters{active}, context {cfg.context_length:,}, vocabulary {cfg.vocab_size:,}; {made}, written by "
             f"modern_llm in the layout of `{architecture}` ({dtype}, {size / 1e6:,.1f} MB).",
             "## Use", f"```python\n{USE.format(name=name, ids=CHAT_IDS if chats else TEXT_IDS)}\n```",
             f"It answers in its chat template and closes an answer with `{closing}`." if chats else
             "It continues text; documents begin and end with `<|endoftext|>`.", "## How it was made"]
    if base:
        parts.append(f"It started from {base}, a model from elsewhere: that model's licence and limits hold here too.")
    if run:
        parts.append(markdown_table([{"stage": stage, "steps": (found := run.results.get(stage, {})).get("steps"), "tokens": found.get("tokens"),
                                      "minutes": run.stages.get(stage, {}).get("seconds", 0) / 60, "ended by": found.get("ended_by")}
                                     for stage in stages]))
        changed = [f"* From step {change['from_step']} of {stage} on: {', '.join(change['settings'])}."
                   for stage in stages for change in run.params.get(stage, {}).get("changed_under_way", [])]
        parts += ["\n".join(["Settings were changed under way:", "", *changed])] if changed else []
        parts.append("```bash\n" + "\n".join(run.command(stage) for stage in stages) + "\n```")
        versions = ", ".join(f"{package} {version}" for package, version in run.record.get("versions", {}).items())
        parts.append(f"Commit `{run.record.get('git_commit', 'unknown')}`, seed {run.record.get('seed', 'unknown')}, "
                     f"{run.record.get('device_name', 'unknown device')}; {versions}.")
    parts += ["## Data and licences", markdown_table(rows) if rows else "Not known to this card."]
    if rows:
        parts.append("These are the licences of the data. Whether and how they bind the weights is for you to judge.")
    parts += ["## Results", (result_table(run, stages[-1]) if run else "") or "None were measured."]
    parts += ["## Limits", "\n".join(f"* {limit}" for limit in limits(run, stages, cfg))]
    return "\n\n".join(parts) + "\n"
