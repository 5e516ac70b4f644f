"""The steps of a plan, done: each stage is its notebook, executed by papermill into the run's folder;
the last writes the report. Imports no torch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from modern_llm.config import TRAINED
from modern_llm.files import read_json, write_json
from modern_llm.messages import Preempted, StageError
from modern_llm.runs.launch import start_papermill
from modern_llm.runs.locks import COMMAND_LOCK, RunLock, is_alive, owner_of
from modern_llm.runs.parameters import report_folder
from modern_llm.runs.pipeline import Step, results_digest
from modern_llm.runs.record import writes_to
from modern_llm.runs.resume import run_record
from modern_llm.runs.scheduler import PREEMPTION_SIGNALS
from modern_llm.runs.spec import notebook_of

STOP_FILE = "STOP"  # the trainer looks for it after every step
# of `modern-llm run`, EX_TEMPFAIL of sysexits.h: start it again, and it goes on
EXIT_PREEMPTED = 75


def raise_on_preemption() -> None:
    """From now on SIGTERM or SIGUSR1, the first of them, raises Preempted in this process."""
    def end(number: int, frame) -> None:
        for other in PREEMPTION_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Preempted(signal.Signals(number).name)

    for number in PREEMPTION_SIGNALS:
        signal.signal(number, end)


def lock_for(run_folder: Path, stages: list[str]) -> RunLock:
    """The lock of a command on a run: a second command is refused for as long as the first one
    runs, between two stages too.
    """
    with writes_to(run_folder, "or choose another --output-dir"):
        return RunLock(run_folder, f"modern-llm run, {', '.join(stages)}", COMMAND_LOCK).take()


def execute(step: Step) -> int:
    """Run one stage with its output shown live; returns the exit code.

    Ctrl-C asks a stage that trains to stop: it finishes its optimizer step, writes a checkpoint and
    ends. A second one kills it; a stage that does not train is killed at once and starts over, or
    where its kept work ends. A scheduler's warning is passed on to the stage, which ends in the
    same way; then, and when the stage was preempted by itself, Preempted is raised.
    """
    if step.stage == "report":
        return write_the_report(step)
    output = step.folder / "notebook.ipynb"
    # the record of what is finished stays until the stage's own checks pass
    if (step.folder / "results.json").is_file():
        output = step.folder.parent / f".{step.stage}.ipynb"
    with writes_to(step.folder, "or choose another --output-dir"):
        # refuses, before the notebook is touched, if a kernel works there
        RunLock(step.folder.parent, "modern-llm run").take().release()
        output.parent.mkdir(parents=True, exist_ok=True)
    process = start_papermill(notebook_of(step.stage), output, step.parameters)
    relay = threading.Thread(target=show, args=(process.stdout,), daemon=True)
    relay.start()
    code, warning, asked = None, None, False
    while code is None:
        try:
            code = process.wait(1 if warning or asked else None)
        except subprocess.TimeoutExpired:
            # again, since a stage that has not begun does not listen yet, and clears its folder
            if warning:
                pass_on(step, process.pid)
            elif step.folder.is_dir():
                (step.folder / STOP_FILE).touch()
        except Preempted as caught:
            warning = caught
            print(f"{warning}: ending stage {step.stage}, with a checkpoint if it trains",
                  file=sys.stderr, flush=True)
            pass_on(step, process.pid)
        except KeyboardInterrupt:
            if asked or step.stage not in TRAINED:
                os.killpg(process.pid, signal.SIGKILL)
                mark(step, "interrupted")
                raise
            asked = True
            print("stopping after this step, with a checkpoint; Ctrl-C again kills",
                  file=sys.stderr, flush=True)
    relay.join(timeout=5)
    if asked:
        (step.folder / STOP_FILE).unlink(missing_ok=True)
    if output.parent != step.folder:
        began = not (step.folder / "results.json").is_file() or code == 0
        if began and output.is_file():  # a kernel that was killed leaves none
            os.replace(output, step.folder / "notebook.ipynb")
        output.unlink(missing_ok=True)
    if warning and status(step) in ("running", "stopped"):
        mark(step, "preempted")
    # another rank failed, and the launcher's warning was only meant to end this one
    if code and warning and status(step) == "failed":
        return code
    # the kernel alone was warned, or knows when its job ends
    if warning or (code and status(step) == "preempted"):
        raise warning or Preempted(f"stage {step.stage} was preempted")
    return code


def pass_on(step: Step, papermill: int) -> None:
    """Send SIGTERM to the kernel that runs a stage, once it has begun; and leave a STOP file for
    processes of other hosts.
    """
    import psutil

    owner = owner_of(step.folder.parent)
    if owner is None or not is_alive(owner):
        return
    try:
        kernel = psutil.Process(owner["pid"])
        if papermill in (parent.pid for parent in kernel.parents()):
            kernel.send_signal(signal.SIGTERM)
            if step.stage in TRAINED:
                (step.folder / STOP_FILE).write_text("preempted")
    except (psutil.Error, OSError):  # it has just ended
        return


def status(step: Step) -> str:
    """What `run.json` says of the stage: "running", "finished", "stopped", …; "unknown" if it never
    began.
    """
    return run_record(step.folder.parent)["stages"].get(step.stage, {}).get("status", "unknown")


def mark(step: Step, status: str) -> None:
    """Note in `run.json` how a stage ended that could not do so itself."""
    path = step.folder.parent / "run.json"
    if path.is_file() and step.stage in (record := read_json(path))["stages"]:
        record["stages"][step.stage]["status"] = status
        write_json(path, record)


def write_the_report(step: Step) -> int:
    """Write the report of the run and note it in `run.json`."""
    # figures are files here, whatever window the user's notebooks draw in
    os.environ["MPLBACKEND"] = "Agg"
    from modern_llm.report.write import ReportError, write_report

    try:
        path = write_report(step.folder.name, step.folder.parent, report_folder(step.folder),
                            force=bool(step.parameters.get("force")))
    except ReportError as error:
        raise StageError(str(error)) from error
    record = read_json(step.folder / "run.json")
    write_json(step.folder / "run.json",
               {**record, "report": {"path": str(path), "of": results_digest(step.folder)}})
    return 0


RULE = 75 * "-"  # between which papermill says in which cell an error came up
NOISE = ("[IPKernelApp]", "Executing Cell", "Ending Cell", "Input Notebook:", "Output Notebook:",
         "Executing notebook with kernel", "<Figure size", "<IPython.core.display",
         "Black is not installed", "Starting kernel", "Kernel is running over TCP")


def show(stream) -> None:
    """Pass on what papermill prints; if nobody listens any more, read it all the same, so that the
    stage is not held up.
    """
    try:
        _show(stream)
    except (BrokenPipeError, ValueError):
        for _ in stream:
            pass


def _show(stream) -> None:
    """Text and tables as they are, progress bars on one line, papermill's own messages left out, a
    cell's error last (`user_message`).
    """
    bar, due, held, error = False, 0.0, None, []
    for raw in stream:
        line = raw.decode("utf-8", "replace").rstrip("\n")
        # papermill ends every refresh of a bar with a newline
        if line.startswith("\r") or (bar and not line.strip()):
            text = line.rsplit("\r", 1)[-1]
            if text.strip() and (sys.stderr.isatty() or time.time() >= due or "100%" in text):
                sys.stderr.write(f"\r{text}\x1b[K" if sys.stderr.isatty() else f"{text}\n")
                sys.stderr.flush()
                due = time.time() + 10
            bar = True
            continue
        if bar and sys.stderr.isatty():
            sys.stderr.write("\n")
        bar = False
        if line == "Traceback (most recent call last):" and held is None:
            held = []
        if held is not None:  # papermill's own traceback: the notebook's, which follows, is enough
            held.append(line)
            if line.startswith("papermill.exceptions.PapermillExecutionError"):
                held = None
        elif (error[1:] or (error and line.startswith("Exception encountered at "))
              or (not error and line == RULE)):
            error.append(line)
        elif error:  # a line of dashes, and no error behind it
            print(error.pop(), line, sep="\n", flush=True)
        elif not line.startswith(NOISE):
            print(line, flush=True)
    if held or error:
        print("\n".join(user_message(error) + (held or [])), flush=True)


def user_message(error: list[str]) -> list[str]:
    """What to show of the lines that say which cell failed and how: of a UserError only the
    message, of others everything.
    """
    begin = max((i for i, line in enumerate(error) if line.startswith("Exception encountered")),
                default=len(error))
    said = [line for line in error[begin + 1:] if line != RULE]
    if (any("Traceback (most recent call last)" in line for line in said)
            or not (said and re.match(r"\w+: ", said[0]))):
        return error
    return [said[0].partition(": ")[2], *said[1:]]
