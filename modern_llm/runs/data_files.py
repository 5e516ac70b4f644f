"""The data that a stage reads: whether all of it is here, how it is split, and the digests by which
a change is seen.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from modern_llm.config import BUILT_IN, STAGES, PipelineConfig
from modern_llm.files import sha256
from modern_llm.runs.spec import setting


def data_names(config: PipelineConfig, stage: str) -> list[str]:
    """The data sets that the stage reads and that have to be found; what is built in is always
    there.
    """
    found: list[str] = []
    for path in STAGES[stage].data:
        value = setting(config, path)
        found += [value] if isinstance(value, str) else list(value)
    # "text": data.sources
    return [name for name in dict.fromkeys(found) if name not in ("text", *BUILT_IN)]


def missing_data(config: PipelineConfig, stages: Iterable[str]) -> list[str]:
    """Why each data set that the stages read and that is not here cannot be had; nothing is
    downloaded.
    """
    from modern_llm.data.sources import (
        DatasetNotFound, dataset_info, find_source, missing_reason, remedy,
    )

    problems, absent, files = [], {}, {}
    for name in config.data.sources:
        with contextlib.suppress(DatasetNotFound):  # an unknown name is a case of its own
            info = dataset_info(name)
            first = files.setdefault(tuple(map(os.path.realpath, info.files["train"]))
                                     if info.licence == "your own" else info.name, name)
            if first != name:
                problems.append(
                    f"data: data.sources names the same source twice: {first!r} and {name!r}")
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
        problems.append(f"data: {', '.join(absent)} not found. Tried, for {name}, {reason}. "
                        f"Remedy, for each: {remedy()}")
    if any(STAGES[stage].first for stage in stages) and config.data.tokenizer == "gpt2":
        from modern_llm.data.tokens import gpt2_tokenizer

        try:
            gpt2_tokenizer()
        except DatasetNotFound as error:
            problems.append(f"data: {error}")
    return problems


def check_splits(config: PipelineConfig, stage: str) -> tuple[list[str], list[str]]:
    """Of the plain files that a stage reads: how those are split that came without a held-out part,
    and why others cannot be used.
    """
    from modern_llm.data.reading import how_split
    from modern_llm.data.sources import DataError, DatasetNotFound, find_source

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
    """Path, size, time of change and sha256 of every plain file of the data sets that a stage reads
    (the hub has versions of its own).

    What `known` says of a file is believed as long as path, size and time are the same.
    """
    from modern_llm.data.sources import DatasetNotFound, find_source

    found = {}
    for name in data_names(config, stage):
        try:
            source = find_source(name)
        except DatasetNotFound:  # `missing_data` says so
            continue
        for path in sorted({path for paths in source.files.values() for path in paths}):
            facts = {"source": name, "path": str(path), "bytes": path.stat().st_size,
                     "changed": path.stat().st_mtime_ns}
            former = (known or {}).get(f"{name}/{path.name}", {})
            same = all(former.get(fact) == value for fact, value in facts.items())
            found[f"{name}/{path.name}"] = {
                **facts, "sha256": former["sha256"] if same else sha256(path)}
    return found


def changed_data(config: PipelineConfig, stage: str, former: dict) -> list[str]:
    """A line for every file in `former` (see `data_files`) whose content is another one now, or
    that is gone.
    """
    now, read = data_files(config, stage, former), data_names(config, stage)
    lines = []
    for key, entry in former.items():
        if entry["source"] in read and key not in now:
            lines.append(f"data file {entry['path']} is gone")
        elif entry["source"] in read and now[key]["sha256"] != entry["sha256"]:
            lines.append(f"data file {now[key]['path']}: sha256 {entry['sha256'][:12]} -> "
                         f"{now[key]['sha256'][:12]}")
    return lines
