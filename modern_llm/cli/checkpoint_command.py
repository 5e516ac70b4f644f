"""The command about the kept checkpoints of a stage: `checkpoints`. Imports no torch before it
loads one.
"""

from __future__ import annotations

from pathlib import Path

import click

from modern_llm.cli.common import as_table, one_line_errors
from modern_llm.config import GENERATORS, nearest


@click.command()
@click.argument("stage", metavar="RUN/STAGE")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT",
              help="What each goes on with, or answers; as often as needed. Default: beginnings of "
                   "held-out documents, or for a model that chats three requests.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=48, show_default=True,
              help="Of each sample.")
@click.option("--max-tokens", type=click.IntRange(min=2),
              help="Of held-out text, from each source; default: all that the run held out.")
@click.option("--to", "folder", metavar="DIR",
              help="Where it is written, instead of RUN/STAGE-checkpoints beside the stage.")
@click.option("--force", is_flag=True, help="Measure anew, and write over a comparison of others.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, mps, or the best there is.")
def checkpoints(stage, prompts, max_new_tokens, max_tokens, folder, force, output_dir,
                device) -> None:
    """Put all checkpoints that a stage kept side by side: how well each predicts the text that the
    run held out, and what each writes.

    A stage keeps some of its weights along the way (the setting keep_checkpoints) and the last.
    The table is printed; with a curve and the samples, always the likeliest token, it is written
    to RUN/STAGE-checkpoints as checkpoints.csv, .png and .md. Of sft and dpo, the held-out answers
    (dpo: the preferred ones) are measured, too.

    \b
    modern-llm checkpoints local-smoke/pretrain
    modern-llm checkpoints runs/local-smoke/pretrain --prompt "Mia has" --prompt "One day" --to DIR
    modern-llm run --stage sft --run mine -p sft.keep_checkpoints=4; modern-llm checkpoints mine/sft
    """
    from modern_llm.cli.talk import readable
    from modern_llm.report.checkpoint_sheet import shown, write_checkpoint_sheet
    from modern_llm.training.training_state import pick_device

    with one_line_errors():
        table, place, fresh = write_checkpoint_sheet(
            stage_folder(stage, output_dir), None if folder is None else Path(folder).expanduser(),
            list(map(readable, prompts)), max_new_tokens, max_tokens, pick_device(device), force,
            progress=True)
    click.echo(as_table(shown(table)))
    if len(table) == 1:
        click.echo("(the stage kept no other: -p STAGE.keep_checkpoints=3 keeps some on the way)",
                   err=True)
    click.echo(f"\n{'written' if fresh else 'unchanged'}: {place / 'checkpoints.md'}, with the "
               "samples and the curve")


def stage_folder(name: str, output_dir: str | None) -> Path:
    """The folder that RUN/STAGE names, among the runs or as a path. StageError says what there is.
    """
    from modern_llm.messages import StageError
    from modern_llm.runs.parameters import runs_folder

    root = Path(output_dir or runs_folder()).expanduser()
    tried = [root / name, Path(name).expanduser().absolute()]
    found = next((place for place in tried if place.is_dir()), None)
    there = [f"{path.parent.name}/{stage}" for path in sorted(root.glob("*/run.json"))
             for stage in reversed(GENERATORS) if (path.parent / stage).is_dir()]
    if found is None:
        raise StageError(f"no stage {name!r}{nearest(name, there) if there else ''}. Tried "
                         f"{', '.join(map(str, tried))}. In {root}: {', '.join(there) or 'none'}")
    if found.name == "checkpoint" and found.parent.name in GENERATORS:
        return found.parent
    if (found / "run.json").is_file():
        own = [stage for stage in reversed(GENERATORS) if (found / stage).is_dir()]
        raise StageError(f"{name!r} is a run: say which stage's checkpoints, "
                         f"{' or '.join(f'{name}/{stage}' for stage in own) or 'it has none yet'}")
    return found
