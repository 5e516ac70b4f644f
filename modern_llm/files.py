"""Files that are whole or absent: atomic writes, checksums, folders that appear in one step. No
torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from modern_llm.messages import StageError, UserError

# the folder the package lies in: a checkout, if it was installed from one with -e
CHECKOUT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (CHECKOUT / "settings.ini").is_file()


class DamagedFolder(UserError, RuntimeError):
    """Kept files, such as those of `atomic_folder`, that are missing or changed. The message names
    the file.
    """


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return (hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest")
                else _sha256(file))


def _sha256(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> Path:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def nan_to_none(value: object) -> object:
    """The value with None in place of every number in it that is not finite: JSON has no NaN, and
    what is not known is null.
    """
    if isinstance(value, dict):
        return {name: nan_to_none(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: object) -> Path:
    """`write_text` of readable JSON; numbers that are not finite become null, see `nan_to_none`."""
    return write_text(
        path, json.dumps(nan_to_none(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class InvalidJson(ValueError):
    """A file without a JSON object; `what` says why, to be read behind the file's name: "is empty".
    """

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path} {what}")
        self.what = what


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises OSError or InvalidJson."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise InvalidJson(path, "is not a file" + (" but a folder" if path.is_dir() else ""))
    data = path.read_bytes()
    if not data.strip(b"\0 \r\n\t"):
        raise InvalidJson(path, "is empty" if not data else "holds nothing but zeros and spaces")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise InvalidJson(path, "is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise InvalidJson(path, f"is not UTF-8 text, at byte {error.start}") from None
    except ValueError as error:
        raise InvalidJson(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidJson(path, f"holds {json.dumps(value)[:40]}, not a JSON object")
    return value


def read_record(path: Path) -> dict:
    """A JSON object that a stage wrote. StageError if it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{path} is damaged ({getattr(error, 'what', error)})") from error


def cached_frame(path: str | Path, make: Callable[[], object]):
    """The pandas table kept in `path` (JSON lines); if there is none, what `make()` returns, kept
    there for the next time.

    For work that a resumed stage must not repeat. The table that is returned is always the one read
    from the file.
    """
    import io

    import pandas as pd

    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, make().to_json(orient="records", lines=True, double_precision=15,
                                        force_ascii=False))
    try:
        table = pd.read_json(io.StringIO(path.read_text(encoding="utf-8")), lines=True, dtype=False,
                             precise_float=True)
    except ValueError as error:
        raise DamagedFolder(f"{path} is not a table of JSON lines ({error}): delete it, and it is "
                            "made again") from error
    # nothing but null: NaN
    return table.astype(dict.fromkeys((name for name in table if table[name].isna().all()), float))


def previous_of(folder: str | Path) -> Path:
    """Where the former content of a folder is while, or after, it is replaced."""
    folder = Path(folder)
    return folder.with_name(folder.name + ".previous")


@contextlib.contextmanager
def atomic_folder(folder: str | Path, meta: dict | None = None,
                  keep_previous: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes `folder`, with `meta.json` listing every
    file's sha256.

    A former `folder` is moved to `<folder>.previous` first, and with `keep_previous` stays there;
    otherwise it is deleted after the rename. So a kill at any moment leaves one whole folder behind
    (`find_folder` finds it). On an exception nothing changes, except that after a failed rename the
    former folder may be the previous one.
    """
    folder, previous = Path(folder), previous_of(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    oldest = temporary.with_suffix(".old.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        meta = {**nan_to_none(meta or {}),
                "sha256": {str(p.relative_to(temporary)): sha256(p) for p in files}}
        meta["sha256"]["meta.json"] = _digest(meta)
        write_json(temporary / "meta.json", meta)
        for path in [*files, *sorted({path.parent for path in files} | {temporary})]:
            sync(path)
        if folder.exists():
            if previous.exists():
                os.replace(previous, oldest)
            os.replace(folder, previous)
        os.replace(temporary, folder)
        sync(folder.parent)
        shutil.rmtree(oldest, ignore_errors=True)
        if not keep_previous:
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if oldest.exists() and not previous.exists():
            os.replace(oldest, previous)


def _digest(meta: dict) -> str:
    """sha256 of what `meta.json` says, its own digest left out."""
    sums = {name: digest for name, digest in meta["sha256"].items() if name != "meta.json"}
    return hashlib.sha256(json.dumps({**meta, "sha256": sums}, sort_keys=True).encode()).hexdigest()


def find_folder(folder: str | Path) -> Path:
    """`folder`, or `<folder>.previous` if a kill fell between the two renames. FileNotFoundError
    names both.
    """
    folder, previous = Path(folder), previous_of(folder)
    if (folder / "meta.json").is_file():
        return folder
    if (previous / "meta.json").is_file() and not folder.exists():
        return previous
    raise FileNotFoundError(f"no complete folder at {folder}"
                            + (": its meta.json is missing" if folder.exists()
                               else f" (nor {previous.name} beside it)"))


def check_folder(folder: str | Path) -> dict:
    """The meta data of a folder written by `atomic_folder`, after checking every file against its
    sha256.
    """
    folder = Path(folder)
    try:
        meta = read_json(folder / "meta.json")
        sums = dict(meta["sha256"])
        # older folders say nothing of meta.json itself
        if sums.pop("meta.json", None) not in (None, _digest(meta)):
            raise ValueError("its content does not fit its own sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFolder(f"{folder / 'meta.json'} is missing or damaged: {error}") from error
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise DamagedFolder(
                f"{folder / name} is missing, which meta.json names: the folder is incomplete")
        if sha256(folder / name) != digest:
            raise DamagedFolder(
                f"{folder / name} is truncated or changed: its sha256 is not the one in meta.json")
    return meta
