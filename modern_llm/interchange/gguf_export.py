"""A checkpoint as one GGUF file, which llama.cpp and what is built on it read.

Two of its architectures compute what a dense model here does: `llama`, and `qwen3` with QK-norm.
The format is that of the package `gguf`; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No
torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import ModelConfig
from modern_llm.data.tokens import end_of_text_id, load_tokenizer
from modern_llm.files import check_folder, read_json
from modern_llm.interchange.export import ExportError, check_values, writing_errors

if TYPE_CHECKING:
    import numpy as np

KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of the matrices
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
# how llama.cpp cuts a text before it merges, by the steps of a tokenizer.json
CUTS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight",
         "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}


def ggml_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Hugging Face folder: `blk.0.attn_q.weight`."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def pairs_side_by_side(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of `llama`: it turns channels 2i and 2i + 1 of a head
    together, a Hugging Face folder channels i and i + d/2.
    """
    rows, columns = matrix.shape
    return (matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            .reshape(rows, columns))


def architecture_of(folder: Path) -> tuple[ModelConfig, str]:
    """A checkpoint's config and the architecture of llama.cpp that computes it. ExportError names
    what none has.
    """
    from modern_llm.models.saving import hugging_face_layout, read_config, rotary_words

    cfg = read_config(folder)
    found = ARCHITECTURES.get(hugging_face_layout(cfg)[0])
    reasons = {"a verifier's head": (folder / "verifier.json").is_file(),
               "experts (model.num_experts)": cfg.num_experts,
               "learned sinks (model.use_attention_sinks)": cfg.use_attention_sinks,
               "a window (model.sliding_window)": cfg.sliding_window,
               f"a stretched context (model.rope_scaling={cfg.rope_scaling!r})":
                   "rope_scaling" in rotary_words(cfg)}
    why = next((what for what, there in reasons.items() if there), "" if found else "an own layout")
    if why:
        raise ExportError(f"{folder}: {why} is not written as GGUF. Without --to FILE.gguf, as a "
                          "Hugging Face folder, more models can be exported")
    return cfg, found


def vocabulary(folder: Path, size: int) -> dict:
    """The tokens, their kinds, the merges and how a text is cut, as GGUF wants them.

    Args:
        size: of the model's vocabulary; the tokens that the tokenizer lacks get names.

    Raises:
        ExportError: llama.cpp does not know how this tokenizer cuts a text.
    """
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = found.get("pre_tokenizer") or {}
    steps = tuple(step["type"] for step in steps.get("pretokenizers", [steps]))
    if found["model"]["type"] != "BPE" or steps not in CUTS:
        how = " and ".join(steps) or "nothing"
        raise ExportError(f"{folder}/tokenizer.json cuts texts by {how} before "
                          f"{found['model']['type']}, which llama.cpp has no name for here; "
                          "export a Hugging Face folder instead (--to without .gguf)")
    tokens, kinds = [f"[unused {i}]" for i in range(size)], [UNUSED] * size
    for token, i in found["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in found.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added.get("special") else NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge)
              for merge in found["model"]["merges"]]
    return {"tokens": tokens, "kinds": kinds, "merges": merges, "cut": CUTS[steps]}


def tensors(folder: Path, cfg: ModelConfig, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in llama.cpp, in float32, one at a time."""
    import torch
    from safetensors import safe_open

    heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            value = file.get_tensor(name).to(torch.float32).numpy()
            count = next((n for part, n in heads.items() if f".{part}." in name), 0)
            yield ggml_name(name), (pairs_side_by_side(value, count)
                                    if count and architecture == "llama" else value)


def export_gguf(checkpoint: str | Path, path: str | Path, dtype: str = "fp16") -> Path:
    """Write a checkpoint as a GGUF file; it appears whole or not at all.

    Args:
        checkpoint: a checkpoint folder of this package.
        path: a name that ends in .gguf; a file that is there is not overwritten.
        dtype: of the matrices: "fp32", "fp16", "bf16", or "q8_0", eight bits and a scale for every
            32 weights of a row; a matrix whose rows are no multiple of 32 stays in fp16. Vectors
            are float32.

    Returns:
        `path`.

    Raises:
        ExportError: llama.cpp has no such model or tokenizer, the package `gguf` is missing, the
            dtype is unknown or cannot hold a weight, or the place cannot be written.
    """
    checkpoint, path = Path(checkpoint), Path(path)
    if dtype not in KINDS:
        raise ExportError(f"dtype={dtype!r} is none of {', '.join(KINDS)}")
    if path.exists():
        raise ExportError(f"--to {str(path)!r} is there already and is never overwritten: choose "
                          "another name, or delete it first")
    try:
        import gguf
    except ImportError as error:
        raise ExportError("a GGUF file is written by the package gguf: pip install "
                          "'modern_llm[baselines]'") from error
    if (checkpoint / "meta.json").is_file():
        check_folder(checkpoint)
    cfg, architecture = architecture_of(checkpoint)
    words = vocabulary(checkpoint, cfg.vocab_size)
    check_values(checkpoint / "model.safetensors", {"fp32": "float32", "bf16": "bfloat16"}.get(
        dtype, "float16"))
    part = path.with_name(path.name + ".part")
    with writing_errors(path):
        writer = gguf.GGUFWriter(part, architecture)
        try:
            _describe(writer, cfg, checkpoint, words)
            writer.add_file_type(getattr(gguf.LlamaFileType, {"fp32": "ALL_F32"}.get(
                dtype, f"MOSTLY_{KINDS[dtype]}")))
            for name, value in tensors(checkpoint, cfg, architecture):
                kind = KINDS[dtype] if value.ndim > 1 else "F32"
                if kind == "Q8_0" and value.shape[-1] % 32:
                    kind = "F16"
                kind = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _describe(writer, cfg: ModelConfig, checkpoint: Path, words: dict) -> None:
    """Shape, vocabulary and template."""
    tokenizer, config = load_tokenizer(checkpoint), read_json(checkpoint / "config.json")
    writer.add_name(f"{checkpoint.parent.parent.name}-{checkpoint.parent.name}")
    writer.add_context_length(cfg.context_length)
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.ffn_width)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_width)
    writer.add_value_length(cfg.head_width)
    writer.add_rope_dimension_count(cfg.head_width)
    writer.add_rope_freq_base(config.get("rope_theta", cfg.rope_theta))
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["cut"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["kinds"])
    writer.add_token_merges(words["merges"])
    writer.add_bos_token_id(end_of_text_id(tokenizer))
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)  # the chat template writes it
    template = read_json(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)
