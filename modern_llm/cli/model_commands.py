"""The commands about a trained model: `chat`, `sample`, `export`, `check-inference`. Imports no
torch before it loads one.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from modern_llm.cli.common import one_line_errors
from modern_llm.config import names_of, nearest


class Finite(click.FloatRange):
    """A number in a range, not infinite and not nan."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        return (number if math.isfinite(number)
                else self.fail(f"{value} is not a finite number", param, ctx))


WHICH_MODEL = (
    click.option("--run", "run_name", metavar="NAME", help="A run: its folder under runs/."),
    click.option("--stage", metavar="STAGE",
                 help="Whose weights: pretrain, sft, dpo or grpo; default: the last that is "
                      "there."),
    click.option("--checkpoint", metavar="PATH",
                 help="A checkpoint, stage or run folder, instead of --run."),
    click.option("--output-dir", metavar="DIR",
                 help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS)."),
)
RUN_OPTIONS = (
    *WHICH_MODEL,
    click.option("--temperature", type=Finite(min=0), default=0.7, show_default=True,
                 help="0 = always the likeliest token."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
                 help="Of each answer."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Of the draws."),
    click.option("--device", default="auto", show_default=True,
                 help="cpu, cuda, mps, or the best there is."),
    click.option("--streaming", is_flag=True,
                 help="Write on when the context is full, with the first four tokens and the last "
                      "ones in sight, up to --max-new-tokens."),
)


def model_options(command, options=RUN_OPTIONS):
    """The options of the commands that load a model."""
    for option in reversed(options):
        command = option(command)
    return command


def which_model(command):
    """The options that name a model."""
    return model_options(command, WHICH_MODEL)


@click.command()
@model_options
def chat(run_name, stage, checkpoint, output_dir, temperature, max_new_tokens, seed,
         device, streaming) -> None:
    """Talk to a model in the terminal; its words appear as they are drawn.

    Earlier turns are kept as long as they fit into the context; a line says when the oldest are
    forgotten. /new forgets all of them, /quit (or Ctrl-D) ends, Ctrl-C ends an answer.

    \b
    modern-llm chat --run local-smoke
    modern-llm chat --checkpoint runs/local-smoke/sft/checkpoint --temperature 0
    echo "Tom has 3 hats and buys 4 hats. How many hats?" | modern-llm chat --run local-smoke
    """
    from modern_llm.cli.talk import Chat, open_model

    with one_line_errors():
        model, tokenizer, folder = open_model(run_name, stage, checkpoint, output_dir, device,
                                              purpose="chat")
    talk = Chat(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                note=_note, streaming=streaming)
    _note(f"{folder}; /new forgets the conversation, /quit ends")
    if sys.stdin is None:
        _note("the standard input is closed: there is nobody to talk to")
        return
    show_prompt, interrupted = sys.stdin.isatty(), False
    while True:
        try:
            if show_prompt:
                click.echo("> ", nl=False)
            line = _line(sys.stdin)
            interrupted = False
        except KeyboardInterrupt:
            if interrupted or not show_prompt:
                raise SystemExit(130) from None
            interrupted = True
            _note("\n(/quit, Ctrl-D or Ctrl-C again ends)")
            continue
        request = line.strip()
        if not line or request == "/quit":
            break
        if request == "/new":
            talk.history = []
        elif line.startswith("/") and request[1:].isalpha():
            _note(f"{request} is not a command{nearest(request.lower(), ('/new', '/quit'))}; with "
                  "a space in front of it, it is a message")
        elif request:
            _answer(talk, request)


def _note(text: str) -> None:
    """A line about the conversation, beside it."""
    click.echo(text, err=True)


def _line(stream) -> str:
    """The next line of a stream of text, "" at its end. Bytes that are not UTF-8 are read in the
    stream's own encoding, else as U+FFFD.
    """
    data = stream.buffer.readline()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        own = (stream.encoding or "utf-8").lower().replace("_", "-")
        if own in ("utf-8", "ascii", "us-ascii", "ansi-x3.4-1968"):
            _note(f"(byte {error.start + 1} of this message is not UTF-8: it is read as \ufffd)")
            own = "utf-8"
        return data.decode(own, "replace")


def _answer(talk, request: str) -> None:
    """Print an answer as it is drawn. Ctrl-C ends it, an error is one line; the conversation goes
    on.
    """
    said = False
    try:
        for piece in talk.reply(request):
            click.echo(piece, nl=False)
            if sys.stdout is not None:
                sys.stdout.flush()
            said = said or bool(piece.strip())
        click.echo()
        if not said:
            _note("(the model ended its answer at once)")
    except KeyboardInterrupt:
        click.echo()
        _note("(interrupted; the conversation goes on)")
    except ValueError as error:
        _note(f"Error: {error}")


@click.command()
@model_options
@click.option(
    "--prompt", default="",
    help="Text to continue; a model that chats answers it. Nothing: it begins a document.")
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True,
              help="How many samples.")
def sample(run_name, stage, checkpoint, output_dir, temperature, max_new_tokens, seed, device,
           streaming, prompt, count) -> None:
    """Print what a model makes of a prompt: a base model continues it, one that chats answers it.

    \b
    modern-llm sample --run local-smoke --stage pretrain --prompt "Mia has"
    modern-llm sample --run local-smoke --prompt "What is 3 plus 4?" -n 5 --temperature 1
    modern-llm sample --run local-smoke --stage pretrain -n 1 --max-new-tokens 1000 --streaming
    """
    from modern_llm.cli.talk import open_model, readable, samples

    with one_line_errors():
        model, tokenizer, folder = open_model(run_name, stage, checkpoint, output_dir, device,
                                              purpose="sample")
        click.echo(str(folder), err=True)
        if readable(prompt) != prompt:
            _note("(bytes of the prompt are not UTF-8: they are read as \ufffd)")
        for text in samples(model, tokenizer, folder, prompt, count, max_new_tokens=max_new_tokens,
                            temperature=temperature, seed=seed, streaming=streaming, note=_note):
            click.echo(f"--- {text}")


@click.command()
@which_model
@click.option("--to", "folder", required=True, metavar="DIR|FILE.gguf",
              help="Where; it must not exist yet. A name in .gguf: one file for llama.cpp.")
@click.option("--dtype", metavar="fp32|bf16|fp16|q8_0",
              help="Of the written weights; default: as they are, in a .gguf file fp16. q8_0, "
                   "eight bits a weight, is for .gguf.")
@click.option("--shard-gb", type=float, default=5.0, show_default=True,
              help="Cut larger weights into files of so many gigabytes.")
def export(run_name, stage, checkpoint, output_dir, folder, dtype, shard_gb) -> None:
    """Write a model as a Hugging Face folder with a model card made from the run's own files.

    A checkpoint folder can be opened by transformers as it stands; this leaves the optimizer's
    state behind, may halve the weights, and says in README.md what the model was trained on, what
    was measured, and what to beware of.

    \b
    modern-llm export --run local-smoke --stage dpo --to my-model
    modern-llm export --run tacc-h100 --to my-model --dtype bf16
    modern-llm export --run local-smoke --to my-model.gguf --dtype q8_0    for llama.cpp
    lm_eval --model hf --model_args pretrained=my-model --tasks gsm8k
    """
    from modern_llm.cli.talk import choose_model
    from modern_llm.interchange.gguf_export import export_gguf
    from modern_llm.report.card import export_with_card

    with one_line_errors():
        source = choose_model(run_name, stage, checkpoint, output_dir)
        if folder.lower().endswith(".gguf"):
            click.echo(f"{source} -> {export_gguf(source, folder, dtype or 'fp16')}")
            return
        click.echo(
            f"{source} -> {export_with_card(source, folder, dtype=dtype, shard_gb=shard_gb)}")


@click.command("check-inference")
@which_model
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, mps, or the best there is.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Of the weights in memory; default: as on disk.")
@click.option("--limit-gb", type=Finite(min=0, min_open=True), default=12.0, show_default=True,
              help="What the process may take, in 10^9 bytes.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True,
              help="Problems answered at once.")
@click.option("--count", type=click.IntRange(min=1), default=16, show_default=True,
              help="Problems answered in all.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
              help="Of each answer.")
@click.option("--problems", type=click.Choice(names_of("problems")), default="synthetic",
              show_default=True, help="Word problems to answer.")
@click.option("--to", "target", metavar="FILE",
              help="Where the figures go, instead of inference_ok.json beside the checkpoint.")
def check_inference(run_name, stage, checkpoint, output_dir, target, **options) -> None:
    """Load a model, let it answer word problems, and hold the memory it took against a limit; exit
    code 1 if it is too much.

    The figures go into inference_ok.json beside the checkpoint (for a third-party model: here), the
    closed-form estimate of the same batch next to what was measured.

    \b
    modern-llm check-inference --run local-smoke
    modern-llm check-inference --checkpoint SmolLM2/ --dtype bf16 --problems gsm8k --batch 16
    """
    from modern_llm.cli.talk import choose_model
    from modern_llm.evaluation.inference import write_check

    with one_line_errors():
        found, path = write_check(choose_model(run_name, stage, checkpoint, output_dir),
                                  None if target is None else Path(target), **options)
    click.echo(f"{'ok' if found['ok'] else 'not ok'}: peak {found['peak_gb']:.2f} of "
               f"{found['limit_gb']:g} GB; the model added {found['added_gb']:.2f}, "
               f"{found['added_over_estimate']:.2f} of the estimate; {path}")
    sys.exit(0 if found["ok"] else 1)
