"""The command line: `modern-llm run`, `datasets`, `presets`. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
import textwrap

import click

from modern_llm.config import ALIASES, PRESETS, ConfigError, get_pipeline_preset, to_dict


class Failure(click.ClickException):
    """An error of the user's making: one message, exit code 2, no traceback."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="modern_llm")
def main() -> None:
    """Train a small modern language model, stage by stage; every stage is a notebook.

    \b
    modern-llm run                                   the default preset, local-smoke, from the start
    modern-llm run --preset local-cpu -p max_minutes=10
    modern-llm presets local-cpu                     every setting of a preset, as JSON
    modern-llm datasets --preset local-cpu           is the data it needs there?
    """


@main.command()
@click.option("--preset", "--config", default="local-smoke", show_default=True, metavar="NAME|FILE.json",
              help="What to run; `modern-llm presets` lists the names.")
@click.option("--stage", default="all", show_default=True, metavar="STAGE", help="pretrain, or all.")
@click.option("--run", "run_name", metavar="NAME", help="Folder under runs/; the preset's name unless told.")
@click.option("--output-dir", metavar="DIR", help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many optimizer steps.")
@click.option("-p", "extra", multiple=True, metavar="KEY=VALUE",
              help="A parameter of the stage notebook: seed=1, max_minutes=10, device=cpu, "
                   "overrides='model.num_experts=4 pretrain.lr=1e-3'.")
@click.option("--resume", is_flag=True, help="Go on with a stage that was begun (done by itself if nothing changed).")
@click.option("--force", is_flag=True, help="Delete what the stage left before and begin anew.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
def run(preset, stage, run_name, output_dir, max_steps, extra, resume, force, dry_run) -> None:
    """Run the stages of a preset; each one's executed notebook is its record.

    A stage that is finished with the same parameters is skipped; one that was interrupted is resumed.

    \b
    modern-llm run --preset local-smoke --stage pretrain --max-steps 10
    modern-llm run --preset local-cpu -p max_minutes=10 --run ten-minutes
    modern-llm run -p overrides="model.use_attention_sinks=true" --run sinks
    """
    from modern_llm import pipeline
    from modern_llm.stage import StageError

    parameters = {"preset": preset, **_key_values(extra)}
    for name, value in (("run", run_name), ("output_dir", output_dir), ("max_steps", max_steps),
                        ("resume", resume), ("force", force)):
        if value:
            parameters[name] = value
    try:
        steps = pipeline.plan(stage, **parameters)
    except (ConfigError, StageError, FileNotFoundError) as error:
        raise Failure(str(error)) from error
    for step in steps:
        if step.action == "skip":
            click.echo(f"{step.stage}: finished before with these parameters, skipped ({step.folder})")
            continue
        click.echo(f"{step.stage}: {step.action} {step.notebook.name} -> {step.folder}")
        if dry_run:
            continue
        try:
            code = pipeline.execute(step)
        except StageError as error:
            raise Failure(str(error)) from error
        if code:
            if pipeline.status(step) in ("stopped", "interrupted"):
                click.echo(f"{step.stage}: stopped with a checkpoint; the same command goes on from there", err=True)
            else:
                click.echo(f"{step.stage}: failed; the notebook with its error is {step.folder / 'notebook.ipynb'}", err=True)
            sys.exit(code)
        click.echo(pipeline.summary(step))


def _key_values(items: tuple[str, ...]) -> dict:
    values = {}
    for item in items:
        name, equals, raw = item.partition("=")
        if not equals:
            raise Failure(f"-p {item!r} must look like seed=1")
        try:
            values[name] = json.loads(raw)
        except ValueError:
            values[name] = raw
    return values


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
    """
    from modern_llm import reading
    from modern_llm.sources import check_sources, remedy

    try:
        wanted = list(get_pipeline_preset(preset).data.sources) if preset else list(names)
        if download and not wanted:
            raise Failure("--download needs the names of data sets, or --preset")
        for name in wanted if download else ():
            reading.download(name)
        rows = check_sources(wanted or None)
    except (ConfigError, ValueError) as error:
        raise Failure(str(error)) from error
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
    for row in [dict(zip(columns, columns)), *rows]:
        click.echo("  ".join(str(row[c]).ljust(widths[c]) for c in columns).rstrip())
    missing = [row["name"] for row in rows if row["status"] != "found"]
    if missing:
        root = os.environ.get("MODERN_LLM_DATA") or "not set"
        text = f"Missing: {', '.join(missing)} (MODERN_LLM_DATA is {root}). For each of them, {remedy()}"
        click.echo("\n" + textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
    if wanted and missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
