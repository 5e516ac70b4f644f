"""The notebook's kernel, while a stage is under way in it: what fails or is preempted is noted, and
the executed notebook is kept. Imports no torch.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from modern_llm.messages import Preempted, StageError, say
from modern_llm.runs.launch import SLOW_AND_UNUSED
from modern_llm.runs.record import StageRun
from modern_llm.runs.scheduler import PREEMPTION_SIGNALS


def mark_failures(stage: StageRun, namespace: dict) -> None:
    """From now on a cell that raises marks the stage as failed in `run.json` (unless it says how it
    ended), a scheduler's warning as preempted.
    """
    shell = namespace.get("get_ipython", lambda: None)()
    if shell is None:
        return
    busy, warned = threading.Event(), threading.Event()
    busy.set()  # this very cell

    def after_cell(result) -> None:
        busy.clear()
        error = result.error_in_exec
        # code in C may turn Preempted into another error
        if error is None or isinstance(error, (StageError, Preempted)) or warned.is_set():
            return
        if isinstance(error, getattr(sys.modules.get("torch"), "AcceleratorError", ())):
            say(f"{stage.stage}: the device {stage.device} is lost. What {stage.folder} holds is "
                f"whole: run again with run={stage.run!r} and "
                "resume=True, here, on another machine or with device=cpu")
        # a finished stage stays one
        stage.mark("finished" if (stage.folder / "results.json").is_file() else "failed")

    def end(number: int, frame) -> None:
        for other in PREEMPTION_SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # once is enough
        stage.mark("preempted")
        name = signal.Signals(number).name
        if busy.is_set():
            warned.set()
            raise Preempted(
                f"{name}: stage {stage.stage} was ended between two of its results; what it has "
                f"kept in {stage.folder} stays, and the same start goes on there")
        say(f"{stage.stage}: ended by {name}")
        os._exit(1)  # between two cells nobody would see an exception

    shell.events.register("pre_run_cell", lambda info: busy.set())
    shell.events.register("post_run_cell", after_cell)
    # a kernel of its own
    if (type(shell).__name__ == "ZMQInteractiveShell"
            and threading.current_thread() is threading.main_thread()):
        end.stage = stage
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, end)


def notebook_path(namespace: dict) -> Path | None:
    """Where the executing notebook is being saved: by papermill (its output), or by Jupyter; None
    if nobody says.
    """
    if (path := namespace.get("PAPERMILL_OUTPUT_PATH") or os.environ.get("MODERN_LLM_NOTEBOOK")
                or os.environ.get("JPY_SESSION_NAME")):
        return Path(path)
    try:
        import psutil

        sys.modules.setdefault(SLOW_AND_UNUSED, None)
        from papermill.cli import papermill

        parent = psutil.Process().parent()
        words = parent.cmdline()
        start = next(i for i, word in enumerate(words)
                     if Path(word).name in ("papermill", "__main__.py"))
        output = papermill.make_context("papermill", words[start + 1:],
                                        resilient_parsing=True).params["output_path"]
        return Path(parent.cwd()) / output if output and output != "-" else None
    except (ImportError, StopIteration, psutil.Error, ValueError):
        return None


def keep_notebook(target: Path, namespace: dict) -> None:
    """When the kernel ends, copy the executed notebook into the run's folder (papermill saves after
    every cell).
    """
    source = notebook_path(namespace)
    if source is None or "ipykernel" not in sys.modules:
        return

    def copy() -> None:
        if source.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)

    atexit.register(copy)
