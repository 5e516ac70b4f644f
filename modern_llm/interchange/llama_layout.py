"""What a Hugging Face folder in Llama's layout means in our terms: its config.json, its
safetensors, its tensors' names.

Imports no torch before it must.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from modern_llm.config import ConfigError, ModelConfig
from modern_llm.files import DamagedFolder, read_json
from modern_llm.messages import UserError

if TYPE_CHECKING:
    import torch

    from modern_llm.models.decoder import ModernDecoderLM

# Architectures that ModernDecoderLM computes, and what their configs mean by a field that is not
# there.
LAYOUTS: dict[str, dict] = {
    "LlamaForCausalLM": {}, "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen3ForCausalLM": {"sliding_window": 4096},
    "MixtralForCausalLM": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {"sliding_window": 4096, "num_experts_per_tok": 8}}
MISFITS = {  # what a well-known other one has that ModernDecoderLM has not
    "GPT2LMHeadModel": "LayerNorm, learned positions and biases",
    "Qwen2ForCausalLM": "biases on queries, keys and values (attention_bias)",
    "GPTNeoXForCausalLM": "LayerNorm, biases and a parallel layer",
    "PhiForCausalLM": "LayerNorm and biases",
    "GemmaForCausalLM": "another norm (1 + weight) and GELU",
    "OlmoForCausalLM": "a LayerNorm without weights",
    "Qwen2MoeForCausalLM": "biases on queries, keys and values, and a shared expert"}
REMEDY = ("evaluate it as it is with modern_llm.interchange.hub.load, which needs `pip install "
          "'modern_llm[baselines]'`")


class CannotImport(UserError, ValueError):
    """A model that ModernDecoderLM cannot compute or that lacks a file. The message names the field
    and the remedy.
    """


# ---- what a config.json asks for -----------------------------------------------------------------


def _window(source: dict, architecture: str, layers: int) -> int | None:
    """The sliding window of all layers. CannotImport if only some have one."""
    window = source.get("sliding_window") if architecture != "LlamaForCausalLM" else None
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM") or window is None:
        return window
    if architecture == "Qwen3MoeForCausalLM":
        return window if source.get("use_sliding_window") else None
    if kinds := source.get("layer_types"):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    else:
        windowed = (layers - min(layers, source.get("max_window_layers", layers))
                    if source.get("use_sliding_window") else 0)
    if 0 < windowed < layers:
        raise CannotImport(
            f"sliding_window={window} is on {windowed} of {layers} layers (layer_types, "
            f"max_window_layers), and ModernDecoderLM has one for all or none; {REMEDY}")
    return window if windowed else None


def _temperature(rope: dict) -> float:
    """What YaRN multiplies cosines and sines with, as transformers reads a config."""
    if (given := rope.get("attention_factor")) is not None:
        return given
    above, below = (rope.get(name) for name in ("mscale", "mscale_all_dim"))
    above, below = (above, below) if above and below else (1, 0)
    sharper = 0.1 * math.log(max(rope["factor"], 1))
    return (above * sharper + 1) / (below * sharper + 1)


def model_config(source: dict, context_length: int | None = None) -> ModelConfig:
    """Our config of the model that a Hugging Face `config.json` describes.

    Args:
        source: the content of config.json.
        context_length: a shorter context than the model's own; rotary positions allow any.

    Raises:
        CannotImport: the model computes something that `ModernDecoderLM` does not; the message
            names the field.
    """
    if not isinstance(source, dict) or not isinstance(source.get("architectures") or [], list):
        raise CannotImport("config.json is not an object with a list of architectures: is it the "
                           "model's own file?")
    if odd := [key for key in ("rope_scaling", "rope_parameters", "quantization_config")
               if not isinstance(source.get(key) or {}, dict)]:
        raise CannotImport(f"{odd[0]}={source[odd[0]]!r} in config.json is not an object: is it "
                           "the model's own file?")
    name = (source.get("architectures") or [f"model_type {source.get('model_type')!r}"])[0]
    if name not in LAYOUTS:
        why = f" has {MISFITS[name]}" if name in MISFITS else f" is not one of {', '.join(LAYOUTS)}"
        raise CannotImport(
            f"architectures=[{name!r}]{why}: it cannot become a ModernDecoderLM; {REMEDY}")
    source = LAYOUTS[name] | source
    has_experts, ffn_width = ("num_experts_per_tok" in LAYOUTS[name],
                              "moe_intermediate_size" if name == "Qwen3MoeForCausalLM"
                              else "intermediate_size")
    # both names are in use
    source |= ({"num_experts": source.get("num_local_experts", source.get("num_experts"))}
               if has_experts else {})
    absent = [
        key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                        ffn_width, "max_position_embeddings", *["num_experts"] * has_experts)
        if not isinstance(source.get(key), int)]
    if absent:
        raise CannotImport(
            f"config.json of a {name} has no number {absent[0]!r}: is it the model's own file?")
    width, heads, layers = (source["hidden_size"], source["num_attention_heads"],
                            source["num_hidden_layers"])
    rope = (source.get("rope_scaling") or {}) | (source.get("rope_parameters") or {})
    kinds = {(source.get(key) or {}).get(word) for key in ("rope_scaling", "rope_parameters")
             for word in ("rope_type", "type")}
    scaling, head_width = (max(kinds - {None, "default"}, default="default"),
                           source.get("head_dim") or width // heads)
    trained = rope.get("original_max_position_embeddings") or source["max_position_embeddings"]
    factor = 1.0 if scaling == "default" else rope.get("factor")
    quantized = (source.get("quantization_config") or {}).get("quant_method")
    for field, value, ok, why in (
        ("rope_scaling", scaling, scaling in ("default", "llama3", "linear", "yarn"),
         "stretches the rotary wavelengths by " + (
             "a factor that grows with the text, and here it is fixed: with a fixed one 'ntk' is a "
             "larger rope_theta" if scaling == "dynamic" else
             "another rule than 'llama3', 'linear' and 'yarn'")),
        ("original_max_position_embeddings", trained, isinstance(trained, int) and trained > 0,
         "is not the number of tokens that the model was trained on at once"),
        ("factor", factor, isinstance(factor, (int, float)),
         f"is not the number by which rope_scaling={scaling!r} stretches"),
        ("low_freq_factor, high_freq_factor",
         bounds := (rope.get("low_freq_factor"), rope.get("high_freq_factor")),
         scaling != "llama3" or bounds == (1, 4),
         "are not the bounds 1 and 4 of Llama 3's models"),
        ("beta_fast, beta_slow", ramp := (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1),
         scaling != "yarn" or ramp == (32, 1), "are not YaRN's own 32 and 1"),
        ("truncate", whole := rope.get("truncate", True), scaling != "yarn" or whole,
         "lets YaRN's ramp begin and end between two pairs of channels, and here it does at whole "
         "ones"),
        ("attention_factor, mscale, mscale_all_dim", sharper := [rope.get(name) for name in (
            "attention_factor", "mscale", "mscale_all_dim")],
         scaling != "yarn" or all(part is None for part in sharper) or math.isclose(
             _temperature(rope), _temperature({"factor": factor}), rel_tol=1e-6),
         "give another attention temperature than YaRN's own, 0.1 ln(factor) + 1"),
        ("partial_rotary_factor", part := source.get(
            "partial_rotary_factor", rope.get("partial_rotary_factor", 1)
        ), part == 1, "turns only a part of the channels"),
        ("attention_bias", source.get("attention_bias"),
         not source.get("attention_bias"), "adds biases in attention"),
        ("mlp_bias", source.get("mlp_bias"),
         not source.get("mlp_bias"), "adds biases in the feed-forward layers"),
        ("hidden_act", act := source.get("hidden_act", "silu"),
         act in ("silu", "swish"), "is not the silu of SwiGLU"),
        ("layer_norm_eps", eps := source.get("layer_norm_eps", source.get("layer_norm_epsilon")),
         eps is None, "belongs to another norm than RMSNorm"),
        ("quantization_config", quantized,
         quantized in (None, "gguf"), "means weights that are not plain numbers"),
        ("mlp_only_layers", dense := source.get("mlp_only_layers") or [], not dense,
         "puts layers without experts between the others"),
        ("decoder_sparse_step", step := source.get("decoder_sparse_step", 1), step == 1,
         "puts layers without experts between the others"),
        ("norm_topk_prob", weighing := source.get("norm_topk_prob", False),
         name != "Qwen3MoeForCausalLM" or weighing,
         "leaves the weights of the chosen experts as they are, and here they sum to 1"),
    ):
        if not ok:
            raise CannotImport(
                f"{field}={value!r} {why}: this {name} cannot become a ModernDecoderLM; {REMEDY}")
    stretch = ({} if scaling == "default" else
               {"rope_factor": float(factor), "rope_scaling": scaling} | (
                   {} if scaling == "linear" else {"rope_trained_context": trained}))
    routing = {"num_experts": source["num_experts"],
               "experts_per_token": source["num_experts_per_tok"], "balance_loss_weight": float(
                   source.get("router_aux_loss_coef", 0.001))} if has_experts else {}
    try:
        return ModelConfig(
            vocab_size=source["vocab_size"],
            context_length=context_length or source["max_position_embeddings"], width=width,
            num_layers=layers, num_heads=heads,
            num_kv_heads=source.get("num_key_value_heads") or heads,
            head_dim=head_width if head_width * heads != width else None,
            ffn_width=source[ffn_width], norm_eps=source.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or source.get("rope_theta") or 10_000.0),
            **stretch, use_qk_norm=name.startswith("Qwen3"),
            sliding_window=_window(source, name, layers),
            tie_embeddings=bool(source.get("tie_word_embeddings", False)), **routing)
    except ConfigError as error:
        raise CannotImport(
            f"config.json of a {name} gives a model that cannot be: {error}") from error


# ---- weights -------------------------------------------------------------------------------------


def weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, by an index; each lies in the folder of the index. CannotImport
    names one that does not.
    """
    try:
        files = read_json(index)["weight_map"]
        names = sorted(set(files.values()))
        outside = [name for name in names
                   if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFolder(f"{index} is not an index of weights ({type(error).__name__}: "
                            f"{error}): copy it again") from error
    if outside or not names:
        raise CannotImport(f"{index}: weight_map names {outside[0]!r}, which is not in its folder, "
                           "and nothing else is read"
                           if outside else f"{index}: weight_map names no file")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order. CannotImport if there are none, only pickled
    ones, or two models.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = ([folder / name for name in sorted(set(weight_map(index).values()))] if index.is_file()
             else [whole])
    if whole.is_file() and whole not in files:
        raise CannotImport(f"{folder} has {whole.name}, and {index.name} with other files "
                           f"({files[0].name} …): two models. Take away what does not belong")
    if absent := [str(path.relative_to(folder)) for path in files if not path.is_file()]:
        others = sorted(path.name
                        for path in folder.glob("*") if path.suffix.lower() == ".safetensors")
        if others and not index.is_file():
            raise CannotImport(f"{folder} has no {whole.name}, but {', '.join(others[:3])}: " + (
                "an adapter, which is a part of a model only: merge it into its base (peft: "
                "merge_and_unload, save_pretrained)" if "adapter_model.safetensors" in others
                else "weights under another name may be laid out otherwise; rename the file where "
                     "they are not, or take transformers' own (from_pretrained, save_pretrained)"))
        if pickled := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth")
                             for path in folder.glob(pattern)):
            raise CannotImport(f"{folder} has its weights in {pickled[0]}, a pickle, which could "
                               "run code when it is opened: where you trust it, convert it to "
                               "safetensors (transformers: from_pretrained, save_pretrained)")
        raise CannotImport(f"{folder} has no {absent[0]}: the copy is incomplete")
    return files


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files. DamagedFolder if one is truncated."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    listed = weight_map(index) if index.is_file() else None
    for path in weight_files(folder):
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise DamagedFolder(
                f"{path} is truncated or damaged ({error}): copy it again") from error
        name = str(path.relative_to(folder))
        tensors |= {tensor: value for tensor, value in found.items()
                    if listed is None or listed.get(tensor, name) == name}
    if absent := sorted((listed or {}).keys() - tensors):
        raise DamagedFolder(f"{index} says that tensor {absent[0]!r} is in {listed[absent[0]]}, "
                            "and it is not: the files are of different models")
    return tensors


def build_model(tensors: dict[str, torch.Tensor], cfg: ModelConfig, place: Path, dtype: torch.dtype,
                new_rows: int = 0) -> ModernDecoderLM:
    """A `ModernDecoderLM` of these tensors, whose names are Hugging Face's.

    `new_rows` tokens are added, each with the mean embedding: that takes at most log(1 +
    new_rows/vocab_size) nats from the log-probability of any other token (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models").
    """
    import torch

    from modern_llm.models.saving import check_tensors, converted, disk_names, unfilled

    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.endswith("rotary_emb.inv_freq")}
    if biases := sorted(name for name in tensors if name.endswith(".bias")):
        raise CannotImport(f"{place} has {len(biases)} biases (attention_bias or mlp_bias; the "
                           f"first is {biases[0]}), which ModernDecoderLM has not; {REMEDY}")
    embedding, head = (tensors.get(name)
                       for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if cfg.tie_embeddings and head is not None and embedding is not None:
        if torch.equal(head, embedding):
            del tensors["lm_head.weight"]
        else:  # as transformers reads it
            cfg = dataclasses.replace(cfg, tie_embeddings=False)
    model = unfilled(cfg)
    names, state = disk_names(model), model.state_dict()
    check_tensors(place, tensors, {on_disk: state[name] for on_disk, name in names.items()})
    state = {names[on_disk]: converted(on_disk, tensor, dtype, place)
             for on_disk, tensor in tensors.items()}
    if new_rows:
        for name in {"embed_tokens.weight", "lm_head.weight"} & state.keys():
            state[name] = torch.cat(
                [state[name],
                 state[name].float().mean(0, keepdim=True).to(dtype).expand(new_rows, -1)])
        model = unfilled(dataclasses.replace(cfg, vocab_size=cfg.vocab_size + new_rows))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model
