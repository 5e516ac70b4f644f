"""The command `bench`: what this machine makes of the model. Imports no torch before it runs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from modern_llm.cli.common import one_line_errors
from modern_llm.cli.model_commands import Finite
from modern_llm.runs.launch import SAME_PACKAGE


@click.command()
@click.option("--device", default="auto", show_default=True,
              help="cuda: the 253M model of tacc-h100. cpu: the same lines on a tiny one, which "
                   "only shows that they run.")
@click.option("--to", "folder", metavar="FOLDER", default="bench", show_default=True,
              help="Where the lines and figures go. Lines that are there already are not measured "
                   "again, except those that failed.")
@click.option("--minutes", type=Finite(min=0), default=8.0, show_default=True,
              help="A line that could take longer is left out, and named.")
@click.option("--peers", is_flag=True,
              help="Instead: beside transformers, trl, litgpt, nanoGPT's recipe …, on the CPU.")
@click.option("--growth", is_flag=True,
              help="Instead: how a step's time and memory grow, beside the cost model; on the CPU.")
@click.option("--quick", is_flag=True, help="Of those two, what takes about 6 minutes.")
@click.option("--restarted", is_flag=True, hidden=True)
def bench(device, folder, minutes, peers, growth, quick, restarted) -> None:
    """Measure this machine: matrix products, training steps, memory, sampling, a short real run.

    Training steps are a ladder: each line differs in one setting from the line that it names
    (precision, micro-batch, compilation, optimizer, attention kernel), so that the difference is
    what this setting is worth. MFU is the share of the GPU's data sheet that the model's own
    arithmetic reaches; of_matrix the share of a matrix product measured here. Every stage's memory
    stands beside the estimate that `run` trusts.

    Each line is in FOLDER/lines.jsonl and lines.csv as soon as it is known; a line that fails, for
    want of memory say, is a line that says so. Stopped or out of time, the same command goes on;
    another machine, torch or number of threads needs another folder. bench.json says what machine
    it was, and at the end has all lines; then come the figures.

    With --peers every line is a comparison in turns with another program that does the same work
    (FOLDER/benchmarks.csv), with --growth a step of one more size (FOLDER/growth.csv); --device and
    --minutes say nothing there. A peer that is not installed is a line that says how to get it.

    \b
    modern-llm bench --device cpu --to /tmp/tiny     every line, under a minute
    modern-llm bench --device cuda --to bench-h100   8 minutes, on one GPU
    modern-llm bench --peers --quick --to /tmp/quick   about 6 minutes on two cores
    """
    if peers or growth:
        with one_line_errors():
            if peers and growth:
                raise click.UsageError("--peers and --growth are two tables: one at a time")
            if peers:
                from modern_llm.evaluation.peer_lines import bench_peers as measure
            else:
                from modern_llm.evaluation.growth import bench_growth as measure
            click.echo(measure(folder, quick, click.echo).path)
        return
    if quick:
        raise click.UsageError("--quick is for --peers or --growth; here --minutes says how long")
    from modern_llm.training import bench as measuring

    started = time.monotonic()
    with one_line_errors():
        try:
            rows = measuring.bench(device, Path(folder), minutes, click.echo, retry=not restarted)
        except measuring.DeviceLost as error:
            left = minutes - (time.monotonic() - started) / 60
            click.echo(f"{error}; another one goes on")
            sys.stdout.flush()
            program = SAME_PACKAGE + "from modern_llm.cli import main; main(prog_name='modern-llm')"
            # without the lines that failed: one of them would lose the GPU again
            os.execv(sys.executable, [sys.executable, "-c", program, "bench", "--device", device,
                                      "--to", folder, "--minutes", f"{max(0, left):.2f}",
                                      "--restarted"])
    counts = {status: sum(row["status"] == status for row in rows)
              for status in dict.fromkeys(row["status"] for row in rows)}
    click.echo(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {folder}")
