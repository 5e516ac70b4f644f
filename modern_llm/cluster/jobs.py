"""The jobs of a run: a record each in its folder, and what SLURM says of them. Imports no torch."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

from modern_llm.files import write_json
from modern_llm.runs.outcomes import DAMAGED, folders, reason, record_in
from modern_llm.runs.scheduler import job_states, this_job


def note_job(run_folder: Path, job: str, stages: list[str], command: str) -> Path:
    """Write `jobs/<id>.json` of a run: a file per job, so that a job under way and a submission
    never overwrite each other.
    """
    (run_folder / "jobs").mkdir(parents=True, exist_ok=True)
    submitted = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return write_json(run_folder / "jobs" / f"{job}.json",
                      {"id": job, "stages": stages, "submitted": submitted, "command": command})


def note_this_job(run_folder: Path, stages: list[str]) -> None:
    """Inside a job that was submitted by hand: note it too."""
    job = this_job()
    if job and not (run_folder / "jobs" / f"{job}.json").exists():
        note_job(run_folder, job, stages,
                 f"{os.environ.get('SLURM_JOB_NAME', '')} (sbatch by hand)")


def job_records(run_folder: Path) -> tuple[list[dict], list[str]]:
    """The jobs of a run, the oldest first; and what is wrong with the records that cannot be read.
    """
    records, damaged = [], []
    for path in sorted(run_folder.glob("jobs/*.json")):
        try:
            records.append(record_in(path, id=str, stages=list, submitted=str))
        except (OSError, ValueError) as error:
            damaged.append(f"jobs/{path.name}: {reason(error)}")
    return sorted(records, key=lambda record: (
        record["submitted"], [int(part) for part in re.findall(r"\d+", record["id"])])), damaged


def jobs_of(run_folder: Path) -> list[dict]:
    """The jobs of a run, the oldest first; records that cannot be read are left out."""
    return job_records(run_folder)[0]


def with_jobs(rows: list[dict], root: Path, only: str | None = None) -> list[dict]:
    """The rows of `runs_table` with a column `job`, and a row for every stage that still waits for
    its job, or whose job's record is damaged.

    Where no run was ever submitted the rows stay as they are.
    """
    latest, broken = {}, []
    for path in folders(root):
        records, damaged = job_records(path) if only in (None, path.name) else ([], [])
        latest |= {(path.name, str(stage)): record["id"] for record in records
                   for stage in record["stages"]}
        broken += [{"run": path.name, "stage": "", "status": f"{DAMAGED}: {text}"}
                   for text in damaged]
    if not latest and not broken:
        return rows
    states = job_states(sorted(set(latest.values())))
    there = {(row["run"], row["stage"]) for row in rows}
    waiting = [{"run": run, "stage": stage, "status": "to do"}
               for run, stage in latest if (run, stage) not in there]
    table = []
    for row in [*rows, *waiting, *broken]:
        job = latest.get((row["run"], row["stage"]), "")
        table.append({**{name: row[name] for name in ("run", "stage", "status")},
                      "job": f"{job} {states.get(job, '')}".strip(),
                      **{name: row.get(name, "") for name in ("started", "minutes", "figures")}})
    return table
