"""The command about a run's verifier: `score`. Imports no torch before it loads one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from modern_llm.cli.common import as_table, one_line_errors, printable

BAR = 20  # letters of a score of 1


@click.command()
@click.option("--run", "run_name", metavar="NAME", help="A run: its folder under runs/.")
@click.option("--checkpoint", metavar="PATH",
              help="A verifier's checkpoint, stage or run folder, instead of --run.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--file", "files", multiple=True, metavar="FILE",
              help="A file with one answer; as often as needed. - is the standard input.")
@click.option("--by", type=click.Choice(["step", "token"]), default="step", show_default=True,
              help="Show the score after every step, <<3+4=7>> or a line, or after every token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, mps, or the best there is.")
@click.argument("problem")
@click.argument("answers", nargs=-1)
def score(run_name, checkpoint, output_dir, files, by, as_json, device, problem, answers) -> None:
    """Print how likely each of the ANSWERS to PROBLEM is right, as the run's verifier sees it, the
    best first; below it, the score after each step, so that one sees where it drops.

    A score is between 0 and 1 and read at the end of the answer. How far it is a chance, chapter 06
    measures; a verifier knows the problems and the way of writing that it was trained on: word
    problems, one step a line, and #### with the result in a line of its own (where #### stands
    behind a blank, it is put there). An answer - is the standard input. Behind --, an answer may
    begin with a minus.

    \b
    modern-llm score --run local-smoke "Tom has 3 hats and buys 4 hats. How many hats?" \\
        "Tom has 3+4=<<3+4=7>>7 hats. #### 7" "Tom has 3+4=<<3+4=9>>9 hats. #### 9"
    modern-llm score --run local-smoke "Tom has 3 hats. How many hats?" --file answer.txt --by token
    echo "Tom has 3+4=<<3+4=7>>7 hats. #### 7" | modern-llm score --run local-smoke \\
        "Tom has 3 hats and buys 4 hats. How many hats?" - --json
    """
    from modern_llm.cli.talk import readable
    from modern_llm.runs.parameters import chosen_folder
    from modern_llm.training.training_state import pick_device
    from modern_llm.training.verifier_scores import load_scorer

    with one_line_errors():
        folder = chosen_folder(run_name, checkpoint, output_dir)
        texts = [_read("-") if answer == "-" else answer for answer in answers]
        texts = [re.sub(r"[ \t]+####", "\n####", readable(text))
                 for text in [*texts, *map(_read, files)]]
        if not texts:
            raise ValueError("there is no answer to score: give one behind the problem, or a "
                             "--file, or - for the standard input")
        scorer = load_scorer(folder, pick_device(device))
        strips = [scorer.running(readable(problem), text, by) for text in texts]
    scores = [strip[-1][1] for strip in strips]
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    if as_json:
        click.echo(json.dumps({"problem": readable(problem), "answers": [
            {"answer": text, "score": score, "rank": rank,
             "running": [{"text": piece, "score": value} for piece, value in strip]}
            for text, score, rank, strip in zip(texts, scores, ranks, strips)]}, indent=2))
        return
    if any("\\n" in text and "\n" not in text for text in texts):
        click.echo("(an answer has \\n as two letters; in bash, $'…\\n…' makes it a new line)",
                   err=True)
    order = sorted(range(len(texts)), key=ranks.__getitem__)
    if len(texts) > 1:
        click.echo(as_table([{"rank": ranks[i], "score": f"{scores[i]:.3f}", "answer": i + 1,
                              "": _short(texts[i])} for i in order]) + "\n")
    for i in order:
        click.echo(f"answer {i + 1}: {scores[i]:.3f}\n" + "\n".join(lines(strips[i])))


def lines(strip: list[tuple[str, float]]) -> list[str]:
    """The pieces of an answer under each other, each behind the score after it, as a number and a
    bar; the largest fall is marked.
    """
    falls = [0.0, *(before - after for (_, before), (_, after) in zip(strip, strip[1:]))]
    worst = max(range(len(strip)), key=falls.__getitem__)
    return [f"  {value:.3f}  {'#' * round(BAR * value):.<{BAR}}  "
            + (printable(piece) or "(the end)")
            + f"   <- falls by {falls[i]:.3f}" * (i == worst and falls[i] >= 0.0005)
            for i, (piece, value) in enumerate(strip)]


def _read(name: str) -> str:
    """The answer in a file or, of the name -, on the standard input, without the line's end behind
    it.
    """
    if name == "-" and sys.stdin is None:
        raise ValueError("the standard input is closed: there is no answer to read from it")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"--file {name} cannot be read: {error.strerror}; name a file that holds "
                         "one answer") from error
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        place = "the standard input" if name == "-" else name
        raise ValueError(f"{place}, byte {error.start + 1}, is not UTF-8: save the answer as UTF-8 "
                         "text") from error


def _short(text: str, width: int = 60) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 1] + "…"
