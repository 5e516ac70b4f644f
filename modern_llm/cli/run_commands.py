"""The commands about runs: `run` here, `submit` to a cluster, `status`. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

import click

from modern_llm.cli.common import Failure, as_table
from modern_llm.config import STAGES, ConfigError, PipelineConfig, nearest
from modern_llm.config.machines import cluster_files

# seed: a notebook's parameter
WITHOUT_A_DOT = tuple(
    field.name for field in dataclasses.fields(PipelineConfig) if field.name != "seed")

# options of several commands
STAGE = click.option("--stage", default="all", show_default=True, metavar="STAGE",
                     help=f"{', '.join(STAGES)}, or all.")
RUN = click.option("--run", "run_name", metavar="NAME",
                   help="Folder under runs/; default: the preset's name.")
OUTPUT_DIR = click.option("--output-dir", metavar="DIR",
                          help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
MAX_STEPS = click.option("--max-steps", type=click.IntRange(min=1),
                         help="Stop after so many optimizer steps, in every stage that trains.")


@click.command()
@click.option("--preset", "--config", default="local-smoke", show_default=True,
              metavar="NAME|FILE.json", help="What to run; `modern-llm presets` lists the names.")
@STAGE
@RUN
@click.option("--checkpoint", metavar="PATH",
              help="Start from these weights: a checkpoint, stage or run folder. With --stage all, "
                   "pretraining is left out.")
@OUTPUT_DIR
@MAX_STEPS
@click.option("-p", "extra", multiple=True, metavar="KEY=VALUE",
              help="A parameter of the stage notebooks: seed=1, max_minutes=10 (each stage that "
                   "trains), device=cpu; or a setting of the preset: model.num_experts=4, "
                   "sft.weights=0.6,0.4. As often as needed.")
@click.option("--resume", is_flag=True,
              help="Go on with a stage that was begun, also with another length or learning rate "
                   "(done by itself if nothing changed).")
@click.option(
    "--force", is_flag=True,
    help="Delete what a stage left and start over; with --stage all, only where something changed.")
@click.option("--no-overwrite", is_flag=True,
              help="Skip every stage that has results, whatever its settings were.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
def run(preset, stage, run_name, checkpoint, output_dir, max_steps, extra, resume, force,
        no_overwrite, dry_run) -> None:
    """Run the stages of a preset; each one's executed notebook is its record.

    A stage that is finished, with the settings and the weights it starts from unchanged, is
    skipped; one that was interrupted is resumed. So the same command goes on after any stop. Where
    something did change, nothing is touched until you say --force, --resume, --no-overwrite, or
    another --run. Two commands never work on one run: the second is refused.

    Ctrl-C stops a stage that trains with a checkpoint; a second one kills it. SIGTERM and SIGUSR1,
    the warnings of a scheduler, end any stage with its checkpoint or its kept work; then the exit
    code is 75, which asks to be started again.

    \b
    modern-llm run                               all of local-smoke, minutes on a CPU
    modern-llm run --stage pretrain --max-steps 10            one stage, a few steps
    modern-llm run --preset local-cpu -p max_minutes=6 --run six    six minutes a stage that trains
    modern-llm run --stage dpo --checkpoint runs/local-smoke/sft --run other-dpo -p dpo.loss=ipo
    modern-llm run --run watched -p tracker=tensorboard       or trackio: curves while it trains
    modern-llm run -p sft.lr=1e-3 --force        redo SFT and what follows, keep pretraining
    modern-llm run --stage grpo                  optional: rewards for right answers to word problems
    modern-llm run --preset local-cpu --stage eval --run other --checkpoint SmolLM2/
    modern-llm run -p hardware.ranks=2 --run together    two processes that train together, torchrun
    srun modern-llm run -p hardware.ranks=8 --preset tacc-h100    a rank for each of 8 SLURM tasks
    srun --ntasks-per-node=1 modern-llm run -p hardware.ranks=8   torchrun on each of the nodes
    modern-llm run -p seed=1 --run seed-1 --dry-run      what would be done?
    """
    from modern_llm.cluster.jobs import note_this_job
    from modern_llm.messages import Preempted, StageError
    from modern_llm.runs import execution
    from modern_llm.runs.outcomes import runs_table
    from modern_llm.runs.pipeline import Plan
    from modern_llm.runs.torchrun import launch_ranks

    parameters = {"preset": preset, **_key_values(extra)}
    for option, value in (("--run", run_name), ("--checkpoint", checkpoint),
                          ("--output-dir", output_dir)):
        _refuse_empty(option, value)
    for name, value in (("run", run_name), ("checkpoint", checkpoint), ("output_dir", output_dir),
                        ("max_steps", max_steps), ("resume", resume), ("force", force)):
        if value:
            parameters[name] = value
    began = time.time()
    try:
        plan = Plan(stage, no_overwrite, **parameters)
        if dry_run:
            for step in plan.steps():
                click.echo(f"{step.stage}: {step.action}{f' ({step.why})' if step.why else ''} -> "
                           f"{step.folder}")
            return
        if stage == "all":
            if plan.start:
                click.echo("pretrain: left out, the run starts from "
                           f"{plan.parameters[plan.stages[0]].get('checkpoint') or plan.start}")
            plan.check_data()
        with launch_ranks(max(config.hardware.ranks for config in plan.configs.values())):
            execution.raise_on_preemption()
            with execution.lock_for(plan.run_folder, plan.stages):
                # what a later stage refuses is said before an earlier one runs for hours
                list(plan.steps())
                note_this_job(plan.run_folder, plan.stages)
                for name in plan.stages:
                    _run_step(plan.step(name))
    except Preempted as warning:
        click.echo(
            f"{warning}: the run ended early, kept what it had, and goes on with the same command",
            err=True)
        sys.exit(execution.EXIT_PREEMPTED)
    except (ConfigError, StageError, FileNotFoundError) as error:
        raise Failure(str(error)) from error
    if stage == "all":
        rows = runs_table(plan.run_folder.parent, plan.run_folder.name)
        columns = ("stage", "status", "minutes", "figures")
        click.echo("\n" + as_table([{key: row[key] for key in columns} for row in rows]))
        click.echo(f"\n{len(plan.stages)} stages in {(time.time() - began) / 60:.1f} minutes; run "
                   f"{plan.run_folder}")


def _run_step(step) -> None:
    """Execute what a step asks for; leaves the program with the stage's exit code if it fails."""
    from modern_llm.runs import execution
    from modern_llm.runs.outcomes import summary

    if step.action == "skip":
        click.echo(f"{step.stage}: skipped, {step.why} ({step.folder})")
        return
    click.echo(
        f"{step.stage}: {step.action}{f' ({step.why})' if step.why else ''} -> {step.folder}")
    page = step.folder / "notebook.ipynb"
    former = page.stat().st_mtime_ns if page.is_file() else None
    code = execution.execute(step)
    if code:
        shown = page.is_file() and page.stat().st_mtime_ns != former
        if execution.status(step) in ("stopped", "preempted", "interrupted"):
            click.echo(f"{step.stage}: stopped with a checkpoint; the same command goes on from "
                       "there", err=True)
        else:
            where = (f"the notebook with its error is {page}" if shown
                     else f"what it said stands above, and {step.folder} is as it was"
                          if former else "what it said stands above; it got no notebook")
            click.echo(f"{step.stage}: failed; {where}. When the cause is fixed, the same command "
                       "goes on there", err=True)
        sys.exit(code)
    click.echo(summary(step))


def _refuse_empty(option: str, value: str | None) -> None:
    """Failure for a place that was named and is nothing, as a shell's unset variable is: another
    one would be taken in its stead.
    """
    if value is not None and not value.strip():
        raise Failure(f"{option} is empty; is it a variable that is not set? Name something, or "
                      f"leave {option} out")


def _key_values(items: tuple[str, ...]) -> dict:
    """Parameters by name; settings of the preset, whose names have a dot (or are in WITHOUT_A_DOT),
    together under `overrides`.
    """
    from modern_llm.config import json_or_text
    from modern_llm.runs.parameters import KINDS

    values, settings = {}, []
    for item in items:
        name, equals, raw = item.partition("=")
        name = name.strip()
        if not equals:
            raise Failure(f"-p {item!r} must look like seed=1 or sft.lr=1e-3")
        if "." in name or name in WITHOUT_A_DOT:
            settings.append(shlex.quote(item))
            continue
        if name in ("run", "checkpoint", "output_dir"):
            _refuse_empty(f"-p {name}", raw)
        value = json_or_text(raw)
        # a run may be called 2024.10
        values[name] = (raw if KINDS.get(name, (int,))[0] is str and not isinstance(value, str)
                        else value)
    if settings:
        values["overrides"] = " ".join([*filter(None, [values.get("overrides")]), *settings])
    return values


@click.command()
@click.option("--preset", "--config", default="local-smoke", show_default=True,
              metavar="NAME|FILE.json", help="What to run.")
@STAGE
@RUN
@click.option("--account", metavar="PROJECT",
              help="Your allocation, where the cluster asks for one.")
@click.option("--cluster", metavar="NAME",
              help=f"Which one, by its file in clusters/: {', '.join(cluster_files())}. Default: "
                   "$MODERN_LLM_CLUSTER, $TACC_SYSTEM, or the one that has the partition.")
@click.option("--partition", metavar="NAME",
              help="Where to queue; default: the cluster's for the preset's GPU.")
@click.option("--time", "limit", metavar="HH:MM:SS",
              help="Limit of each job; default: from the estimate.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True,
              help="Of each job that trains.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True,
              help="Of each node, with a rank on each.")
@MAX_STEPS
@click.option("-p", "extra", multiple=True, metavar="KEY=VALUE",
              help="As for `modern-llm run`. As often as needed.")
@click.option("--dry-run", is_flag=True,
              help="Show the estimate and the lines for sbatch, and stop; needs no SLURM.")
def submit(preset, stage, run_name, account, cluster, partition, limit, nodes, gpus, max_steps,
           extra, dry_run) -> None:
    """Submit the stages of a preset as a chain of SLURM jobs, each after the one before it has
    succeeded.

    Finished stages are left out, so after a failure the same line submits the rest. A job that
    meets its time limit or is preempted writes a checkpoint, queues itself again and goes on. Time
    limits come from an estimate that is printed: the speed measured in the stage's own metrics,
    else one assumed. The job files are slurm/*.slurm, to be read and edited.

    \b
    source slurm/environment.sh                  once in a login shell: modules, $SCRATCH
    modern-llm prefetch --preset tacc-h100       compute nodes may have no network
    modern-llm submit --preset tacc-h100 --account PROJECT --dry-run
    modern-llm submit --preset tacc-h100 --account PROJECT
    modern-llm submit --preset tacc-a100 --stage sft --partition gpu-a100-small --time 06:00:00
    modern-llm status tacc-h100                  stages and their jobs
    """
    from modern_llm.cluster.submit import Chain, absolute_words
    from modern_llm.config import ALIASES, PRESETS, preset_with
    from modern_llm.messages import StageError
    from modern_llm.runs.pipeline import Plan

    _refuse_empty("--run", run_name)
    given = {"run": run_name, "max_steps": max_steps}
    # the jobs say it themselves, to the stages that train
    ranks = (f"hardware.ranks={nodes * gpus}",) if nodes * gpus > 1 else ()
    # jobs run in the checkout, whatever folder this is
    if preset not in (*PRESETS, *ALIASES) and Path(preset).is_file():
        preset = str(Path(preset).resolve())
    try:
        as_here = preset_with(preset, _key_values(extra).get("overrides"))
        extra = absolute_words(extra, as_here)
        words = ([word for item in extra for word in ("-p", item)]
                 + (["--max-steps", str(max_steps)] if max_steps else []))
        asked = {"preset": preset, **_key_values((*extra, *ranks)),
                 **{name: value for name, value in given.items() if value}}
        preset = asked["preset"]
        plan = Plan(stage, **asked)
        chain = Chain(plan, preset, words, account, partition, limit, nodes, gpus, cluster)
        if not chain.jobs:
            click.echo(f"nothing to do: every stage is finished in {plan.run_folder}")
            return
        click.echo(as_table(chain.table()) + "\n\n" + "\n".join(chain.lines()))
        if os.environ.get("SCRATCH") and not os.environ.get("MODERN_LLM_RUNS"):
            click.echo(f"runs go to {plan.run_folder.parent}, not to $SCRATCH: `source "
                       "slurm/environment.sh` first?", err=True)
        if dry_run:
            return
        plan.check_data()
        for job, number in chain.submit():
            click.echo(f"{', '.join(job.stages)}: job {number}")
    except (ConfigError, StageError, FileNotFoundError) as error:
        raise Failure(str(error)) from error
    click.echo(f"`modern-llm status {plan.run_folder.name}` shows them; logs in "
               f"{plan.run_folder / 'logs'}")


@click.command()
@click.argument("name", metavar="[RUN]", required=False)
@OUTPUT_DIR
def status(name: str | None, output_dir: str | None) -> None:
    """Show the runs (or one): their stages, how they ended, when they began, what they took and
    what came out.

    Stages that went to a cluster's queue show the latest job and what SLURM says of it. What is
    damaged has a row that says why, among the others, and the exit code is then 1.

    \b
    modern-llm status
    modern-llm status local-smoke
    """
    from modern_llm.cluster.jobs import with_jobs
    from modern_llm.runs.outcomes import DAMAGED, runs_table
    from modern_llm.runs.parameters import runs_folder

    try:
        root = Path(output_dir or runs_folder()).expanduser()
        if os.path.lexists(root) and not os.path.isdir(root):
            raise Failure(f"{root} is a file, where the folder of the runs should be: say "
                          "--output-dir DIR, or set MODERN_LLM_RUNS")
        rows = with_jobs(runs_table(root, name), root, name)
    except (ConfigError, RuntimeError, PermissionError) as error:
        # an unknown ~name; a folder that may not be read
        raise Failure(str(error)) from error
    if not rows and name is not None:
        there = sorted(path.parent.name for path in root.glob("*/run.json"))
        raise Failure(
            f"no run {name!r} in {root}{nearest(name, there) if there else ', nor any other'}")
    click.echo(as_table(rows) if rows
               else f"no runs in {root} yet; `modern-llm run` makes the first")
    sys.exit(any(row["status"].startswith(DAMAGED) for row in rows))
