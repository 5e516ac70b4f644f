"""The command that writes a page of a model's attention: `attention-page`. Imports no torch before
it loads one.
"""

from __future__ import annotations

from pathlib import Path

import click

from modern_llm.cli.common import one_line_errors


@click.command("attention-page")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--to", "target", metavar="FILE", default="attention.html", show_default=True,
              help="The page to write.")
@click.option("--text", "texts", multiple=True, metavar="TEXT",
              help="What the model reads; as often as needed. Default: a name to remember and a "
                   "sum.")
@click.option("--force", is_flag=True, help="Write over files that are there.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, mps, or the best there is.")
def attention_page(models, target, texts, force, output_dir, device) -> None:
    """Write one page of HTML that shows what each head of a model reads, and what the model loses
    without it; any browser opens it, and it needs no network.

    MODEL is a run, RUN/STAGE, or a folder or name that `sample --checkpoint` takes, also of Hugging
    Face. A slider goes through the checkpoints: of a run those that its stages kept, before and
    after SFT and DPO; of several models, one after the other. What it says of every head is
    written as a table, too, in a .csv of the same name.

    \b
    modern-llm attention-page local-smoke --to page.html
    modern-llm attention-page runs/mine/pretrain runs/mine/sft --text "Tom has a red hat. Tom has"
    modern-llm attention-page path/to/SmolLM2-135M --to page.html
    """
    from modern_llm.cli.talk import readable
    from modern_llm.report import attention_page as page
    from modern_llm.runs.parameters import runs_folder
    from modern_llm.training.training_state import pick_device

    with one_line_errors():
        file = Path(target).expanduser()
        table = file.with_suffix(".csv")
        if file.suffix.lower() == ".csv":
            raise ValueError(f"--to {target} is what the page's table is called: name a page, "
                             f"{file.with_suffix('.html')}")
        if (there := [path for path in (file, table) if path.exists()]) and not force:
            raise ValueError(f"{there[0]} is there: --force writes over it, --to FILE leaves it")
        root, checkpoints = Path(output_dir or runs_folder()).expanduser(), []
        called = [Path(name).name if Path(name).is_absolute() else name for name in models]
        for name, short in zip(models, called):
            place = root / name if (root / name).is_dir() else Path(name).expanduser()
            found = page.checkpoints_of(place)
            checkpoints += [(f"{short}: {step}" if len(models) > 1 else step, folder)
                            for step, folder in found]
        page.attention_page(checkpoints, file, f"Attention of {', '.join(called)}",
                            list(map(readable, texts)), pick_device(device))
    click.echo(f"written: {file}, {len(checkpoints)} checkpoints, "
               f"{file.stat().st_size / 1000:.0f} kB")
