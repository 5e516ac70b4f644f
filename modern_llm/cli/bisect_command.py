"""The command about where two runs part: `bisect`. Imports no torch before it reads weights."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import click

from modern_llm.cli.common import as_table, one_line_errors
from modern_llm.config import TRAINED

SHOWN = 12  # tensors of a checkpoint


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--stage", type=click.Choice(TRAINED),
              help="Default: the last one that both have metrics of.")
@click.option("--all", "everything", is_flag=True, help="Every tensor that differs, not the first "
                                                        f"{SHOWN}.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
def bisect(a, b, stage, everything, as_json, output_dir) -> None:
    """Find the first step, and in the weights the first tensor, in which runs A and B differ.

    First what they were told is compared: settings, weights they start from, data, machine,
    versions. Then the logged metrics, step by step, to the last bit, but for columns of speed. Then
    the checkpoints of one step that both kept, tensor by tensor in the order of the model; of a
    tensor, "relative" is its largest difference over its largest value. The last line says in words
    what parts them. The exit code is 0 if nothing differs, 1 if something does.

    \b
    modern-llm bisect local-smoke again            the last stage that both have
    modern-llm bisect local-smoke again --stage pretrain
    modern-llm run --run again -p pretrain.keep_checkpoints=9; modern-llm bisect local-smoke again
    """
    from modern_llm.runs.bisecting import bisect as compare
    from modern_llm.runs.parameters import chosen_folder, runs_folder

    with one_line_errors():
        root = Path(output_dir or runs_folder()).expanduser()
        places = [Path(name).expanduser() for name in (a, b)]
        found = compare(*(place if (place / "run.json").is_file()
                          else chosen_folder(str(place), None, str(root)) for place in places),
                        stage)
    if as_json:
        finite = lambda row: {name: None if value == math.inf else value
                              for name, value in row.items()}
        found["metrics"]["columns"] = list(map(finite, found["metrics"]["columns"]))
        found["checkpoints"]["tensors"] = list(map(finite, found["checkpoints"]["tensors"]))
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n\n".join(shown(found, None if everything else SHOWN)))
    sys.exit(not found["same"])


def shown(found: dict, most: int | None) -> list[str]:
    """What was found as paragraphs, with at most so many tensors."""
    short = lambda value: f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value
    lines = [f"{found['stage']} of {found['a']} and of {found['b']}"]
    for part, names in found["told"].items():
        lines.append(f"{part}: " + (", ".join(
            f"{name} {short(one)} (not {short(other)})" for name, (one, other) in names.items())
            or "the same"))
    parts, rows, kept = ["\n".join(lines)], found["metrics"], found["checkpoints"]
    size = lambda row: (f"{row['relative']:.1e}" if row["relative"] < math.inf
                        else row.get("note") or "not numbers")
    if rows["step"] is None:
        parts.append(f"metrics: equal in all {rows['steps']} logged steps")
    else:
        parts.append(f"metrics: {rows['equal']} of {rows['steps']} logged steps are equal, then "
                     f"step {rows['step']}\n" + as_table(
                         [{"column": row["column"], found["a"]: row["a"],
                           f"{found['b']} ": row["b"], "relative": size(row)}
                          for row in rows["columns"]]))
    if not kept["steps"]:
        parts.append("checkpoints: none of one step in both (-p STAGE.keep_checkpoints=9 keeps "
                     "some)")
    elif kept["step"] is None:
        parts.append(f"checkpoints: equal, of step {', '.join(map(str, kept['steps']))}")
    else:
        equal = f"; equal of step {', '.join(map(str, kept['equal']))}" if kept["equal"] else ""
        more = len(kept["tensors"]) - (most or len(kept["tensors"]))
        worst = max(kept["tensors"], key=lambda row: row["relative"])
        count = f"{len(kept['tensors'])} tensor{'s' * (len(kept['tensors']) > 1)}"
        parts.append(
            f"checkpoints: step {kept['step']} differs in {count}, most in {worst['tensor']}{equal}"
            "\n" + as_table(
                [{"tensor": row["tensor"], "relative": size(row)}
                 for row in kept["tensors"][:most]])
            + f"\n… and {more} more (--all)" * (more > 0))
    return [*parts, f"verdict: {found['verdict']}"]
