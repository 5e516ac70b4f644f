"""The command that packs a run into one file and checks such a file: `capsule`. Imports no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from modern_llm.cli.common import one_line_errors
from modern_llm.files import sha256


@click.command()
@click.argument("name", metavar="RUN|FILE")
@click.option("--to", "target", metavar="FILE",
              help="The file to write; default: RUN.capsule.zip, here.")
@click.option("--weights", is_flag=True,
              help="The models, too, as transformers reads them; without the state to resume from.")
@click.option("--report", metavar="DIR",
              help="The folder the run's report was written to, if not the usual one.")
@click.option("--force", is_flag=True, help="Write over FILE.")
@click.option("--check", is_flag=True,
              help="Check a capsule instead: its files, and whether its report follows from them.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
def capsule(name, target, weights, report, force, check, output_dir) -> None:
    """Pack the record of RUN into one zip file: settings, versions, hashes of the data, metrics,
    answers, items, ledger, notebooks and its report, with the sha256 of each in manifest.json.

    The same files give the same bytes, so the sha256 that is printed names the run. With --check, a
    capsule is unpacked into a temporary folder, every file is held against the manifest, and the
    report is made again from what was unpacked alone, with no network: its text, tables and JSON
    must be equal byte for byte, its pictures pixel by pixel. The exit code is 1 if a file is
    damaged or differs, and its name is printed. A manifest proves that nothing was damaged; that
    nothing was exchanged, only the sha256 of the capsule from a place you trust.

    \b
    modern-llm capsule local-smoke                 local-smoke.capsule.zip, a few MB
    modern-llm capsule local-smoke --weights --to local-smoke-with-weights.zip
    modern-llm capsule local-smoke.capsule.zip --check
    """
    from modern_llm.messages import StageError
    from modern_llm.runs.capsule import check_capsule, write_capsule
    from modern_llm.runs.parameters import chosen_folder, runs_folder

    place = Path(name).expanduser()
    with one_line_errors():
        if check:
            if target or weights or report or force:
                raise StageError("--check reads a capsule and writes none: leave --to, --weights, "
                                 "--report and --force out")
            manifest, compared = check_capsule(place)
        else:
            if place.is_file():
                raise StageError(f"{place} is a file: --check checks it, and a run's name packs "
                                 "that run")
            folder = (place if (place / "run.json").is_file()
                      else chosen_folder(name, None, str(Path(output_dir or runs_folder())
                                                         .expanduser()))).resolve()
            file = Path(target or f"{folder.name}.capsule.zip").expanduser()
            manifest = write_capsule(folder, file, weights,
                                     Path(report).expanduser() if report else None, force)
            click.echo(f"written: {file}, {len(manifest['files'])} files, "
                       f"{file.stat().st_size / 1e6:.1f} MB, "
                       f"{'with' if weights else 'without'} weights; its report was "
                       f"{manifest['report_was']}\nsha256 {sha256(file)}")
            return
    click.echo(f"{place}: run {manifest['run']}, {len(manifest['files'])} files, each as in its "
               "manifest")
    click.echo("\n".join(told(manifest, compared)))
    sys.exit(any(row.difference for row in compared))


def told(manifest: dict, compared: list) -> list[str]:
    """What came of making a report again, a line each."""
    from modern_llm.runs.capsule import made_by

    differ = [row for row in compared if row.difference]
    equal = [sum(row.how == how and not row.difference for row in compared)
             for how in ("bytes", "pixels")]
    lines = [f"the report made again: {equal[0]} texts and tables equal byte for byte, {equal[1]} "
             "pictures equal pixel by pixel" + f"; {len(differ)} differ" * bool(differ)]
    lines += [f"  {row.file} {row.difference}" for row in differ]
    then, now = manifest["made_by"], made_by()
    if differ and then != now:
        lines.append("the capsule was packed by " + ", ".join(
            f"{name} {value}, here {now.get(name)}" for name, value in then.items()
            if value != now.get(name)) + ": what makes reports may have changed")
    return lines
