"""A corpus as token caches: each source tokenised once, in bounded memory, kept by what went into it;
and the card that says what was read. Chapter 02a uses it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer
from tqdm import tqdm

from modern_llm.config import DataConfig
from modern_llm.data.packing import TokenCache, bits_per_byte
from modern_llm.data.reading import content_id, documents, how_split
from modern_llm.data.sources import DataError, find_source
from modern_llm.data.tokens import (
    build_lock, cache_root, disk_errors, encoded, end_of_text_id, tokenizer_digest,
)
from modern_llm.files import DamagedFolder, atomic_folder

SYNTHETIC_TOKENS = 2_500_000  # of an endless source, when no limit is given
CACHE_VERSION = 3


def _with_nats(name: str, split: str, world_seed: int) -> Iterator[tuple[str, float]]:
    if name != "synthetic":
        yield from ((text, math.nan) for text in documents(name, split, world_seed))
        return
    from modern_llm.data import synth

    part = "train" if split == "train" else "heldout"
    yield from ((item.text, item.nats)
                for item in synth.documents(split=part, seed=0, world_seed=world_seed))


def _write_cache(folder: Path, items: Iterable, end: int, dtype: str, limit: int | None,
                 bar: tqdm) -> dict:
    """Stream (ids, bytes, nats) into the files of a TokenCache; whole documents up to `limit`.
    Returns its counts.
    """
    lengths, sizes, nats, total = array("q"), array("q"), array("d"), 0
    with open(folder / "tokens.bin", "wb") as file:
        for ids, size, floor in items:
            if lengths and limit is not None and total + len(ids) + 1 > limit:
                break
            file.write(np.array([end, *ids], dtype=dtype).tobytes())
            lengths.append(len(ids) + 1)
            sizes.append(size)
            nats.append(floor)
            total += len(ids) + 1
            bar.update(len(ids) + 1)
        file.write(np.array([end], dtype=dtype).tobytes())
    if not lengths:
        return {"documents": 0}
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "bytes.npy", np.array(sizes, dtype=np.int64))
    if not math.isnan(nats[0]):
        np.save(folder / "nats.npy", np.array(nats))
    return {"documents": len(lengths), "tokens": total, "bytes": sum(sizes),
            "sizes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}


def build_token_cache(name: str, split: str, tokenizer: Tokenizer, max_tokens: int | None = None,
                      cache_dir: str | Path | None = None, world_seed: int = 0,
                      progress: bool = True, verify: bool = True) -> TokenCache:
    """The tokenised documents of a source: opened if they are in the cache, else built there in
    bounded memory.

    Args:
        name: a name of DATASET_REGISTRY, its hub path, or your own file.
        max_tokens: whole documents up to this many tokens; None = all (2.5M of the endless
            synthetic source).
        verify: compare every byte of an existing cache with its sha256, not only the sizes.
    """
    source = find_source(name)
    if source.where == "built-in":
        max_tokens = max_tokens or SYNTHETIC_TOKENS
    dtype = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"
    identity = [CACHE_VERSION, content_id(name, split, world_seed),
                tokenizer_digest(tokenizer), split, max_tokens]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    # a file may be called anything
    own = re.sub(r"[^a-zA-Z0-9_.-]", "-", Path(source.info.name).stem).strip(".")[:60]
    short = (own or "own") if source.where == "file" else source.info.name
    folder = Path(cache_dir or cache_root()) / f"{short}-{split}-{fingerprint}"
    with build_lock(folder):
        try:
            return TokenCache.open(folder, verify)
        except FileNotFoundError:
            pass
        except (DamagedFolder, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the token cache is damaged and is built again: {error}", stacklevel=2)
        meta = {"fingerprint": fingerprint, "source": source.info.name, "split": split,
                "where": source.where, "licence": source.info.licence,
                "note": "; ".join(filter(None, (source.note, how_split(name)))), "dtype": dtype,
                "world_seed": world_seed, "tokenizer": identity[2]}
        bar = tqdm(desc=f"tokenising {short} {split}", unit=" tokens", unit_scale=True,
                   mininterval=10, delay=5, disable=not progress)
        items = encoded(_with_nats(source.info.name, split, world_seed), tokenizer)
        with bar, disk_errors(folder), atomic_folder(folder, meta) as temporary:
            meta |= _write_cache(temporary, items,
                                 end_of_text_id(tokenizer), dtype, max_tokens, bar)
            if not meta["documents"]:
                raise DataError(f"{source.info.name}, {split}: no document has any text; check the "
                                "source's files")
        return TokenCache.open(folder)


def load_corpus(config: DataConfig, tokenizer: Tokenizer, cache_dir: str | Path | None = None,
                progress: bool = True) -> tuple[list[TokenCache], dict[str, TokenCache]]:
    """(training caches, validation cache of each source) of a DataConfig, built where they are not
    in the cache yet.
    """
    options = {"cache_dir": cache_dir, "world_seed": config.world_seed, "progress": progress}
    train = [build_token_cache(name, "train", tokenizer, config.max_train_tokens, **options)
             for name in config.sources]
    held_out = {name: build_token_cache(name, "validation", tokenizer, config.max_validation_tokens,
                                        **options) for name in config.sources}
    return train, held_out


def data_card(caches: Iterable[TokenCache]) -> pd.DataFrame:
    """One row per cache: what it holds, where it is from, what to know about it, and the
    fingerprint that names it.
    """
    card = pd.DataFrame([
        {"source": cache.meta["source"], "split": cache.meta["split"],
         "documents": len(cache), "tokens": cache.num_tokens, "bytes": cache.num_bytes,
         "bytes per token": round(cache.num_bytes / cache.num_tokens, 3),
         "floor bits per byte": None if cache.floor_nats is None
                                else round(bits_per_byte(cache.floor_nats, cache.num_bytes), 4),
         "found": cache.meta["where"], "licence": cache.meta["licence"],
         "note": cache.meta.get("note", ""), "fingerprint": cache.fingerprint} for cache in caches])
    floor = card["floor bits per byte"].astype(object)
    # beside numbers, pandas makes NaN of None
    return card.assign(**{"floor bits per byte": floor.where(floor.notna(), None)})
