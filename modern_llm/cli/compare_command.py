"""The command about the difference between runs: `compare`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import click

from modern_llm.cli.common import as_table, one_line_errors
from modern_llm.config import STAGES


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="A B …")
@click.option("--noise", multiple=True, metavar="RUN",
              help="A run of one recipe, with another seed each time; twice or more. What two of "
                   "them differ by is chance, and no difference up to that counts.")
@click.option("--all", "everything", is_flag=True,
              help="Parts of measures, too: levels, kinds of errors, fewer samples.")
@click.option("--to", "file", metavar="FILE", help="Write the table there as csv, too.")
@click.option("--force", is_flag=True, help="Write over FILE.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
def compare(runs, noise, everything, file, force, output_dir) -> None:
    """Say whether runs B … are better than A, measure by measure, and whether that is more than
    chance.

    A run is its name or folder, with all its evaluated stages, or RUN/STAGE for one of them, so
    that stages of one run can be compared, too. Where both were asked the same, items are compared
    one by one (95% interval of the mean difference; for right and wrong, McNemar's test beside it);
    else the intervals of both, which says less. "items to tell" is how many items would tell a
    difference of the size seen, in four of five repetitions. With --noise, a difference that two
    seeds of one recipe have as well is no win.

    \b
    modern-llm compare local-smoke mine
    modern-llm compare local-smoke/sft local-smoke/dpo
    modern-llm run --run again -p seed=1; modern-llm compare local-smoke mine --noise local-smoke \\
        --noise again
    """
    from modern_llm.files import write_text
    from modern_llm.messages import StageError
    from modern_llm.report import comparing
    from modern_llm.runs.parameters import runs_folder

    with one_line_errors():
        root = Path(output_dir or runs_folder()).expanduser()
        if len(runs) < 2:
            raise StageError(f"one run, {runs[0]}, is compared with nothing: name another, or two "
                             f"of its stages ({runs[0]}/sft {runs[0]}/dpo)")
        if len(noise) == 1:
            raise StageError(f"--noise {noise[0]} alone shows no difference: name a second run of "
                             "its recipe with another seed, --noise RUN once more")
        if file and Path(file).exists() and not force:
            raise StageError(f"{file} exists: --force writes over it")
        base, *others = [measured_run(name, root) for name in runs]
        table = comparing.compare_runs(base, others, [measured_run(name, root) for name in noise],
                                       everything)
        if file:
            write_text(Path(file), table.to_csv(index=False))
    for other in others:
        changed = comparing.differing(other, base)
        click.echo(f"{other.name} against {base.name}: " + (", ".join(
            f"{name} {one} (not {was})" for name, (one, was) in changed.items())
            or "the same settings"))
        click.echo(as_table([shown(row) for row in table[table.of == other.name].to_dict("records")
                             ]) + "\n")
    if not noise:
        click.echo("(no A/A pair: intervals are over items, and another seed may differ as much. "
                   "--noise RUN --noise RUN reads one)", err=True)


def shown(row: dict) -> dict:
    """A row of the table as it is printed."""
    from modern_llm.report.comparing import sentence
    from modern_llm.report.verdicts import signed

    return {"stage": row["stage"], "task": row["task"], "measure": row["metric"],
            "was": f"{row['before']:.3f}", "is": f"{row['after']:.3f}",
            "difference": signed(row) if row["value"] == row["value"] else "nan",
            "says": sentence(row)}


def read_items(path: Path):
    """An items.csv as a table; a value is NaN where a model diverged. DamagedFolder for a file that
    is none.
    """
    import pandas as pd

    from modern_llm.files import DamagedFolder

    try:
        items = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]})
        wrong = next((name for name in ("stage", "task", "metric", "item", "value", "weight")
                      if name not in items), None)
        why = f"it has no column {wrong}" if wrong else next(
            (f"not every {name} is a number" for name in ("value", "weight")
             if len(items) and not pd.api.types.is_numeric_dtype(items[name])), "")
    except ValueError as error:
        why = str(error)
    if why:
        raise DamagedFolder(f"{path} is damaged ({why}): put a whole copy there, or evaluate the "
                            f"run again, modern-llm run --run {path.parent.parent.name} --stage "
                            "eval --force")
    return items


def measured_run(name: str, root: Path):
    """The items of `RUN` or `RUN/STAGE`, among the runs in `root` or a path (`comparing.Measured`).
    StageError says what there is, and how to get what there is not.
    """
    from modern_llm.evaluation.ledger import in_order
    from modern_llm.messages import StageError
    from modern_llm.report.comparing import Measured, flat
    from modern_llm.runs.parameters import chosen_folder
    from modern_llm.runs.resume import run_record

    called = {word: spec.called for stage, spec in STAGES.items() if spec.called
              for word in (stage, spec.called)} | {"checkpoint": "checkpoint"}
    path, stage = Path(name).expanduser(), ""
    if path.name in called and path.parent.name:
        path, stage = path.parent, called[path.name]
    folder = path if (path / "run.json").is_file() else chosen_folder(str(path), None, str(root))
    if not (folder / "eval" / "items.csv").is_file():
        raise StageError(f"{folder} has no eval/items.csv: evaluate it first, "
                         f"modern-llm run --run {folder.name} --stage eval")
    items = read_items(folder / "eval" / "items.csv")
    if stage and stage not in set(items.stage):
        raise StageError(f"{name}: {stage} was not evaluated; {folder.name} has "
                         f"{', '.join(in_order(items.stage))}")
    return Measured(name, items[items.stage == stage] if stage else items,
                    flat(run_record(folder)["config"]))
