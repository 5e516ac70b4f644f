"""Stages as SLURM jobs: the lines for `sbatch`, and the chain.

Imports no torch: it runs on a login node. SLURM itself does the scheduling; the job files in
`slurm/` do the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modern_llm.cluster.duration import MARGIN, Estimate, clock, estimate, minutes_of, time_limit
from modern_llm.cluster.jobs import jobs_of, note_job
from modern_llm.config import STAGES, TRAINED, ConfigError, PipelineConfig, nearest, require
from modern_llm.config.machines import Cluster, Partition, find_cluster
from modern_llm.files import CHECKOUT
from modern_llm.messages import StageError
from modern_llm.runs.pipeline import Plan
from modern_llm.runs.record import writes_to
from modern_llm.runs.scheduler import MARK, is_queued, job_states, slurm_command, submitted
from modern_llm.runs.spec import setting

# greetings come first, the name of a cluster behind
ONLY_THE_NUMBER = r"sed -nE 's/^([0-9]+)(;.*)?$/\1/p' | tail -n 1"
TOGETHER = ("eval", "attention", "report")  # one job, slurm/eval.slurm, when all are wanted


def partition_of(config: PipelineConfig, cluster: Cluster) -> str | None:
    """The partition that a preset was sized for; None where any node of the cluster will do."""
    hardware = config.hardware
    return cluster.partition_for(hardware.min_gpu_memory_gb) if hardware.needs_bf16 else None


# ---- what SLURM says -----------------------------------------------------------------------------


def partitions() -> tuple[dict[str, int | None], str | None]:
    """This cluster's partitions with the longest job in minutes (None = no limit) of each, and the
    default one; none without SLURM.
    """
    said = slurm_command("sinfo", "-h", "-o", MARK + "%P|%l")
    found, default = {}, None
    for name, limit in said.rows(2) if said else []:
        default = name.rstrip("*") if name.endswith("*") else default
        found[name.rstrip("*")] = None
        with contextlib.suppress(ValueError):  # a limit that is no time: as if there were none
            found[name.rstrip("*")] = minutes_of(limit)
    return found, default


# ---- where a job begins --------------------------------------------------------------------------

# variables that name one
FOLDERS = ("MODERN_LLM_DATA", "MODERN_LLM_CACHE", "MODERN_LLM_CLUSTERS", "MODERN_LLM_VENV",
           "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
# settings that may
FILES = tuple(dict.fromkeys(
    [path for spec in STAGES.values() for path in spec.data] + ["eval.baselines", "start_from"]))


def absolute_settings(config: PipelineConfig) -> dict[str, str]:
    """The settings that name files by where this command was given, with their absolute paths as
    JSON: a job begins in the checkout.
    """
    found = {}
    for path in FILES:
        value = setting(config, path)
        names = [value] if isinstance(value, str) else list(value or ())
        absolute = [_absolute(path, name) for name in names]
        if absolute != names:
            found[path] = json.dumps(absolute[0] if isinstance(value, str) else absolute,
                                     ensure_ascii=False)
    return found


def _absolute(path: str, name: str) -> str:
    from modern_llm.data.sources import DatasetNotFound, find_source

    place = Path(name)
    if not name or place.is_absolute() or name.startswith("~") or not place.exists():
        return name
    with contextlib.suppress(DatasetNotFound):
        if path in ("eval.baselines", "start_from") or find_source(name).where == "file":
            return str(place.absolute())
    return name


def absolute_words(extra: Iterable[str], config: PipelineConfig) -> tuple[str, ...]:
    """What was given with -p, naming the same files wherever it is read; `config` is what it comes
    to here.
    """
    words = []
    for item in extra:
        name, equals, value = item.partition("=")
        if name == "output_dir" or (name == "checkpoint" and Path(value).expanduser().exists()):
            item = f"{name}={Path(value).expanduser().absolute()}"
        words.append(item)
    settings = absolute_settings(config)
    if start := settings.pop("start_from", None):
        former = [item.partition("=")[2] for item in words if item.startswith("overrides=")][-1:]
        words.append("overrides=" + " ".join([*former, shlex.quote(f"start_from={start}")]))
    return (*words, *(f"{path}={value}" for path, value in settings.items()))


# ---- submitting ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One job of a chain: its stages, the line for sbatch (without the dependency), the limit, and
    why so long.
    """

    stages: list[str]
    words: list[str]
    estimates: dict[str, Estimate]
    limit: int
    longest: int | None

    def line(self, after: str | None = None) -> list[str]:
        """The whole command; `after` is the job that must have succeeded."""
        chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *chain, *self.words]


class Chain:
    """The jobs that the stages of a plan still need, in order, each after the one before it.

    Args:
        plan: what is asked for; stages that are finished are left out.
        preset: its name or file, as given.
        words: further words for `modern-llm run`.
        account, partition, time: of sbatch; the last two are chosen if not given.
        nodes, gpus: for the stages that train, with a rank on every GPU (`gpus` of each node).
        cluster: the name of its file; if not given, as `find_cluster` says.

    Raises ConfigError for a partition or GPUs that this cluster does not have, and for a time that
    is none.
    """

    def __init__(self, plan: Plan, preset: str,
                 words: list[str], account: str | None = None, partition: str | None = None,
                 time: str | None = None, nodes: int = 1, gpus: int = 1,
                 cluster: str | None = None):
        self.plan, self.preset, self.words = plan, preset, words
        self.cluster, facts = cluster, find_cluster(cluster, partition)
        config = next(iter(plan.configs.values()))
        there, default = partitions()
        self.partition = partition or partition_of(config, facts) or default
        # a list: whichever is free first
        names = self.partition.split(",") if self.partition and self.partition not in there else []
        if there and (wrong := [name for name in names if name not in there]):
            raise ConfigError(
                f"this cluster has no partition {wrong[0]!r}{nearest(wrong[0], there)}. Say "
                f"--partition NAME; sinfo knows: {', '.join(there)}")
        known = facts.partitions.get(self.partition, Partition())
        require(gpus <= (known.gpus or gpus), f"--gpus={gpus}: a node of {self.partition} has "
                                              f"{known.gpus}; for more, say --nodes")
        self.gpu = known.gpu if config.hardware.min_gpu_memory_gb else None
        limits = [limit for name in names if (limit := there.get(name))]
        self.longest = (there.get(self.partition) or min(limits, default=None)
                        or (int(60 * known.hours) if known.hours else None))
        asked = (("--account", account), ("--partition", self.partition))
        self.options = [*(f"{name}={value}" for name, value in asked if value), *facts.options]
        self.gpus = gpus
        self.together = ([f"--nodes={nodes}", f"--ntasks-per-node={gpus}"] if nodes * gpus > 1
                         else [])
        if time:
            minutes_of(time)  # a ConfigError now, not sbatch's refusal later
        self.time, self.ranks = time, nodes * gpus
        self.todo = [step.stage for step in plan.steps() if step.action != "skip"]
        self.jobs = [self._job(stages) for stages in self._groups()]

    def _groups(self) -> list[list[str]]:
        tail = list(TOGETHER) if set(TOGETHER) <= set(self.todo) else []
        return [[stage] for stage in self.todo if stage not in tail] + [tail] * bool(tail)

    def _job(self, stages: list[str]) -> Job:
        folder = self.plan.run_folder
        known = {
            stage: estimate(self.plan.configs[stage], stage, folder / stage, self.gpu, self.ranks)
            for stage in stages if stage != "report"}
        limit = time_limit(sum(each.minutes for each in known.values()), self.longest)
        file, first = ("slurm/eval.slurm", []) if len(stages) > 1 else ("slurm/stage.slurm", stages)
        gpus = str(self.gpus if stages[0] in TRAINED else 1)
        words = [f"--job-name={stages[0]}",
                 "--output=" + str(folder).replace("%", "%%") + "/logs/%x-%j.out",
                 f"--time={self.time or clock(limit)}",
                 *(option.replace("{gpus}", gpus) for option in self.options),
                 *(self.together if stages[0] in TRAINED else []), file, *first, self.preset,
                 folder.name, *(self.words if stages != ["report"] else [])]
        return Job(stages, words, known, limit, self.longest)

    def table(self) -> list[dict]:
        """A row per stage: steps to do, speed, hours, the limit of its job, where that is from."""
        rows = []
        for job in self.jobs:
            wanted = sum(each.minutes for each in job.estimates.values()) * MARGIN
            more = ("; longer than a job may be: it goes on after its limit"
                    if job.longest and wanted > job.longest and not self.time else "")
            for stage, each in job.estimates.items():
                steps, speed = ((f"{each.steps:,}", f"{each.tokens_per_second:,.0f}") if each.steps
                                else ("", ""))
                time = (f"{each.minutes / 60:.1f} h" if each.minutes > 90
                        else f"{each.minutes:.0f} min")
                rows.append({"stage": stage, "steps": steps, "tokens/s": speed, "time": time,
                             "limit": self.time or clock(job.limit), "estimate": each.why + more})
        return rows

    def environment(self) -> dict[str, str]:
        """What the jobs must know to write where this run is and to read what would be read here.
        """
        relative = {name: value for name in FOLDERS if (value := os.environ.get(name, "").strip())
                    and not Path(value).expanduser().is_absolute()}
        return {"MODERN_LLM_RUNS": str(self.plan.run_folder.parent),
                **({"MODERN_LLM_CLUSTER": self.cluster} if self.cluster else {}),
                **{name: str(Path(value).absolute()) for name, value in relative.items()}}

    def lines(self) -> list[str]:
        """The commands as a shell in the checkout takes them; the variable JOB1 holds the number of
        the first job.
        """
        exports = [f"export {name}={shlex.quote(value)}"
                   for name, value in self.environment().items()]
        return (exports
                + [f"JOB{number}=$({_shown(job.line(f'$JOB{number - 1}' if number > 1 else None))} "
                   f"| {ONLY_THE_NUMBER})" for number, job in enumerate(self.jobs, 1)])

    def submit(self) -> list[tuple[Job, str]]:
        """Submit every job and note it in the run's folder; the jobs and their numbers.

        If one is refused, those before it are cancelled, and StageError gives sbatch's own words.
        """
        if not shutil.which("sbatch"):
            raise StageError("sbatch is not here: jobs are submitted on a login node of a SLURM "
                             "cluster. --dry-run shows the lines; `modern-llm run` with the same "
                             "words runs the stages on this machine.")
        self._refuse_if_queued()
        with writes_to(self.plan.run_folder, "or choose another place with MODERN_LLM_RUNS"):
            (self.plan.run_folder / "logs").mkdir(parents=True, exist_ok=True)
        done: list[tuple[Job, str]] = []
        for job in self.jobs:
            line = job.line(done[-1][1] if done else None)
            said = slurm_command(*line, seconds=120, cwd=CHECKOUT,
                                 env=os.environ | self.environment())
            number = submitted(said) if said and not said.code else None
            if number is None:
                left = [number for _, number in done
                        if not ((gone := slurm_command("scancel", number)) and not gone.code)]
                words = (f"{said.out}\n{said.err}".strip() if said
                         else "no answer; squeue --me shows whether it came through")
                raise StageError(
                    f"sbatch {'refused' if said and said.code else 'gave no job number for'} "
                    f"{_shown(line)}\n{words}\n"
                    + (f"Still in the queue: scancel {' '.join(left)}. " if left
                       else "Nothing is left in the queue. " * bool(said))
                    + "Clusters differ in what they ask for: --account, --partition (sinfo lists "
                      "them), --time, or lines in slurm/*.slurm.")
            done.append((job, number))
            with writes_to(self.plan.run_folder, f"and note that job {number} is in the queue"):
                note_job(self.plan.run_folder, number, job.stages, _shown(line))
        return done

    def _refuse_if_queued(self) -> None:
        jobs = [job for job in jobs_of(self.plan.run_folder)
                if set(map(str, job["stages"])) & set(self.todo)]
        states = job_states([job["id"] for job in jobs])
        if waiting := [job["id"] for job in jobs if is_queued(states.get(job["id"], ""))]:
            raise StageError(f"run {self.plan.run_folder.name!r} has jobs in the queue already: "
                             f"{', '.join(waiting)}. Wait for them, cancel "
                             f"them (scancel {' '.join(waiting)}), or choose another --run")


def _shown(line: list[str]) -> str:
    return " ".join(word if word.startswith("--dependency=afterok:$") else shlex.quote(word)
                    for word in line)
