"""The command line: `modern-llm run`, `status`, `chat` and so on. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import click

from modern_llm.config import ALIASES, PRESETS, ConfigError, get_pipeline_preset, nearest, to_dict


class Failure(click.ClickException):
    """An error of the user's making: one message, exit code 2, no traceback."""

    exit_code = 2


STAGES = "pretrain, sft, dpo, verifier, eval, attention, report, or all"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="modern_llm")
def main() -> None:
    """Train a small modern language model, stage by stage; every stage is a notebook.

    \b
    modern-llm run                                   every stage of the default preset, local-smoke, and a report
    modern-llm run --preset local-cpu -p max_minutes=6
    modern-llm run --stage sft --checkpoint runs/local-smoke/pretrain --run mine
    modern-llm status                                what was run, how long it took, what came out
    modern-llm chat --run local-smoke                talk to the model
    modern-llm sample --run local-smoke --stage pretrain --prompt "Mia has"
    modern-llm export --run local-smoke --to DIR     for transformers and others, with a model card
    modern-llm check-inference --run local-smoke     does it fit 12 GB?
    modern-llm presets local-cpu                     every setting of a preset, as JSON
    modern-llm datasets --preset local-cpu           is the data it needs there?
    modern-llm submit --preset tacc-h100 --dry-run   the same stages as jobs of a SLURM cluster: how long, and the lines
    """


WHICH_MODEL = (
    click.option("--run", "run_name", metavar="NAME", help="A run: its folder under runs/."),
    click.option("--stage", metavar="STAGE", help="Whose weights: pretrain, sft or dpo; the last that is there unless told."),
    click.option("--checkpoint", metavar="PATH", help="A checkpoint, stage or run folder, instead of --run."),
    click.option("--output-dir", metavar="DIR", help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS)."),
)
RUN_OPTIONS = (
    *WHICH_MODEL,
    click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 = always the likeliest token."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each answer."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps, or the best there is."),
)


def model_options(command, options=RUN_OPTIONS):
    """The options of the commands that load a model."""
    for option in reversed(options):
        command = option(command)
    return command


def which_model(command):
    """The options that name a model."""
    return model_options(command, WHICH_MODEL)


@main.command()
@click.option("--preset", "--config", default="local-smoke", show_default=True, metavar="NAME|FILE.json",
              help="What to run; `modern-llm presets` lists the names.")
@click.option("--stage", default="all", show_default=True, metavar="STAGE", help=f"{STAGES}.")
@click.option("--run", "run_name", metavar="NAME", help="Folder under runs/; the preset's name unless told.")
@click.option("--checkpoint", metavar="PATH",
              help="Start from these weights: a checkpoint, stage or run folder. With --stage all, pretraining is left out.")
@click.option("--output-dir", metavar="DIR", help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many optimizer steps, in every stage that trains.")
@click.option("-p", "extra", multiple=True, metavar="KEY=VALUE",
              help="A parameter of the stage notebooks: seed=1, max_minutes=10 (each stage that trains), device=cpu; "
                   "or a setting of the preset: model.num_experts=4, sft.weights=0.6,0.4. As often as needed.")
@click.option("--resume", is_flag=True,
              help="Go on with a stage that was begun, also with other settings (done by itself if nothing changed).")
@click.option("--force", is_flag=True, help="Delete what a stage left and begin anew; with --stage all, only where something changed.")
@click.option("--no-overwrite", is_flag=True, help="Skip every stage that has results, whatever its settings were.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
def run(preset, stage, run_name, checkpoint, output_dir, max_steps, extra, resume, force, no_overwrite, dry_run) -> None:
    """Run the stages of a preset; each one's executed notebook is its record.

    A stage that is finished, with the settings and the weights it starts from unchanged, is skipped; one that was
    interrupted is resumed. So the same command goes on after any stop. Where something did change, nothing is touched
    until you say --force, --resume, --no-overwrite, or another --run. Two commands never work on one run: the second is refused.

    Ctrl-C stops a stage that trains with a checkpoint; a second one kills it. SIGTERM and SIGUSR1, the warnings of a scheduler,
    end any stage with its checkpoint or its kept work; then the exit code is 75, which asks to be started again.

    \b
    modern-llm run                                                        all of local-smoke, minutes on a CPU
    modern-llm run --preset local-smoke --stage pretrain --max-steps 10   one stage, a few steps
    modern-llm run --preset local-cpu -p max_minutes=6 --run six-minutes  six minutes for each stage that trains
    modern-llm run --stage dpo --checkpoint runs/local-smoke/sft --run other-dpo -p dpo.loss=ipo
    modern-llm run -p sft.lr=1e-3 --force                                 redo SFT and what follows, keep pretraining
    modern-llm run --preset local-cpu --stage eval --run other --checkpoint SmolLM2/   a model from elsewhere
    modern-llm run -p hardware.ranks=2 --run together                     two processes that train together (torchrun)
    srun modern-llm run -p hardware.ranks=8 --preset tacc-h100            a rank for each of 8 tasks of a SLURM job
    srun --ntasks-per-node=1 modern-llm run -p hardware.ranks=8           on two nodes: torchrun on each, for four ranks
    modern-llm run -p seed=1 --run seed-1 --dry-run                       what would be done?
    """
    from modern_llm import pipeline
    from modern_llm.inputs import Preempted
    from modern_llm.ranks import gathered
    from modern_llm.stage import StageError
    from modern_llm.submit import note_this_job

    parameters = {"preset": preset, **_key_values(extra)}
    for name, value in (("run", run_name), ("checkpoint", checkpoint), ("output_dir", output_dir), ("max_steps", max_steps),
                        ("resume", resume), ("force", force)):
        if value:
            parameters[name] = value
    began = time.time()
    try:
        plan = pipeline.Plan(stage, no_overwrite, **parameters)
        if dry_run:
            _print_plan(plan)
            return
        if stage == "all":
            if plan.start:
                click.echo(f"pretrain: left out, the run starts from {plan.parameters[plan.stages[0]].get('checkpoint') or plan.start}")
            plan.check_data()
        with gathered(max(config.hardware.ranks for config in plan.configs.values())):
            pipeline.end_on_warnings()
            with pipeline.lock_for(plan.run_folder, plan.stages):
                note_this_job(plan.run_folder, plan.stages)
                for name in plan.stages:
                    _run_step(plan.step(name))
    except Preempted as warning:
        click.echo(f"{warning}: the run ended early, kept what it had, and goes on with the same command", err=True)
        sys.exit(pipeline.EXIT_PREEMPTED)
    except (ConfigError, StageError, FileNotFoundError) as error:
        raise Failure(str(error)) from error
    if stage == "all":
        rows = pipeline.runs_table(plan.run_folder.parent, plan.run_folder.name)
        click.echo(f"\n{_table([{key: row[key] for key in ('stage', 'status', 'minutes', 'figures')} for row in rows])}")
        click.echo(f"\n{len(plan.stages)} stages in {(time.time() - began) / 60:.1f} minutes; run {plan.run_folder}")


def _print_plan(plan) -> None:
    pending = False
    for name in plan.stages:
        step = plan.step(name, pending)
        click.echo(f"{name}: {step.action}{f' ({step.why})' if step.why else ''} -> {step.folder}")
        pending = pending or step.action != "skip"


def _run_step(step) -> None:
    """Execute what a step asks for; leaves the program with the stage's exit code if it fails."""
    from modern_llm import pipeline

    if step.action == "skip":
        click.echo(f"{step.stage}: skipped, {step.why} ({step.folder})")
        return
    click.echo(f"{step.stage}: {step.action}{f' ({step.why})' if step.why else ''} -> {step.folder}")
    code = pipeline.execute(step)
    if code:
        if pipeline.status(step) in ("stopped", "preempted", "interrupted"):
            click.echo(f"{step.stage}: stopped with a checkpoint; the same command goes on from there", err=True)
        else:
            click.echo(f"{step.stage}: failed; the notebook with its error is {step.folder / 'notebook.ipynb'}. When the cause is "
                       "mended, the same command goes on there", err=True)
        sys.exit(code)
    click.echo(pipeline.summary(step))


def _key_values(items: tuple[str, ...]) -> dict:
    """Parameters by name; settings of the preset, whose names have a dot, together under `overrides`."""
    values, settings = {}, []
    for item in items:
        name, equals, raw = item.partition("=")
        if not equals:
            raise Failure(f"-p {item!r} must look like seed=1 or sft.lr=1e-3")
        if "." in name:
            settings.append(shlex.quote(item))
            continue
        try:
            values[name] = json.loads(raw)
        except ValueError:
            values[name] = raw
    if settings:
        values["overrides"] = " ".join([*filter(None, [values.get("overrides")]), *settings])
    return values


@main.command()
@click.option("--preset", "--config", default="local-smoke", show_default=True, metavar="NAME|FILE.json", help="What to run.")
@click.option("--stage", default="all", show_default=True, metavar="STAGE", help=f"{STAGES}.")
@click.option("--run", "run_name", metavar="NAME", help="Folder under runs/; the preset's name unless told.")
@click.option("--account", metavar="PROJECT", help="Your allocation, where the cluster asks for one.")
@click.option("--partition", metavar="NAME", help="Where to queue; TACC's for the preset's GPU unless told.")
@click.option("--time", "limit", metavar="HH:MM:SS", help="Limit of each job; from the estimate unless told.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Of each job that trains.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Of each node, with a rank on each.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many optimizer steps, in every stage that trains.")
@click.option("-p", "extra", multiple=True, metavar="KEY=VALUE", help="As for `modern-llm run`. As often as needed.")
@click.option("--dry-run", is_flag=True, help="Show the estimate and the lines for sbatch, and stop; needs no SLURM.")
def submit(preset, stage, run_name, account, partition, limit, nodes, gpus, max_steps, extra, dry_run) -> None:
    """Submit the stages of a preset as a chain of SLURM jobs, each after the one before it has succeeded.

    Finished stages are left out, so after a failure the same line submits the rest. A job that meets its time limit or is
    preempted writes a checkpoint, queues itself again and goes on. Time limits come from an estimate that is printed: the
    speed measured in the stage's own metrics, else one assumed. The job files are slurm/*.slurm, to be read and edited.

    \b
    source slurm/environment.sh                                      once in a login shell: modules, $SCRATCH
    modern-llm prefetch --preset tacc-h100                           compute nodes may have no network
    modern-llm submit --preset tacc-h100 --account PROJECT --dry-run
    modern-llm submit --preset tacc-h100 --account PROJECT
    modern-llm submit --preset tacc-a100 --stage sft --partition gpu-a100-small --time 06:00:00
    modern-llm status tacc-h100                                      stages and their jobs
    """
    from modern_llm.pipeline import Plan
    from modern_llm.stage import StageError
    from modern_llm.submit import Chain

    given = {"run": run_name, "max_steps": max_steps}
    ranks = (f"hardware.ranks={nodes * gpus}",) if nodes * gpus > 1 else ()  # the jobs say it themselves, to the stages that train
    words = [word for item in extra for word in ("-p", item)] + (["--max-steps", str(max_steps)] if max_steps else [])
    preset = str(Path(preset).resolve()) if Path(preset).is_file() else preset  # jobs run in the checkout
    try:
        plan = Plan(stage, preset=preset, **_key_values(extra + ranks), **{name: value for name, value in given.items() if value})
        chain = Chain(plan, preset, words, account, partition, limit, nodes, gpus)
        if not chain.jobs:
            click.echo(f"nothing to do: every stage is finished in {plan.run_folder}")
            return
        click.echo(_table(chain.table()) + "\n\n" + "\n".join(chain.lines()))
        if os.environ.get("SCRATCH") and not os.environ.get("MODERN_LLM_RUNS"):
            click.echo(f"runs go to {plan.run_folder.parent}, not to $SCRATCH: `source slurm/environment.sh` first?", err=True)
        if dry_run:
            return
        plan.check_data()
        for job, number in chain.submit():
            click.echo(f"{', '.join(job.stages)}: job {number}")
    except (ConfigError, StageError, FileNotFoundError) as error:
        raise Failure(str(error)) from error
    click.echo(f"`modern-llm status {plan.run_folder.name}` shows them; logs in {plan.run_folder / 'logs'}")


@main.command()
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--output-dir", metavar="DIR", help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
def status(name: str | None, output_dir: str | None) -> None:
    """Show the runs (or one): their stages, how they ended, when they began, what they took and what came out.

    Stages that went to a cluster's queue show the latest job and what SLURM says of it.

    \b
    modern-llm status
    modern-llm status local-smoke
    """
    from modern_llm.pipeline import runs_table
    from modern_llm.stage import runs_folder
    from modern_llm.submit import with_jobs

    root = Path(output_dir or runs_folder()).expanduser()
    rows = with_jobs(runs_table(root, name), root, name)
    if not rows and name:
        there = sorted(path.parent.name for path in root.glob("*/run.json"))
        raise Failure(f"no run {name!r} in {root}{nearest(name, there) if there else ', nor any other'}")
    click.echo(_table(rows) if rows else f"no runs in {root} yet; `modern-llm run` makes the first")


def _table(rows: list[dict]) -> str:
    """Rows as aligned text under their column names."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
    lines = [dict(zip(columns, columns)), *rows]
    return "\n".join("  ".join(str(row[c]).ljust(widths[c]) for c in columns).rstrip() for row in lines)


@main.command()
@model_options
def chat(run_name, stage, checkpoint, output_dir, temperature, max_new_tokens, seed, device) -> None:
    """Talk to a model in the terminal; its words appear as they are drawn.

    Earlier turns are kept as long as they fit into the context. /new forgets them, /quit (or Ctrl-D) ends.

    \b
    modern-llm chat --run local-smoke
    modern-llm chat --checkpoint runs/local-smoke/sft/checkpoint --temperature 0
    echo "Tom has 3 hats and buys 4 hats. How many hats?" | modern-llm chat --run local-smoke
    """
    from modern_llm.talk import Chat, open_model

    with _said_in_one_line():
        model, tokenizer, folder = open_model(run_name, stage, checkpoint, output_dir, device, purpose="chat")
    talk = Chat(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    click.echo(f"{folder}; /new forgets the conversation, /quit ends", err=True)
    show_prompt = sys.stdin.isatty()
    while True:
        if show_prompt:
            click.echo("> ", nl=False)
        line = sys.stdin.readline()
        request = line.strip()
        if not line or request == "/quit":
            break
        if request == "/new":
            talk.history.clear()
        elif request:
            with _said_in_one_line():
                for piece in talk.reply(request):
                    click.echo(piece, nl=False)
                    sys.stdout.flush()
            click.echo()


@main.command()
@model_options
@click.option("--prompt", default="", help="Text to continue; a model that chats answers it. Nothing: it begins a document.")
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many samples.")
def sample(run_name, stage, checkpoint, output_dir, temperature, max_new_tokens, seed, device, prompt, count) -> None:
    """Print what a model makes of a prompt: a base model continues it, one that chats answers it.

    \b
    modern-llm sample --run local-smoke --stage pretrain --prompt "Mia has"
    modern-llm sample --run local-smoke --prompt "What is 3 plus 4?" -n 5 --temperature 1
    """
    from modern_llm.talk import open_model, samples

    with _said_in_one_line():
        model, tokenizer, folder = open_model(run_name, stage, checkpoint, output_dir, device, purpose="sample")
        click.echo(str(folder), err=True)
        for text in samples(model, tokenizer, folder, prompt, count, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
            click.echo(f"--- {text}")


@main.command()
@which_model
@click.option("--to", "folder", required=True, metavar="DIR", help="Where; it must not exist yet.")
@click.option("--dtype", metavar="fp32|bf16|fp16", help="Of the written weights; as they are unless told.")
@click.option("--shard-gb", type=float, default=5.0, show_default=True, help="Cut larger weights into files of so many gigabytes.")
def export(run_name, stage, checkpoint, output_dir, folder, dtype, shard_gb) -> None:
    """Write a model as a Hugging Face folder with a model card made from the run's own files.

    A checkpoint folder can be opened by transformers as it stands; this leaves the optimizer's state behind, may halve the
    weights, and says in README.md what the model was trained on, what was measured, and what to beware of.

    \b
    modern-llm export --run local-smoke --stage dpo --to my-model
    modern-llm export --run tacc-h100 --to my-model --dtype bf16
    lm_eval --model hf --model_args pretrained=my-model --tasks gsm8k
    """
    from modern_llm.export import export_model
    from modern_llm.talk import choose_model

    with _said_in_one_line():
        source = choose_model(run_name, stage, checkpoint, output_dir)
        click.echo(f"{source} -> {export_model(source, folder, dtype=dtype, shard_gb=shard_gb)}")


@main.command("check-inference")
@which_model
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps, or the best there is.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the weights in memory; as they are on disk unless told.")
@click.option("--limit-gb", type=click.FloatRange(min=0, min_open=True), default=12.0, show_default=True,
              help="What the process may take, in 10^9 bytes.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Problems answered at once.")
@click.option("--count", type=click.IntRange(min=1), default=16, show_default=True, help="Problems answered in all.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each answer.")
@click.option("--problems", type=click.Choice(["synthetic", "gsm8k"]), default="synthetic", show_default=True, help="Word problems to answer.")
@click.option("--to", "target", metavar="FILE", help="Where the figures go, instead of inference_ok.json beside the checkpoint.")
def check_inference(run_name, stage, checkpoint, output_dir, target, **options) -> None:
    """Load a model, let it answer word problems, and hold the memory it took against a limit; exit code 1 if it is too much.

    The figures go into inference_ok.json beside the checkpoint (for a model from elsewhere: here), the closed-form estimate of
    the same batch next to what was measured.

    \b
    modern-llm check-inference --run local-smoke
    modern-llm check-inference --checkpoint SmolLM2/ --dtype bf16 --problems gsm8k --batch 16
    """
    from modern_llm.inference import write_check
    from modern_llm.talk import choose_model

    with _said_in_one_line():
        found, path = write_check(choose_model(run_name, stage, checkpoint, output_dir), Path(target) if target else None, **options)
    click.echo(f"{'ok' if found['ok'] else 'not ok'}: peak {found['peak_gb']:.2f} of {found['limit_gb']:g} GB; the model added "
               f"{found['added_gb']:.2f}, {found['added_over_estimate']:.2f} of the estimate; {path}")
    sys.exit(0 if found["ok"] else 1)


@contextlib.contextmanager
def _said_in_one_line():
    """Turn the errors a user can mend into one message without a traceback."""
    from modern_llm.files import DamagedFolder
    from modern_llm.stage import StageError

    try:
        yield
    except (ValueError, StageError, FileNotFoundError, DamagedFolder) as error:
        raise Failure(str(error)) from error


@main.command()
@click.argument("preset", required=False)
def presets(preset: str | None) -> None:
    """List the presets, or print one (a name or a JSON file) with every setting."""
    if preset:
        try:
            click.echo(json.dumps(to_dict(get_pipeline_preset(preset)), indent=2))
        except ConfigError as error:
            raise Failure(str(error)) from error
        return
    for name in PRESETS:
        aka = "".join(f" (= {alias})" for alias, target in ALIASES.items() if target == name)
        click.echo(f"{name + aka:24} {get_pipeline_preset(name).description}")


def _wanted(preset: str) -> list[str]:
    """Every data set that the stages of a preset read."""
    from modern_llm.inputs import NOTEBOOKS, data_names

    config = get_pipeline_preset(preset)
    return list(dict.fromkeys(name for stage in NOTEBOOKS for name in data_names(config, stage))) or ["synthetic"]


@main.command()
@click.option("--preset", metavar="NAME|FILE.json", help="Check what this preset needs; exit code 1 if any is missing.")
@click.option("--download", is_flag=True, help="First fetch them from the Hugging Face hub into its local cache.")
@click.argument("names", nargs=-1)
def datasets(preset: str | None, download: bool, names: tuple[str, ...]) -> None:
    """Look for every data source (or those of NAMES) and print where it was found, or why not.

    Sources are looked up in $MODERN_LLM_DATA, a folder of plain files, then on the Hugging Face hub and in its cache.
    The exit code is 0 only if all that was asked for is there; without names or a preset, the table alone is printed.

    \b
    modern-llm datasets --preset local-cpu
    modern-llm datasets --download tinystories       once, where there is a network
    modern-llm prefetch --preset tacc-h100           everything a preset needs: data, tokenizer, models to compare with
    """
    from modern_llm import reading
    from modern_llm.sources import check_sources, remedy

    try:
        wanted = _wanted(preset) if preset else list(names)
        if download and not wanted:
            raise Failure("--download needs the names of data sets, or --preset")
        for name in wanted if download else ():
            reading.download(name)
        rows = check_sources(wanted or None)
    except (ConfigError, ValueError) as error:
        raise Failure(str(error)) from error
    click.echo(_table(rows))
    missing = [row["name"] for row in rows if row["status"] != "found"]
    if missing:
        root = os.environ.get("MODERN_LLM_DATA") or "not set"
        text = f"Missing: {', '.join(missing)} (MODERN_LLM_DATA is {root}). For each of them, {remedy()}"
        click.echo("\n" + textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
    if wanted and missing:
        sys.exit(1)


@main.command()
@click.option("--preset", required=True, metavar="NAME|FILE.json", help="Whose data, tokenizer and baselines.")
def prefetch(preset: str) -> None:
    """Fetch what a preset needs and this machine does not have, on a login node whose compute nodes have no network.

    What is in $MODERN_LLM_DATA or in the hub's cache already is left as it is. On a cluster, first `source
    slurm/environment.sh`, so that it lands on $SCRATCH, where the jobs look. The exit code is 0 only if everything is there.

    \b
    modern-llm prefetch --preset tacc-h100
    """
    from modern_llm import hub, reading
    from modern_llm.sources import check_sources
    from modern_llm.tokens import gpt2_tokenizer

    try:
        config = get_pipeline_preset(preset)
        tasks = [(row["name"], None if row["status"] == "found" else partial(reading.download, row["name"]))
                 for row in check_sources(_wanted(preset))]
    except (ConfigError, ValueError) as error:
        raise Failure(str(error)) from error
    tasks += [("GPT-2's tokenizer", gpt2_tokenizer)] * (config.data.tokenizer == "gpt2")
    tasks += [(name, partial(hub.find_model, name, download=True)) for name in config.eval.baselines]
    failed = 0
    for name, fetch in tasks:
        try:
            click.echo(f"{name}: {'here' if fetch is None or fetch() is not None else 'fetched'}")
        except (ValueError, OSError) as error:
            failed += 1
            click.echo(f"{name}: missing. {error}")
    if failed:
        raise Failure(f"{failed} of {len(tasks)} are missing; jobs that need them would stop at their first cell")


if __name__ == "__main__":
    main()
