"""A third-party model folder or GGUF file becomes a checkpoint folder of this package, or says why
it cannot.

Safetensors are read without transformers, and nothing is ever unpickled. Imports neither torch nor
transformers before it must.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from modern_llm.data.templates import NAMED, read_settings
from modern_llm.data.tokens import (
    CHAT_TOKENS, END_OF_TEXT, disk_errors, load_tokenizer, save_tokenizer,
)
from modern_llm.files import atomic_folder, read_json, write_json
from modern_llm.interchange.llama_layout import (
    CannotImport, build_model, model_config, read_weights, weight_files,
)

if TYPE_CHECKING:
    import torch

IMPORT_VERSION = 5  # raise it when the same files are imported differently
# names of the token between documents, the best known first
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


def gguf_file(place: Path) -> Path | None:
    """The GGUF file that `place` is, or the only one of a folder without safetensors. CannotImport
    if there are several.
    """
    if place.is_file():
        return place if place.suffix.lower() == ".gguf" else None
    found = ([] if any(place.glob("*.safetensors"))
             else sorted(path for path in place.glob("*") if path.suffix.lower() == ".gguf"))
    if len(found) > 1:
        raise CannotImport(f"{place} holds {len(found)} GGUF files: name one of "
                           f"{', '.join(path.name for path in found)}")
    return found[0] if found else None


def is_third_party(place: Path) -> bool:
    """Whether another program wrote the model there: a config.json without our key, or a GGUF file.
    """
    if (place / "config.json").is_file():
        try:
            return "modern_llm" not in read_json(place / "config.json")
        except ValueError:
            return False  # damaged: whoever opens it will say so
    return gguf_file(place) is not None


def with_transformers(place: Path, dtype: torch.dtype | str = "auto"):
    """The model as transformers opens it, from local files and without third-party code.
    CannotImport says what is missing.
    """
    gguf = gguf_file(place)
    try:
        import transformers

        if gguf:
            import accelerate  # noqa: F401  transformers asks for both, late and in other words
            import gguf as _  # noqa: F401
    except ImportError as error:
        raise CannotImport(f"{gguf or place} is read through transformers, but {error.name} is "
                           "missing: pip install 'modern_llm[baselines]'") from error
    if gguf:
        import torch

        options = {"gguf_file": gguf.name, "dtype": torch.float32 if dtype == "auto" else dtype}
    else:
        weight_files(place)
        options = {"use_safetensors": True, "dtype": dtype}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent if gguf else place, local_files_only=True, **options)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise CannotImport(f"transformers cannot open {gguf or place}: {type(error).__name__}: "
                           f"{str(error)[:300]}") from error


def source_tokenizer(place: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer beside the weights, and its settings (bos_token, eos_token, chat_template …).
    """
    folder, gguf = place if place.is_dir() else place.parent, gguf_file(place)
    said = read_settings(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    else:
        try:
            from transformers import AutoTokenizer

            made = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                 **({"gguf_file": gguf.name} if gguf else {}))
            data = json.loads(made.backend_tokenizer.to_str())
            # it lists all its tokens; others are the class's own defaults and have no row in the
            # embedding
            if gguf:
                listed = {token if isinstance(token, str) else token[0]
                          for token in data["model"]["vocab"]}
                data["added_tokens"] = [
                    token for token in data["added_tokens"] if token["content"] in listed]
            tokenizer = Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # whatever the many classes raise
            raise CannotImport(f"{place} has no tokenizer.json, and transformers makes none of its "
                               f"other files ({type(error).__name__}: {str(error)[:200]}): put the "
                               "model's tokenizer.json there") from error
        said = {name: value for name in ("bos_token", "eos_token", "chat_template")
                if (value := getattr(made, name, None))} | said
        said.setdefault("template_file", str(place))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, said


def rename_token(tokenizer: Tokenizer, old: str, new: str) -> Tokenizer:
    """The same tokenizer, in which the token `old` is called `new` and is special; its id stays."""
    data = json.loads(tokenizer.to_str())
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new if token == old else token: index
                          for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[new if token == old else token, score]
                          for token, score in model["vocab"]]
    if model.get("unk_token") == old:
        model["unk_token"] = new
    for token in data["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    data["post_processor"] = json.loads(
        json.dumps(data["post_processor"]).replace(json.dumps(old), json.dumps(new)))
    renamed = Tokenizer.from_str(json.dumps(data))
    renamed.add_special_tokens([AddedToken(new, special=True, normalized=False)])
    return renamed


def with_end_of_text(tokenizer: Tokenizer, said: dict,
                     config: dict) -> tuple[Tokenizer, str | None]:
    """The tokenizer with a token <|endoftext|>, and the former name of that token if it was
    another.

    It is the token that ends documents: one with a well-known name, else the end-of-text token of
    the configs, else the begin-of-text token. CannotImport if there is none.
    """
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    named = [*END_OF_TEXT_NAMES, *(text(said.get(f"{kind}_token")) for kind in ("eos", "bos"))]
    ids = [index for kind in ("eos", "bos") for index in token_ids(config.get(f"{kind}_token_id"))]
    named += [tokenizer.id_to_token(index)
              for index in ids if 0 <= index < tokenizer.get_vocab_size()]
    old = next(
        (token for token in named if token and tokenizer.token_to_id(token) is not None), None)
    if old is None:
        raise CannotImport("the tokenizer has no end-of-text and no begin-of-text token: name one "
                           "as eos_token in tokenizer_config.json")
    return ((tokenizer, None) if old == END_OF_TEXT
            else (rename_token(tokenizer, old, END_OF_TEXT), old))


def with_settings(tokenizer: Tokenizer, said: dict, former: str | None,
                  end_ids: list[int]) -> Tokenizer:
    """The same tokenizer with its settings, in which the token `former` is called <|endoftext|>,
    too, and all the ends of an answer stand.
    """
    renamed = {
        name: value.replace(former, END_OF_TEXT)
              if former and isinstance(value, str) and name != "template_file" else value
        for name, value in said.items() if name in (*NAMED, "chat_template", "template_file")}
    own = {"end_tokens": [token for index in end_ids if (token := tokenizer.id_to_token(index))]}
    # the day is kept, or a run that is resumed tomorrow would read other prompts
    if "strftime_now" in said.get("chat_template", ""):
        own["template_date"] = (said.get("modern_llm", {}).get("template_date")
                                or datetime.date.today().isoformat())
    tokenizer.settings = renamed | ({"modern_llm": own} if "chat_template" in said else {})
    return tokenizer


def token_ids(value: object) -> list[int]:
    return [index for index in (value if isinstance(value, list) else [value])
            if isinstance(index, int)]


def check_vocabulary(tokenizer: Tokenizer, rows: int, place: Path) -> None:
    """Raise CannotImport if a token has no row of the embedding. Rows without a token are padding.
    """
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if ids > rows:
        raise CannotImport(f"{place}: the tokenizer has ids up to {ids - 1}, but the embedding "
                           f"(vocab_size) only {rows} rows: they are of different models")


def import_model(source: str | Path, folder: str | Path, *, dtype: str = "float32",
                 context_length: int | None = None, chat_tokens: bool = False) -> Path:
    """Write a third-party model in Llama's layout as a checkpoint folder of this package; its
    logits stay the same.

    Args:
        source: a folder with config.json, safetensors (in shards, too) and tokenizer.json, or a
            GGUF file, or a folder with one.
        folder: where; it appears whole or not at all.
        dtype: of the written weights; the stages train in float32.
        context_length: a shorter context than the source's, for stages that shall fit into memory.
        chat_tokens: give the tokenizer the tokens that stages after pretraining need, unless it has
            those of ChatML; unused rows of the embedding take them, and where there are none, it
            grows by their mean (`build_model`).

    Returns:
        `folder`.

    Raises:
        CannotImport: `ModernDecoderLM` cannot compute this model, or a file is missing; the message
            names the field.
        TemplateError: `chat_tokens` are asked for, and the chat template cannot be used.
        DamagedFolder: a weight file is truncated.
    """
    import torch

    from modern_llm.data.chat import DEFAULT_FORMAT, chat_format, end_id
    from modern_llm.models.saving import save_model

    place, folder = Path(source).expanduser(), Path(folder)
    if gguf_file(place):
        made = with_transformers(place, torch.float32)
        config, tensors = (made.config.to_dict() | {"architectures": [type(made).__name__]},
                           made.state_dict())
        cfg = model_config(config, context_length)
        if cfg.num_experts:
            raise CannotImport(f"{place}: transformers joins the experts of a GGUF file into one "
                               "tensor; save it once as safetensors "
                               "(transformers: from_pretrained with gguf_file, save_pretrained) "
                               "and import that folder")
    elif (place / "config.json").is_file():
        config = read_json(place / "config.json")
        cfg = model_config(config, context_length)  # refuses before gigabytes are read
        tensors = read_weights(place)
    else:
        raise CannotImport(
            f"{place} is neither a folder with config.json and safetensors nor a GGUF file")
    tokenizer, said = source_tokenizer(place)
    check_vocabulary(tokenizer, cfg.vocab_size, place)
    tokenizer, former = with_end_of_text(tokenizer, said, config)
    ends = sorted({*token_ids(config.get("eos_token_id")),
                   *token_ids(generation_settings(place).get("eos_token_id")),
                   *token_ids(tokenizer.token_to_id(END_OF_TEXT if said.get("eos_token") == former
                                                    else said.get("eos_token") or ""))})
    tokenizer = with_settings(tokenizer, said, former, ends)
    added = ([token for token in CHAT_TOKENS if tokenizer.token_to_id(token) is None]
             if chat_tokens and chat_format(tokenizer) is DEFAULT_FORMAT else [])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in added])
    new_rows = max(0, max(tokenizer.get_vocab().values()) + 1 - cfg.vocab_size)
    model = build_model(tensors, cfg, place, getattr(torch, dtype), new_rows)
    end, closing = tokenizer.token_to_id(END_OF_TEXT), None
    # whoever asks no chat needs no template
    with contextlib.nullcontext() if chat_tokens else contextlib.suppress(ValueError):
        closing = end_id(tokenizer)
    facts = {"source": source_name(place),
             "architecture": config["architectures"][0], "end_of_text_was": former or END_OF_TEXT,
             "begin_ids": token_ids(config.get("bos_token_id")), "end_ids": ends,
             "added_tokens": added}
    with disk_errors(folder), atomic_folder(folder, {"imported": facts}) as temporary:
        # one that was tuned to chat still is
        save_model(temporary, model, eos_id=closing if closing in facts["end_ids"] else end)
        write_json(temporary / "generation_config.json",
                   {"bos_token_id": end, "eos_token_id": sorted({end, *facts["end_ids"]})})
        save_tokenizer(tokenizer, temporary, tokenizer.settings.get("chat_template"))
    return folder


def source_name(place: Path) -> str:
    """What a model is called: as the hub's cache calls it, else its folder's or file's name."""
    place = Path(os.path.abspath(place))
    in_cache = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    return (place.parent.parent.name.removeprefix("models--").replace("--", "/") if in_cache
            else place.name)


def generation_settings(place: Path) -> dict:
    """What generation_config.json says; {} if there is none."""
    path = (place if place.is_dir() else place.parent) / "generation_config.json"
    return read_json(path) if path.is_file() else {}
