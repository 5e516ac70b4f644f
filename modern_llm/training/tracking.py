"""The curves of a run in TensorBoard or trackio: a copy of its `metrics.jsonl`, which can be made
again at any time. Nothing depends on it, and it asks no network.

Imports neither torch nor, before one is asked for, the two packages.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.messages import StageError, say

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

PROJECT = "modern_llm"  # trackio's name for what is drawn together


def numbers(row: dict) -> dict[str, float]:
    """What of a row of metrics is a curve: every number but the step."""
    return {name: value for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))}


class EventFile:
    """The scalars of one training as an event file of TensorBoard in `folder`, in float32 as
    TensorBoard keeps them. A row's time is that of its copy.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder

    def start(self, rows: list[dict]) -> None:
        """Begin another file, with these rows; those of former sessions are emptied. They are not
        deleted, as a TensorBoard that is open goes on only from a file that is there.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        former = list(self.folder.glob("events.out.tfevents.*"))
        self.path = self.folder / f"events.out.tfevents.{time.time_ns()}"
        # as torch's SummaryWriter with purge_step=0: what was read of this folder is forgotten
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2"),
                      Event(wall_time=time.time(), step=0,
                            session_log=SessionLog(status=SessionLog.START)),
                      *map(self._event, rows)])
        for path in former:
            os.truncate(path, 0)

    def add(self, rows: list[dict]) -> None:
        """Add these rows."""
        self._append(map(self._event, rows))

    def _event(self, row: dict) -> Event:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=[
            Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]))

    def _append(self, events: Iterable[Event]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self.path, "ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())


class TrackioRun:
    """The scalars of one training as the run `name` in trackio's database in `folder`, or in
    `$TRACKIO_DIR` where that is set.

    It is written through trackio's storage: `trackio.init` would ask the hub who writes, and could
    send what is logged to a server.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def start(self, rows: list[dict]) -> None:
        """Log these rows in place of what the run holds. StageError if this process has used
        trackio for another folder.
        """
        chosen = os.environ.get("TRACKIO_DIR")
        os.environ["TRACKIO_DIR"] = chosen or str(self.folder)  # read once, at its import
        try:
            from trackio.sqlite_storage import TRACKIO_DIR, SQLiteStorage
        finally:
            if not chosen:
                del os.environ["TRACKIO_DIR"]
        if not chosen and Path(TRACKIO_DIR) != self.folder:
            raise StageError(
                f"tracker='trackio': until it ends, this process writes to {TRACKIO_DIR}, not to "
                f"{self.folder}: restart the kernel, or set TRACKIO_DIR, before Python starts, to "
                "a folder for all runs")
        self.storage = SQLiteStorage
        if not SQLiteStorage.delete_run(PROJECT, self.name) and self.name in {
                run["name"] for run in SQLiteStorage.get_run_records(PROJECT)}:
            raise OSError(f"cannot replace the run {self.name!r} in {TRACKIO_DIR}")
        self.add(rows)

    def add(self, rows: list[dict]) -> None:
        """Log these rows."""
        self.storage.bulk_log(project=PROJECT, run=self.name, steps=[row["step"] for row in rows],
                              metrics_list=list(map(numbers, rows)))


# by the setting: (folder of the run, name of a training in it, such as "dpo/control") -> its curves
CURVES: dict[str, Callable[[Path, str], EventFile | TrackioRun]] = {
    "tensorboard": lambda run, name: EventFile(run / "tensorboard" / name),
    "trackio": lambda run, name: TrackioRun(run / "trackio", f"{run.name}/{name}"),
}


def how_to_look(tracker: str, run: Path) -> str:
    """The command that shows the curves of a run in a browser."""
    if tracker == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(run / 'tensorboard'))}"
    place = os.environ.get("TRACKIO_DIR") or str(run / "trackio")
    return f"TRACKIO_DIR={shlex.quote(place)} trackio show --project {PROJECT}"


class Mirror:
    """Keeps the curves of one training in a tracker equal to the rows of its `metrics.jsonl`.

    Args:
        tracker: a key of CURVES.
        run: the run's folder, a whole path.
        folder: that of the training in it, such as `run/dpo/control`.
    """

    def __init__(self, tracker: str, run: Path, folder: Path):
        self.tracker, self.metrics = tracker, folder / "metrics.jsonl"
        self.curves = CURVES[tracker](run, folder.relative_to(run).as_posix())
        self.read, self.started, self.failed = 0, False, False

    def update(self) -> None:
        """Copy the rows that have come since the last call. The first copies all, in place of what
        the tracker has: a resumed run has cut the rows after its checkpoint.

        StageError if the first cannot be done; later a line says so once, and training goes on.
        """
        if self.failed:
            return
        try:
            rows = self._new_rows()
            if not self.started:
                self.curves.start(rows)
            elif rows:
                self.curves.add(rows)
            self.started = True
        except StageError:
            raise
        except Exception as error:  # of other people's packages: no reason to lose a training
            told = f"tracker={self.tracker!r}: cannot copy {self.metrics}: {error}"
            if not self.started:
                raise StageError(f"{told}; mend that, or say tracker=null") from error
            self.failed = True
            say(f"{told}; the curves end here, training goes on, and {self.metrics.name} has the "
                "rest")

    def _new_rows(self) -> list[dict]:
        if not self.metrics.exists():
            return []
        with open(self.metrics, "rb") as file:
            file.seek(self.read)
            new = file.read()
        whole = new[:new.rfind(b"\n") + 1]  # a last line may be torn by a kill
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
