"""A run in one file that can prove its report: its record with a manifest of sha256, from which the
report is made again and compared. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from modern_llm.config.schema import TRACKERS
from modern_llm.files import DamagedFolder, sync
from modern_llm.messages import StageError
from modern_llm.report.page import Run
from modern_llm.report.seeds import runs_of_other_seeds
from modern_llm.report.write import (
    Compared, compare_reports, made_from_table, write_again, write_report,
)
from modern_llm.runs.parameters import is_in_use, report_folder
from modern_llm.runs.record import git_commit, writes_to

FORM = 1  # of the manifest
MANIFEST = "manifest.json"
MADE_BY = ("modern_llm", "pandas", "matplotlib")  # packages whose version shows in a report's files
WEIGHTS = (".safetensors", ".pt", ".gguf")
STATE_FILE = "training_state.pt"  # to resume with; never packed
# of runs of other seeds: what the section across seeds reads
OF_SEEDS = ("run.json", "*/results.json", "*/params.json", "eval/ledger.csv")
BLOCK = 1 << 20


# ---- what goes in --------------------------------------------------------------------------------


def files_of(run_folder: Path, weights: bool = False) -> dict[str, Path]:
    """The files of a run's record by their names in it: all but locks, logs, the report, curves in
    a tracker and, unless asked for, weights; of those never what only training goes on from.
    """
    found = {}
    for path in sorted(run_folder.rglob("*")):
        parts = path.relative_to(run_folder).parts
        if (not path.is_file() or any(part.startswith(".") for part in parts)
                or parts[0] in ("report", "logs", "jobs", *TRACKERS)):
            continue
        if any(part.partition(".")[0] in ("checkpoint", "checkpoints") for part in parts[:-1]):
            # its meta.json would miss what is left out
            left_out = (path.name == STATE_FILE or "shards" in parts
                        or path.name == "meta.json" and (path.parent / STATE_FILE).exists()
                        or any(part.startswith("checkpoint.") for part in parts))
            if left_out or not weights:
                continue
        if path.suffix not in WEIGHTS or weights:
            found["/".join(parts)] = path
    return found


def stored_report(run: Run, given: Path | None = None) -> Path | None:
    """The report that was written of a run: the one in the folder `given`; else the one that its
    record names, or in the usual place, if it is of the files that are there now. None if there is
    none.

    StageError if there is none in the folder that was given.
    """
    name = run.folder.name
    if given is not None:
        if not (path := given / f"{name}_report.md").is_file():
            raise StageError(f"{given} has no {path.name}: name the folder that the report was "
                             "written to, or leave --report out")
        return path
    said = run.record.get("report")
    places = [Path(str(said["path"]))] if isinstance(said, dict) and said.get("path") else []
    places.append(report_folder(run.folder) / f"{name}_report.md")
    return next((path for path in places if path.is_file() and is_of(path, run)), None)


def is_of(report: Path, run: Run) -> bool:
    """Whether a report was made of a run's files as they are now, by the sums beside it."""
    name = run.folder.name
    sums = report.parent / "results" / called(report, name) / "made_from.csv"
    return (report.name.startswith(f"{name}_report") and sums.is_file()
            and sums.read_text(encoding="utf-8") == made_from_table(run))


def called(report: Path, run: str) -> str:
    """How the folders beside a report are called: the run's name, and what was added to it."""
    return run + report.stem.removeprefix(f"{run}_report")


def report_files(report: Path, run: str) -> dict[str, Path]:
    """A report with its pictures and numbers, by their names in its folder."""
    root, name = report.parent, called(report, run)
    paths = [report, *(path for kind in ("figures", "results")
                       for path in sorted((root / kind / name).rglob("*")) if path.is_file())]
    return {path.relative_to(root).as_posix(): path for path in paths}


# ---- packing -------------------------------------------------------------------------------------


def write_capsule(run_folder: Path, target: Path, weights: bool = False,
                  report: Path | None = None, force: bool = False) -> dict:
    """Pack a run into `target`, a zip archive that is whole or absent; the same files give the same
    bytes.

    Args:
        run_folder: the run; its neighbours of other seeds, which its report reads, go in, too.
        target: the file.
        weights: take the models' files with it, without the state to resume from.
        report: the folder its report was written to; None for the usual places. Where there is no
            report of these files, one is made.
        force: write over `target`.

    Returns:
        The manifest: what is inside, with the sha256 of each file, and what made it.

    Raises:
        StageError: nothing is finished, the run is under way, `target` exists, lies in the run or
            cannot be written.
    """
    name, runs = run_folder.name, run_folder.parent
    if target.exists() and not force:
        raise StageError(f"{target} exists: --force writes over it, --to FILE leaves it")
    if run_folder.resolve() in target.resolve().parents:
        raise StageError(f"{target} lies in the run's own folder, and the next capsule would hold "
                         "this one: name another place with --to")
    if is_in_use(run_folder):
        raise StageError(f"run {name!r} is under way: pack it when its stages have ended")
    run = Run(run_folder)
    if not run.results:
        raise StageError(f"run {name!r} has no finished stage in {run_folder}: there is nothing to "
                         "pack yet")
    with tempfile.TemporaryDirectory() as scratch:
        stored = stored_report(run, report)
        written = stored or write_report(name, runs, Path(scratch))
        files = {f"report/{inside}": path for inside, path in report_files(written, name).items()}
        files |= {f"runs/{name}/{inside}": path
                  for inside, path in files_of(run_folder, weights).items()}
        for other in runs_of_other_seeds(name, runs):
            files |= {f"runs/{path.relative_to(runs).as_posix()}": path
                      for pattern in OF_SEEDS for path in sorted(other.folder.glob(pattern))
                      if other.folder.name != name}
        if odd := [inside for inside in files if not stays_inside(inside, files)]:
            raise StageError(f"{files[odd[0]]} has a name that other systems cannot have: rename "
                             "it, or take it out of the run's folder")
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with writes_to(target.parent, "or choose another place with --to"):
                with zipfile.ZipFile(temporary, "w") as archive:
                    sums = {inside: _put(archive, inside, files[inside])
                            for inside in sorted(files)}
                    manifest = {
                        "capsule": FORM, "run": name, "lay_in": str(run_folder.resolve()),
                        "made_by": made_by(), "weights": weights,
                        "report": f"report/{written.name}",
                        "report_was": "stored" if stored else "made while packing",
                        "data": _data_of(run), "files": sums}
                    page = Path(scratch) / MANIFEST
                    page.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
                    _put(archive, MANIFEST, page)
                sync(temporary)
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return manifest


def made_by() -> dict[str, str]:
    """The versions of this program and of what writes a report's tables and pictures."""
    found = {"git_commit": git_commit()}
    for package in MADE_BY:
        with contextlib.suppress(PackageNotFoundError):  # run from a folder, not installed
            found[package] = version(package)
    return found


def _put(archive: zipfile.ZipFile, inside: str, path: Path) -> str:
    """Add a file to an archive, with neither its time nor its owner; its sha256."""
    info = zipfile.ZipInfo(inside)  # of 1980-01-01
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    info.compress_type = (zipfile.ZIP_STORED if path.suffix in (*WEIGHTS, ".png")
                          else zipfile.ZIP_DEFLATED)
    digest, large = hashlib.sha256(), path.stat().st_size > 1 << 30
    with open(path, "rb") as source, archive.open(info, "w", force_zip64=large) as sink:
        while block := source.read(BLOCK):
            digest.update(block)
            sink.write(block)
    return digest.hexdigest()


def _data_of(run: Run) -> dict[str, str]:
    """The sha256 of every file of data that the stages read, as they recorded it."""
    return {name: entry.get("sha256", "") for params in run.params.values()
            for name, entry in sorted(params.get("data_files", {}).items())}


# ---- checking ------------------------------------------------------------------------------------


def check_capsule(file: Path) -> tuple[dict, list[Compared]]:
    """Unpack a capsule into a temporary folder, check every file against the manifest, make the
    report again from them alone, and compare it with the one inside.

    Returns:
        The manifest, and a row for every file of either report.

    Raises:
        DamagedFolder: the archive, or a file in it, is not what was packed; the message names it.
        StageError: `file` cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="capsule-") as scratch:
        place = Path(scratch)
        manifest = unpack(file, place / "in")
        run = Run(place / "in" / "runs" / manifest["run"], Path(manifest["lay_in"]))
        stored = place / "in" / manifest["report"]
        again = write_again(run, place / "again", called(stored, manifest["run"]))
        return manifest, compare_reports(report_files(stored, manifest["run"]),
                                         report_files(again, manifest["run"]))


def unpack(file: Path, folder: Path) -> dict:
    """Write the files of a capsule into a new folder, each checked against the manifest, which is
    returned. DamagedFolder names the first that is missing, changed, or would leave the folder.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _unpacked(archive, file, folder)
    except OSError as error:
        raise StageError(f"{file} cannot be unpacked: {error.strerror or error}; name a capsule, a "
                         "file that `modern-llm capsule RUN` wrote") from error
    except zipfile.BadZipFile as error:
        raise DamagedFolder(f"{file} is no capsule, or a part of it is missing ({error}): copy it "
                            "again, or pack the run anew") from error


def stays_inside(name: str, names: Collection[str]) -> bool:
    """Whether a file of this name lies in the folder it is unpacked to, on every system, beside the
    others of `names`.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not (
        path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0") or name.endswith("/")
        or any(str(above) in names for above in path.parents))


def _unpacked(archive: zipfile.ZipFile, file: Path, folder: Path) -> dict:
    remedy = "copy the capsule again, or pack the run anew"
    entries = {entry.filename: entry for entry in archive.infolist()}
    for name in entries:
        if not stays_inside(name, entries):
            raise DamagedFolder(f"{file} holds {name!r}, a path that no capsule has and that could "
                                f"lead out of the folder: nothing was unpacked; {remedy}")
    if len(entries) < len(archive.infolist()):
        raise DamagedFolder(f"{file} holds two files of one name; {remedy}")
    if MANIFEST not in entries:
        raise DamagedFolder(f"{file} has no {MANIFEST}: it is no capsule, or was packed by another "
                            "program; use `modern-llm capsule RUN`")
    if (size := sum(entry.file_size for entry in entries.values())) > shutil.disk_usage(
            folder.parent).free:
        raise StageError(f"{file} holds {size / 1e9:.1f} GB, which {folder.parent} has not free: "
                         "make room, or set TMPDIR to another folder")
    folder.mkdir()
    _get(archive, entries[MANIFEST], folder, file, remedy)
    manifest = _manifest(folder / MANIFEST, file, remedy)
    sums = manifest["files"]
    if lost := sorted(sums.keys() - entries.keys()):
        raise DamagedFolder(f"{file} lacks {lost[0]}, which its manifest names; {remedy}")
    if more := sorted(entries.keys() - sums.keys() - {MANIFEST}):
        raise DamagedFolder(f"{file} holds {more[0]}, which its manifest does not name; {remedy}")
    for name, digest in sums.items():
        if _get(archive, entries[name], folder, file, remedy) != digest:
            raise DamagedFolder(f"{name} in {file} was changed: its sha256 is not the one in the "
                                f"manifest; {remedy}")
    return manifest


def _get(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, file: Path,
         remedy: str) -> str:
    """Write a file of an archive into the folder; its sha256."""
    target, digest = folder / entry.filename, hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(entry) as source, open(target, "wb") as sink:
            while block := source.read(BLOCK):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedFolder(f"{entry.filename} in {file} is damaged ({error}); {remedy}") from error
    return digest.hexdigest()


def _manifest(path: Path, file: Path, remedy: str) -> dict:
    """The manifest of a capsule, which says what is needed to check it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["capsule"] > FORM:
            raise DamagedFolder(f"{file} is of form {found['capsule']}, and this version reads up "
                                f"to {FORM}: check it with a newer one")
        texts = (*(found[name] for name in ("run", "lay_in", "report")),
                 *found["files"].values(), *found["made_by"].values())
        if (not all(isinstance(text, str) for text in texts)
                or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", found["run"])
                or found["report"] not in found["files"]):
            raise ValueError("it lacks the run, the report or the sums")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFolder(f"{MANIFEST} in {file} is not one ({type(error).__name__}: {error}); "
                            f"{remedy}") from error
    return found
