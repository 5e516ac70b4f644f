"""The command line, `modern-llm`: its commands are those of the modules imported here. Imports no
torch, so that `--help` is instant.
"""

from __future__ import annotations

import sys

import click

from modern_llm.cli.attention_command import attention_page
from modern_llm.cli.bench_command import bench
from modern_llm.cli.bisect_command import bisect
from modern_llm.cli.capsule_command import capsule
from modern_llm.cli.checkpoint_command import checkpoints
from modern_llm.cli.compare_command import compare
from modern_llm.cli.curves_command import curves
from modern_llm.cli.data_commands import datasets, prefetch, presets
from modern_llm.cli.doctor_command import doctor
from modern_llm.cli.model_commands import chat, check_inference, export, sample
from modern_llm.cli.practice_command import practice
from modern_llm.cli.run_commands import run, status, submit
from modern_llm.cli.score_command import score
from modern_llm.cli.serve_command import serve
from modern_llm.runs.launch import skip_last_collection


class Commands(click.Group):
    """The commands, on a terminal or file of any encoding: what it does not have is written out, as
    in `\\u2026`.
    """

    def main(self, *words, **options):
        skip_last_collection()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # None where it is closed
                stream.reconfigure(errors="backslashreplace")
        return super().main(*words, **options)


@click.group(cls=Commands,
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="modern_llm")
def main() -> None:
    """Train a small modern language model, stage by stage; every stage is a notebook.

    \b
    modern-llm run                                 every stage of local-smoke, and a report
    modern-llm run --preset local-cpu -p max_minutes=6
    modern-llm run --stage sft --checkpoint runs/local-smoke/pretrain --run mine
    modern-llm status                              what was run, what it took, what came out
    modern-llm chat --run local-smoke              talk to the model
    modern-llm serve --run local-smoke             to programs that know OpenAI's, and a chat page
    modern-llm sample --run local-smoke --stage pretrain --prompt "Mia has"
    modern-llm score --run local-smoke PROBLEM ANSWER    how likely is an answer right?
    modern-llm checkpoints local-smoke/pretrain    what it knew when: its kept weights, compared
    modern-llm compare local-smoke mine            is it better, and by more than chance?
    modern-llm bisect local-smoke again            where two runs part: step, tensor, cause
    modern-llm curves local-smoke --to tensorboard   or trackio: what it measured while it trained
    modern-llm capsule local-smoke                 the run in one file that proves its report
    modern-llm attention-page local-smoke          what its heads read, as a page for a browser
    modern-llm export --run local-smoke --to DIR   for transformers and others, with a model card
    modern-llm check-inference --run local-smoke   does it fit 12 GB?
    modern-llm presets local-cpu                   every setting of a preset, as JSON
    modern-llm datasets --preset local-cpu         is the data it needs there?
    modern-llm doctor                              what can run here, and what is missing?
    modern-llm bench --device cuda --to DIR        how fast is this machine, and why?
    modern-llm practice 01_attention               a chapter to write yourself; --check runs it
    modern-llm submit --preset tacc-h100 --dry-run   as jobs of a SLURM cluster: how long, the lines
    """


for command in (run, submit, status, chat, serve, sample, score, checkpoints, compare, bisect,
                curves, capsule, attention_page, export, check_inference, doctor, bench, presets,
                datasets, prefetch, practice):
    main.add_command(command)
