"""The command `practice`: a chapter with the bodies left out, and the check of what was written.
Imports no torch before a page runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from modern_llm.cli.common import one_line_errors


def _begins(name: str) -> None:
    """On a terminal, the cell that is running stands where its result will."""
    if sys.stdout.isatty():
        click.echo(f"  runs    {name:20}\r", nl=False)


@click.command()
@click.argument("chapter")
@click.option("--check", "checking", is_flag=True,
              help="Run the copy: which cells and definitions pass, and what fails; exit code 0 "
                   "only if everything does.")
@click.option("--to", "folder", metavar="FOLDER", default="practice", show_default=True,
              help="Where the copy is, or is to be written.")
@click.option("--force", is_flag=True, help="Overwrite a copy that was changed.")
def practice(chapter, checking, folder, force) -> None:
    """Write a chapter yourself: a copy whose exported definitions have no bodies, and their check.

    CHAPTER is one of the spine: 00_layers, 01_attention, 02_model, 02a_data, 02b_optim, 03_trainer,
    03_pretrain, 04_sft, 05_dpo, 06_verifier, 07_eval, 08_attention_viz.

    In the copy, signatures, docstrings, prose and assertions are the chapter's; each body raises
    NotImplementedError and says what to write. Write one in JupyterLab, run the cells behind it,
    and go on: the chapter's own assertions are the check. An import of the package's solution gives
    what you wrote, or says that it is not there yet. What is still blank only makes the cells wait
    that call it.

    --check runs the copy from its first cell to its last. A chapter that is a stage (03_pretrain
    and later) trains for a few steps only, in a temporary folder; the small models that it starts
    from are made once, in about a minute, and kept.

    \b
    modern-llm practice 01_attention             writes practice/01_attention.ipynb
    jupyter lab practice/01_attention.ipynb      write a body, run its cells
    modern-llm practice 01_attention --check     which definitions pass?
    modern-llm practice 01_attention --to again  a fresh copy elsewhere
    """
    from modern_llm.runs import practice as pages
    from modern_llm.runs import practice_check as checks

    with one_line_errors():
        path = Path(folder) / pages.chapter_path(chapter).name
        if not checking:
            path, written = pages.write_copy(chapter, Path(folder), force)
            blanks = [name for found in pages.blank_cells(chapter).values() for name in found]
            click.echo(f"{path}: {'written' if written else 'there already, unchanged'}; "
                       f"{len(blanks)} definitions to write: {', '.join(blanks)}")
            return
        if force:
            raise ValueError("--force is about writing a copy, --check runs one: say one of them")
        cells = []
        for cell in checks.check(chapter, path, _begins):
            cells.append(cell)
            why = f"  {cell.said}".replace("\n", "\n" + " " * 10) if cell.said else ""
            click.echo(f"  {cell.state:8}{cell.name:20}{why}".rstrip())
        found = checks.verdicts(chapter, path, cells)
    width = max(len(one.name) for one in found)
    click.echo()
    for one in found:
        click.echo(f"  {one.name:{width}}  {one.said}")
    whole = sum(one.passes for one in found)
    passing = sum(cell.state == "passes" for cell in cells)
    click.echo(f"\n{path}: {whole} of {len(found)} definitions pass, {passing} of {len(cells)} "
               "cells")
    sys.exit(int(whole < len(found) or passing < len(cells)))
