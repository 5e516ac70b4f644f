"""The command that copies the curves of a run into a tracker afterwards: `curves`. Imports no
torch.
"""

from __future__ import annotations

import click

from modern_llm.cli.common import one_line_errors
from modern_llm.cli.run_commands import OUTPUT_DIR
from modern_llm.config.schema import TRACKERS


@click.command()
@click.argument("name", metavar="RUN")
@click.option("--to", "tracker", type=click.Choice(TRACKERS), required=True,
              help="Each is an extra: pip install 'modern_llm[tensorboard]'.")
@OUTPUT_DIR
def curves(name, tracker, output_dir) -> None:
    """Copy the curves of a run into TensorBoard or trackio, on this machine.

    Every number that its stages and their controls wrote into a metrics.jsonl, by steps, in place
    of an earlier copy. While a run trains, the setting tracker does the same: `-p
    tracker=tensorboard` of `modern-llm run`.

    \b
    modern-llm curves local-smoke --to tensorboard
    tensorboard --logdir runs                       every run that has curves, overlaid
    modern-llm curves local-smoke --to trackio
    TRACKIO_DIR=$PWD/runs/local-smoke/trackio trackio show --project modern_llm
    """
    from modern_llm.messages import StageError
    from modern_llm.runs.parameters import chosen_folder, is_in_use
    from modern_llm.runs.preflight import need_tracker
    from modern_llm.training.tracking import Mirror, how_to_look

    with one_line_errors():
        need_tracker(tracker)
        run = chosen_folder(name, None, output_dir).resolve()
        if is_in_use(run):
            raise StageError(f"run {run.name!r} is under way: copy its curves when it has ended, "
                             f"or begin it with -p tracker={tracker}")
        found = sorted(path.parent for path in run.rglob("metrics.jsonl"))
        if not found:
            raise StageError(f"{run} has no metrics.jsonl: nothing was trained there yet")
        for folder in found:
            Mirror(tracker, run, folder).update()
    click.echo(", ".join(folder.relative_to(run).as_posix() for folder in found))
    click.echo(how_to_look(tracker, run))
