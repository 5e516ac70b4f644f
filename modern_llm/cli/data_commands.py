"""The commands about presets and the data they need: `presets`, `datasets`, `prefetch`. Imports no
torch.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from functools import partial

import click

from modern_llm.cli.common import Failure, as_table
from modern_llm.config import ALIASES, NOTEBOOKS, PRESETS, ConfigError, get_pipeline_preset, to_dict


@click.command()
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
    from modern_llm.runs.data_files import data_names

    config = get_pipeline_preset(preset)
    return (list(dict.fromkeys(name for stage in NOTEBOOKS for name in data_names(config, stage)))
            or ["synthetic"])


def _read(row: dict, seconds: float) -> str:
    """Put into a row of the table what its source holds; what is wrong with it, or ""."""
    from modern_llm.data.reading import check_rows
    from modern_llm.data.sources import DataError

    note, licence, row["read"] = row.pop("note"), row.pop("licence"), "-"
    damage = ""
    if row["where"] in ("mirror", "file", "hub (cached)"):
        try:
            found = check_rows(row["name"], seconds)
            row["read"], note = (found["read"],
                                 f"columns: {found['columns']}" if row["where"] == "file" else note)
        except DataError as error:
            row["status"], damage = "damaged", str(error)
    row |= {"licence": licence, "note": note}
    return damage


@click.command()
@click.option("--preset", metavar="NAME|FILE.json",
              help="Check what this preset needs, beside NAMES; exit code 1 if any is missing.")
@click.option("--download", is_flag=True,
              help="First fetch them from the Hugging Face hub into its local cache.")
@click.argument("names", nargs=-1)
def datasets(preset: str | None, download: bool, names: tuple[str, ...]) -> None:
    """Look for every data source (or those of NAMES), read it, and print where it was found, or why
    not.

    Sources are looked up in $MODERN_LLM_DATA, a folder of plain files, then on the Hugging Face hub
    and in its cache; a path to a file of your own is a source, too. Every file that is here is
    read, those of NAMES or a preset for at most a minute each, else for five seconds; "damaged"
    means that it holds something else than it should. The exit code is 0 only if all that was asked
    for is there and nothing is damaged.

    \b
    modern-llm datasets my-stories.jsonl           your own file: how many rows, which columns
    modern-llm datasets --preset local-cpu
    modern-llm datasets --download tinystories     once, where there is a network
    modern-llm prefetch --preset tacc-h100         data, tokenizer, models to compare with
    """
    from modern_llm.data import reading
    from modern_llm.data.sources import check_sources, remedy

    try:
        wanted = list(dict.fromkeys([*(_wanted(preset) if preset else ()), *names]))
        if download and not wanted:
            raise Failure("--download needs the names of data sets, or --preset")
        for name in wanted if download else ():
            reading.download(name)
        rows = check_sources(wanted or None)
        damage = {row["name"]: said for row in rows if (said := _read(row, 60 if wanted else 5))}
    except (ConfigError, ValueError) as error:
        raise Failure(str(error)) from error
    click.echo(as_table(rows))
    for row in rows:
        if row["status"] == "damaged":
            click.echo(f"\nDamaged: {row['name']}. {damage[row['name']]}")
    missing = [row["name"] for row in rows if row["status"] == "missing"]
    if missing:
        root = os.environ.get("MODERN_LLM_DATA") or "not set"
        text = (f"Missing: {', '.join(missing)} (MODERN_LLM_DATA is {root}). For each of them, "
                f"{remedy()}")
        click.echo("\n" + textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
    if damage or wanted and missing:
        sys.exit(1)


@click.command()
@click.option("--preset", required=True, metavar="NAME|FILE.json",
              help="Whose data, tokenizer and models.")
def prefetch(preset: str) -> None:
    """Fetch what a preset needs and this machine does not have, on a login node whose compute nodes
    have no network.

    What is in $MODERN_LLM_DATA or in the hub's cache already is left as it is. On a cluster, first
    `source slurm/environment.sh`, so that it lands on $SCRATCH, where the jobs look. The exit code
    is 0 only if everything is there.

    \b
    modern-llm prefetch --preset tacc-h100
    """
    from modern_llm.data import reading
    from modern_llm.data.sources import check_sources
    from modern_llm.data.tokens import gpt2_tokenizer
    from modern_llm.interchange import hub

    try:
        config = get_pipeline_preset(preset)
        # "found" is also what the hub has and this machine has not
        tasks = [(row["name"], partial(reading.download, row["name"])
                  if row["status"] == "missing" or row["where"] == "hub (reachable)" else None)
                 for row in check_sources(_wanted(preset))]
    except (ConfigError, ValueError) as error:
        raise Failure(str(error)) from error
    tasks += [("GPT-2's tokenizer", gpt2_tokenizer)] * (config.data.tokenizer == "gpt2")
    tasks += [(name, partial(hub.find_model, name, download=True))
              for name in dict.fromkeys(filter(None, (config.start_from,
                                                  *config.eval.baselines)))]
    failed = 0
    for name, fetch in tasks:
        try:
            click.echo(f"{name}: {'here' if fetch is None or fetch() is not None else 'fetched'}")
        except (ValueError, OSError) as error:
            failed += 1
            click.echo(f"{name}: missing. {error}")
    if failed:
        raise Failure(f"{failed} of {len(tasks)} are missing; jobs that need them would stop at "
                      "their first cell")
