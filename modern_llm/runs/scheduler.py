"""What SLURM says of jobs, whatever else a cluster prints around it: greetings, warnings, colours,
nothing at all. Imports no torch.

squeue and sinfo are asked for rows that begin with a mark, which no other line has; sacct, which
cannot print one, for rows that begin with the number of a job that was asked about and end with a
state. Nothing here fails: what is not said stays unknown.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass

from modern_llm.messages import say

MARK = "modern_llm|"
# signals of a scheduler
PREEMPTION_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 20.0  # seconds that a command may take
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL",
         "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
# of the others that have not ended
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class CommandOutput:
    """The exit code of a command and what it printed; bytes that are not UTF-8 are U+FFFD."""

    code: int
    out: str
    err: str

    def rows(self, fields: int) -> list[list[str]]:
        """The fields of every line with our mark."""
        found = [row.split("|", fields - 1) for line in _lines(self.out)
                 for _, mark, row in [line.partition(MARK)] if mark]
        return [[field.strip() for field in row] for row in found if len(row) == fields]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in _COLOUR.sub("", text).split("\n")]


def slurm_command(*words: str, seconds: float = PATIENCE, **options) -> CommandOutput | None:
    """What a command of SLURM says; None if it is not here, cannot be started, or does not answer
    in time, which a line says.

    `options` are those of Popen. A user's filters and formats (SQUEUE_USERS, SACCT_FORMAT, …) are
    left out.
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("SQUEUE_", "SINFO_", "SACCT_"))}
    # 0: a waiting array's numbers are not cut off
    options = {"env": environment | {"SLURM_BITSTR_LEN": "0"}, **options}
    if not (program := shutil.which(words[0])):
        return None
    try:
        process = subprocess.Popen([program, *words[1:]], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                                   errors="replace", start_new_session=True, **options)
    except OSError as error:
        say(f"{words[0]} cannot be started: {error.strerror}")
        return None
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:  # also Ctrl-C: nothing of it may stay behind
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        say(f"{words[0]} has not answered within {seconds:g} s: what it knows is left out")
        return None
    return CommandOutput(process.returncode, out, err)


def is_shown_as(job: str, number: str, shown: str, state: str) -> bool:
    """Whether a row of squeue is about a job: `number` is what SLURM counts, `shown` what it calls
    it: 990, 990_3, 990+1, 990_[4-9%2].

    A task of an array has a number of its own only once it has begun; the tasks that wait share the
    array's.
    """
    if (job == shown
            or (job == number and not ("_" in shown and "[" not in shown and state == "PENDING"))):
        return True
    array, _, task = job.partition("_")
    waiting = re.fullmatch(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]", shown)
    if not (waiting and task.isdecimal() and waiting[1] == array):
        return False
    for part in waiting[2].split(","):
        if each := re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part):
            first, last, step = int(each[1]), int(each[2] or each[1]), int(each[3] or 1)
            if first <= int(task) <= last and (int(task) - first) % max(1, step) == 0:
                return True
    return False


def job_states(ids: list[str]) -> dict[str, str]:
    """The state of each job, such as `RUNNING` or `PENDING (Dependency)`; jobs that nobody
    remembers are left out.
    """
    found: dict[str, str] = {}
    queue = (slurm_command("squeue", "--me", "-h", "-t", "all", "-o", MARK + "%A|%i|%T|%r") if ids
             else None)
    rows = queue.rows(4) if queue else []
    if queue and queue.code and not rows:
        said = _lines(queue.err.strip() or queue.out.strip())[-1]
        say(f"squeue: {said or f'exit code {queue.code}'}")
    for number, shown, state, reason in rows:
        for job in ids:
            if is_shown_as(job, number, shown, state):
                found[job] = state + (f" ({reason})"
                                      if state == "PENDING" and reason not in ("", "None") else "")
    # squeue forgets after minutes; a cluster with accounting does not
    if gone := [job for job in ids if job not in found]:
        known = slurm_command("sacct", "-n", "-X", "-P", "-j",
                              ",".join(gone), "-o", "JobIDRaw,JobID,State")
        for line in _lines(known.out) if known else []:
            *names, state = line.split("|")
            if re.fullmatch(r"[A-Z_]+\+?( by \S+)?", state):
                found |= {job: state for job in gone if job in names}
    return found


def is_queued(state: str) -> bool:
    """Whether a job in this state waits, runs or will run again; False for one that nobody
    remembers.
    """
    return bool(state) and state.split(" ")[0].rstrip("+") not in ENDED


def job_runs(job: str) -> bool | None:
    """Whether SLURM has a job on its nodes now; None where nobody can say."""
    queue = slurm_command("squeue", "--noheader", "--jobs", job, "--format", MARK + "%A|%i|%T")
    if queue is None:
        return None
    if queue.code and not queue.rows(3):
        return False if "Invalid job id" in queue.out + queue.err else None
    return any(is_shown_as(job, *row) and row[2] in AT_WORK for row in queue.rows(3))


def this_job() -> str:
    """The job that this process belongs to, as squeue, scancel and the log files name it; a task of
    an array is 990_3. "" outside.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def submitted(said: CommandOutput) -> str | None:
    """The number of the job in what `sbatch --parsable` printed: 123, or 123;cluster; None if there
    is none.
    """
    numbers = [found[1] for line in _lines(said.out)
               if (found := re.fullmatch(r"(\d+)(;\S*)?", line))]
    return numbers[-1] if numbers else None
