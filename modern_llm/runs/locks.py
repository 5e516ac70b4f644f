"""One process at a time works on a run: a file lock that names its owner, and that a dead owner
cannot keep. No torch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import errno
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from modern_llm.messages import StageError, say
from modern_llm.runs.scheduler import job_runs

# of the kernel that runs a stage, of `modern-llm run`
STAGE_LOCK, COMMAND_LOCK = ".lock", ".command.lock"
# seconds between two heartbeats; without one for so long, an owner on another host is gone
HEARTBEAT, HEARTBEAT_TIMEOUT = 15.0, 120.0
# a file system without file locks
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

# ---- processes -----------------------------------------------------------------------------------


def this_process() -> dict:
    """What identifies this process on this host: its number may be given to another one later, with
    another start.
    """
    import psutil

    return {"host": platform.node(), "pid": os.getpid(),
            "pid_started": round(psutil.Process().create_time(), 2)}


def is_alive(entry: dict) -> bool:
    """Whether the process that an entry (see `this_process`) names still runs on this host, and is
    not this one.
    """
    return entry.get("pid") != os.getpid() and _runs(entry)


def _runs(entry: dict) -> bool:
    import psutil

    if entry.get("host") != platform.node() or entry.get("pid") is None:
        return False
    try:
        process = psutil.Process(entry["pid"])
        return (abs(process.create_time() - entry["pid_started"]) < 1
                and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        # gone, or an entry that names no process
        return False


def _parent() -> dict:
    import psutil

    try:
        parent = psutil.Process().parent()
        return {"host": platform.node(), "pid": parent.pid,
                "pid_started": round(parent.create_time(), 2)} if parent else {}
    except psutil.Error:
        return {}


# ---- owners --------------------------------------------------------------------------------------


OWNER = {"host": str, "pid": int, "pid_started": (int, float), "what": str, "since": str,
         "parent": dict, "job": str, "attempt": int}


def read_owner(handle: int) -> dict:
    """What the owner of a lock wrote into its open file; empty if nobody did, or what is there
    names no owner.
    """
    try:
        owner = json.loads(os.pread(handle, 1 << 16, 0) or b"{}")
    except (OSError, ValueError, RecursionError):
        # its owner died while it wrote its name; or no file
        return {}
    return (owner if isinstance(owner, dict)
                     and all(isinstance(owner.get(name), kind) for name, kind in OWNER.items())
            else {})


def alive_on_other_host(owner: dict, silent: float) -> str:
    """Why an owner on another host counts as alive; "" if it is gone. `silent` is the time since
    its last heartbeat.
    """
    job, attempt = (os.environ.get("SLURM_JOB_ID", ""),
                    int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    if owner.get("job") and owner["job"] == job and attempt > owner["attempt"]:
        return ""  # an earlier attempt of this very job
    if owner.get("job") and job_runs(owner["job"]) is False:
        return ""
    return (f"last heartbeat {silent:.0f} s ago (after {HEARTBEAT_TIMEOUT:.0f} s without one it "
            "counts as dead)" if silent < HEARTBEAT_TIMEOUT else "")


def owner_of(folder: Path, name: str = STAGE_LOCK) -> dict | None:
    """Who works on a run's folder now, as far as can be told without taking the lock; None if
    nobody does.
    """
    try:
        # a pipe of this name would be waited for
        handle = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    owner, silent = read_owner(handle), time.time() - os.fstat(handle).st_mtime
    os.close(handle)
    if not owner or (owner["pid"] == os.getpid() and owner["host"] == platform.node()):
        return owner or None
    here = owner["host"] == platform.node()
    return owner if (is_alive(owner) if here else alive_on_other_host(owner, silent)) else None


def named(owner: dict) -> str:
    """An owner in words."""
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return (f"{owner['what']}, by process {owner['pid']} on {owner['host']}{job}, since "
            f"{owner['since']}")


# ---- the lock ------------------------------------------------------------------------------------


def _flock(handle: int) -> bool | None:
    """Whether the file is locked for this process now; None where the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


class RunLock:
    """The right to write into a run's folder, from `take` until `release` or the end of the
    process.

    The file is locked with flock, which the system gives back when its owner dies, and says who
    that is. Some network file systems know the locks of one host only, or none: there an owner
    counts as alive while it touches the file or while its SLURM job runs, and of two that start in
    the same second each reads a second later whose name is in the file.
    """

    held: dict[Path, RunLock] = {}  # by this process

    def __init__(self, folder: Path, what: str, name: str = STAGE_LOCK):
        self.folder, self.what, self.path = Path(folder), what, Path(folder) / name
        self.handle, self.made, self.done = -1, [], threading.Event()

    def take(self, patience: float = 15.0) -> RunLock:
        """Take the lock, or raise StageError that names its owner; one that is about to die is
        given `patience` seconds.

        Within one process the second call gives what the first one took. OSError where the folder
        cannot be written.
        """
        if (mine := self.held.get(self.path)) and mine._still_there():
            mine._sign(self.what)
            return mine
        self.made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        deadline = time.monotonic() + patience
        while not self._try(time.monotonic() > deadline):
            time.sleep(0.1)
        self.held[self.path], self.process = self, os.getpid()
        atexit.register(self.release)
        threading.Thread(target=self._heartbeat, name="lock", daemon=True).start()
        return self

    def _try(self, last: bool) -> bool:
        """One attempt; False if another may succeed soon. A lock whose owner is gone is taken over,
        and a line says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was somebody else's, who has just removed it
            if last:
                raise
            return False
        try:
            locked, owner = _flock(self.handle), read_owner(self.handle)
            reason, passing = self._in_use(locked, owner)
            if reason and (last or not passing):
                raise StageError(f"run {self.folder.name!r} is in use: {reason}. Wait for it, stop "
                                 f"it (kill -TERM {owner.get('pid', 'PID')} on its "
                                 "host: what it has is kept), or choose another run name")
            # or released between our opening the file and locking it
            if reason or not self._still_there():
                return self._close()
            self._sign(self.what)
            other_hosts = (owner.get("host", platform.node()) != platform.node()
                           or os.environ.get("SLURM_JOB_ID"))
            if (locked is None or other_hosts) and not self._confirmed():
                return self._close()
        except BaseException:
            self._close()
            raise
        if owner:
            say(f"{self.folder.name}: took over the lock of {named(owner)}: that process is gone")
        return True

    def _in_use(self, locked: bool | None, owner: dict) -> tuple[str, bool]:
        """Why the lock cannot be had ("" if it can), and whether that is about to change."""
        if not owner:
            return ("a process that has not said yet who it is" if locked is False else ""), True
        if owner["host"] != platform.node():
            alive = (alive_on_other_host(owner, time.time() - os.fstat(self.handle).st_mtime)
                     or ("it holds the lock" if locked is False else ""))
            return (f"{named(owner)}, {alive}" if alive else ""), False
        if locked or (locked is None and not is_alive(owner)):
            return "", False
        # a kernel outlives papermill by a second
        dying = not is_alive(owner) or (owner["parent"] and not _runs(owner["parent"]))
        return named(owner), bool(dying)

    def _confirmed(self) -> bool:
        """Whether our name is still in the file a second later: of two hosts that do not see each
        other's locks, the later one's stays.
        """
        time.sleep(1.0)
        with open(self.path, "rb") as file:
            return read_owner(file.fileno()).get("token") == self.token

    def _still_there(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        return False

    def _sign(self, what: str) -> None:
        """Write who has the lock into its file."""
        self.what, self.token = what, uuid.uuid4().hex
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps({**this_process(), "what": what, "since": since, "parent": _parent(),
                           "job": os.environ.get("SLURM_JOB_ID", ""), "attempt": int(
                               os.environ.get("SLURM_RESTART_COUNT") or 0
                           ), "token": self.token}).encode()
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, text, 0)

    def _heartbeat(self) -> None:
        while not self.done.wait(HEARTBEAT):
            # a disk that is away for a moment; the next heartbeat will do
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _close(self) -> bool:
        os.close(self.handle)
        return False

    def release(self) -> None:
        """Give the lock back, and remove its file and the folders made for it if nothing else is in
        them.
        """
        # a fork has no right to it
        if self.held.get(self.path) is not self or self.process != os.getpid():
            return
        del self.held[self.path]
        self.done.set()
        with contextlib.suppress(OSError):  # the folder is gone, or cannot be written any more
            if self._still_there():
                os.unlink(self.path)
            for place in self.made:
                place.rmdir()
        self._close()

    def __enter__(self) -> RunLock:
        return self.take()

    def __exit__(self, *error) -> None:
        self.release()
