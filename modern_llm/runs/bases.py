"""The small base of the preset "lesson": what a stage starts from when its run has nothing, made
once by the earlier stages and kept.

Plain plumbing under `stage`. Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import time
from pathlib import Path

from modern_llm.config import STAGES, PipelineConfig
from modern_llm.files import CHECKOUT, read_json
from modern_llm.messages import StageError, say
from modern_llm.runs.launch import start_papermill
from modern_llm.runs.lineage import own_checkpoint, start_of
from modern_llm.runs.spec import notebook_of, sections


def code_digest(notebook: Path) -> str:
    """A digest of the notebook's code and of every module of the package that it imports, directly
    or not.
    """
    cells = [cell for cell in read_json(notebook)["cells"] if cell["cell_type"] == "code"]
    texts, waiting, seen = [], [("".join(cell["source"]), ()) for cell in cells], set()
    while waiting:
        text, package = waiting.pop()
        texts.append(text)
        for path in imported_files(text, package):
            if path not in seen:
                seen.add(path)
                waiting.append((path.read_text(encoding="utf-8"),
                                path.parent.relative_to(CHECKOUT).parts))
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def imported_files(text: str, package: tuple[str, ...]) -> list[Path]:
    """The files of modern_llm that some code imports by `from … import`; `package`: the names of
    the folder that it lies in.
    """
    code, found = "\n".join(
        line for line in text.splitlines() if not line.startswith(("%", "!"))), []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.ImportFrom):
            continue
        around = package[:len(package) - node.level + 1] if node.level else ()
        module = (*around, *(node.module or "").split(".")) if node.module else around
        if module[:1] == ("modern_llm",):
            places = [CHECKOUT.joinpath(*module),
                      *(CHECKOUT.joinpath(*module, alias.name) for alias in node.names)]
            found += [
                path for place in places
                for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found


def base_name(stages: tuple[str, ...], config: PipelineConfig, device: str) -> str:
    """The run name of the last of `stages`, made one from the other: it changes with their settings
    and their code.
    """
    parts = [device, *(part for stage in stages
                       for part in (sections(config, stage),
                                    code_digest(notebook_of(stage))))]
    return f"{config.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def make_bases(stage: str, config: PipelineConfig, parameters: dict,
               device: str) -> dict[str, Path]:
    """The checkpoints that `stage` needs, made by the notebooks of the earlier stages, once, and
    kept in the cache.

    Another process that wants the same base waits for the first. One line says what was made, what
    reused, and where.
    """
    from modern_llm.data.tokens import build_lock, cache_root

    root, chain = cache_root() / "bases", STAGES[stage].base
    made: dict[str, Path] = {}
    how = []
    for count, earlier in enumerate(chain, 1):
        folder = root / base_name(chain[:count], config, device)
        with build_lock(folder):
            began, ready = time.time(), own_checkpoint(folder, earlier)
            if ready is None:
                say(f"{stage}: nothing to start from in this run: making a small base, stage "
                    f"{earlier}, once …")
                _make_base(earlier, folder, start_of(made), parameters)
            how.append(
                f"{earlier} ({'made before' if ready else f'made in {time.time() - began:.0f} s'}, "
                f"{folder.name})")
        made[earlier] = own_checkpoint(folder, earlier)
    say(f"{stage}: small base: {', '.join(how)}, kept in {root}")
    return made


def _make_base(stage: str, folder: Path, start: Path | None, parameters: dict) -> None:
    notebook = notebook_of(stage)
    values = {name: parameters[name] for name in ("preset", "seed", "device", "overrides")
              if parameters.get(name) not in (None, "")}
    # made by this process alone
    values["overrides"] = f"{values.get('overrides', '')} hardware.ranks=1".strip()
    values |= {"run": folder.name, "output_dir": str(folder.parent), "resume": True}
    if start:
        values["checkpoint"] = str(start)
    (folder / stage).mkdir(parents=True, exist_ok=True)
    # sums are rounded differently by one thread and by two, and training makes much of it: whoever
    # makes the base, it is the same
    process = start_papermill(notebook, folder / stage / "notebook.ipynb", values,
                              OMP_NUM_THREADS="1")
    try:
        text = process.communicate()[0].decode("utf-8", "replace")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or own_checkpoint(folder, stage) is None:
        last = "\n".join(text.strip().splitlines()[-8:])
        page = folder / stage / "notebook.ipynb"
        raise StageError(f"the small base could not be made: {notebook.name} "
                         f"failed{f', see {page}' if page.is_file() else ''}\n{last}")
