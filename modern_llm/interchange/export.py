"""A checkpoint for others: plain Hugging Face files, in shards where they are large, and a model
card from the run's own files.

A checkpoint folder is a Hugging Face folder as it stands; an export leaves out what only this
package reads, may change the dtype, and says where the model comes from. Imports no torch before it
must.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from modern_llm.config import ModelConfig, nearest
from modern_llm.data.tokens import end_of_text_id, load_tokenizer
from modern_llm.files import atomic_folder, check_folder, read_json, write_json, write_text
from modern_llm.messages import say

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHARD_GB = 5.0  # of 10**9 bytes, as the Hugging Face hub counts them
# why a setting that transformers knows cannot be exported all the same
NOT_THERE = {"use_attention_sinks": (
    "beside experts and QK-norm no class of transformers computes it (Flint weighs its experts by "
    "sigmoids, which are no softmax; GptOss multiplies by up + 1 where SwiGLU has up, and like "
    "GraniteMoeSWA has no QK-norm). Without QK-norm, or without experts, it can be exported")}
# checkpoint, config, architecture, dtype, bytes, name -> README.md
Card = Callable[[Path, ModelConfig, str, str, int, str], str]


class ExportError(ValueError):
    """The model cannot be exported. The message names the setting or the place, and the remedy."""


def counterpart(folder: Path) -> tuple[ModelConfig, str]:
    """A checkpoint's own config, and the transformers class that computes the same. ExportError
    names what none of them has.
    """
    from modern_llm.models.saving import hugging_face_layout, own_options, read_config

    cfg = read_config(folder)
    architecture = hugging_face_layout(cfg)[0]
    own = own_options(cfg)
    if own == ["use_attention_sinks"] and not cfg.use_qk_norm:
        own, architecture = [], "GraniteMoeSWAForCausalLM"
    if own:
        option, default = f"model.{own[0]}", json.dumps(getattr(ModelConfig(), own[0]))
        why = NOT_THERE.get(own[0], "no class of transformers has it")
        raise ExportError(f"{folder}: {option}={json.dumps(getattr(cfg, own[0]))} has no "
                          f"counterpart: {why}. Train with {option}={default} to export; "
                          "modern-llm itself reads this folder as it is")
    if (folder / "verifier.json").is_file():
        raise ExportError(f"{folder} is a verifier: its score comes from a head beside the "
                          "language model, which no causal model of "
                          "transformers has. Export the generator: --stage dpo, sft or pretrain")
    return cfg, architecture


def shards(sizes: dict[str, int], limit: float) -> list[list[str]]:
    """Names in their order, cut into groups of at most `limit` bytes; a tensor larger than that
    stands alone.
    """
    groups, room = [[]], limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def parts(names: list[str], architecture: str) -> dict[str, list[list[str]]]:
    """Every tensor to be written, and those that it is made of: rows of tensors one below the
    other, and of several rows a stack. GraniteMoeSWA keeps a layer's experts in one tensor, gates
    above ups; all others write what they find.
    """
    if architecture != "GraniteMoeSWAForCausalLM":
        return {name: [[name]] for name in names}
    found: dict[str, list[list[str]]] = {}
    for name in names:
        layer, _, rest = name.partition(".mlp.")
        expert, _, matrix = rest.removeprefix("experts.").partition(".")
        if not rest:
            found[name] = [[name]]
        elif expert == "router":
            found[f"{layer}.block_sparse_moe.router.weight"] = [[name]]
        elif matrix in ("gate_proj.weight", "down_proj.weight"):
            kind = "gate_up_proj" if matrix.startswith("gate") else "down_proj"
            rows = found.setdefault(f"{layer}.block_sparse_moe.experts.{kind}", [])
            rows.append([name, name.replace("gate_proj", "up_proj")][:1 + (kind != "down_proj")])
    for rows in found.values():
        rows.sort(key=lambda row: [int(word) for word in row[0].split(".") if word.isdigit()])
    return found


def check_values(source: Path, dtype: str) -> None:
    """Raise ExportError, naming the tensor, if a weight is NaN or `dtype` cannot hold one; say how
    many become 0.
    """
    import torch
    from safetensors import safe_open

    from modern_llm.models.saving import converted

    zeros, count = 0, 0
    with safe_open(source, "pt") as file:
        for name in file.keys():
            try:
                made = converted(name, tensor := file.get_tensor(name),
                                 getattr(torch, dtype), source)
            except ValueError as error:
                raise ExportError(str(error)) from error
            zeros, count = zeros + int((tensor.bool() & ~made.bool()).sum()), count + tensor.numel()
    if zeros:
        say(f"{zeros:,} of {count:,} weights are smaller than {dtype} can hold and become 0")


def write_weights(source: Path, folder: Path, dtype: str, shard_bytes: float,
                  architecture: str = "") -> int:
    """Copy the tensors of a safetensors file in another dtype, put together as the architecture
    keeps them, one shard in memory at a time; returns their bytes.
    """
    import torch
    from safetensors import safe_open

    from modern_llm.models.saving import write_tensors

    kind = getattr(torch, dtype)
    with safe_open(source, "pt") as file:
        made_of = parts(list(file.keys()), architecture)
        sizes = {name: kind.itemsize * sum(math.prod(file.get_slice(part).get_shape())
                                           for row in rows for part in row)
                 for name, rows in made_of.items()}
        groups = shards(sizes, shard_bytes)
        names = ["model.safetensors"] if len(groups) == 1 else [
            f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        for name, group in zip(names, groups):
            tensors = {tensor: [torch.cat([file.get_tensor(part).to(kind) for part in row])
                                for row in made_of[tensor]] for tensor in group}
            write_tensors({tensor: torch.stack(rows) if ".experts." in tensor and
                           tensor.endswith("_proj") else rows[0].contiguous()
                           for tensor, rows in tensors.items()}, folder / name)
    total = sum(sizes.values())
    if len(groups) > 1:
        where = {tensor: name for name, group in zip(names, groups) for tensor in group}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": where})
    return total


@contextlib.contextmanager
def writing_errors(folder: str | Path) -> Iterator[None]:
    """Turn what an operating system says against a place into an ExportError that names it and the
    way out.
    """
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"--to {str(folder)!r} cannot be written: {error.strerror or error}; choose a folder "
            "with room that you may write to. Nothing was left there") from error


def target_folder(folder: str | Path, checkpoint: Path) -> Path:
    """The absolute path of a folder to be made. ExportError if it is not a name, is there already,
    or lies in the checkpoint.
    """
    if not str(folder).strip() or "\0" in str(folder):
        raise ExportError(f"--to {str(folder)!r} names no folder")
    place = Path(os.path.abspath(os.path.expanduser(folder)))
    if (os.path.lexists(place)
            and (not place.is_dir() or any(place.iterdir()) or place == Path.cwd())):
        raise ExportError(f"--to {str(place)!r} is there already and is never overwritten: choose "
                          "another folder, or delete it first")
    if Path(os.path.realpath(checkpoint)) in Path(os.path.realpath(place)).parents:
        raise ExportError(f"--to {str(place)!r} lies in the checkpoint {checkpoint} itself, whose "
                          "files stay as they are: choose another folder")
    return place


def export_model(checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None,
                 shard_gb: float = SHARD_GB, card: Card | None = None) -> Path:
    """Write a checkpoint as a Hugging Face model folder; it appears whole or not at all.

    Args:
        checkpoint: a checkpoint folder of this package.
        folder: where; nothing that is there is overwritten.
        dtype: of the written weights: "fp32", "bf16", "fp16" or torch's names; None keeps that of
            the checkpoint.
        shard_gb: weights beyond so many gigabytes are cut into several files with an index.
        card: writes README.md; `modern_llm.report.card.export_with_card` brings it.

    Returns:
        `folder`.

    Raises:
        ExportError: the folder is not empty or cannot be written, the dtype is unknown or cannot
            hold a weight, or transformers has no such model.
        DamagedFolder: a file of the checkpoint is truncated or changed.
    """
    from modern_llm.models.saving import hugging_face_config

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
    written = read_json(checkpoint / "config.json")
    # an older version may have written fewer words for the same model
    config = written | hugging_face_config(cfg, written["dtype"], written["eos_token_id"])
    del config["modern_llm"]
    if architecture == "GraniteMoeSWAForCausalLM":
        config |= {"architectures": [architecture], "model_type": "granitemoe_swa"}
    dtype, begin = known[dtype or config["dtype"]], end_of_text_id(tokenizer)
    config |= {"dtype": dtype, "torch_dtype": dtype, "bos_token_id": begin}
    settings = (read_json(checkpoint / "tokenizer_config.json")
                | {"model_max_length": cfg.context_length})
    names = settings.pop("modern_llm", {}).get("end_tokens", [])
    ends = list(
        dict.fromkeys([config["eos_token_id"],
                       *(i for name in names if (i := tokenizer.token_to_id(name)) is not None)]))
    # Padding by another token than the last one would make `generate` take that token, wherever it
    # stands, for padding.
    generation = {"bos_token_id": begin,
                  "eos_token_id": ends if len(ends) > 1 else config["eos_token_id"],
                  "pad_token_id": config["eos_token_id"]}
    facts = {"exported": {"checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}",
                          "step": meta.get("step"), "dtype": dtype,
                          "sha256": meta.get("sha256", {}).get("model.safetensors")}}
    check_values(checkpoint / "model.safetensors", dtype)
    with writing_errors(folder), atomic_folder(folder, facts) as temporary:
        size = write_weights(checkpoint / "model.safetensors", temporary, dtype, shard_gb * 1e9,
                             architecture)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", generation)
        write_json(temporary / "tokenizer_config.json", settings)
        shutil.copyfile(checkpoint / "tokenizer.json", temporary / "tokenizer.json")
        if card:
            write_text(temporary / "README.md",
                       card(checkpoint, cfg, architecture, dtype, size, folder.name))
    return folder
