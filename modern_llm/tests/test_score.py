"""How likely an answer is right, from two strings: what is printed is what the verifier says, and
what cannot be scored is named.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.cli.score_command import lines
from modern_llm.config import VerifierConfig
from modern_llm.data.tasks import Problem
from modern_llm.data.tokens import load_tokenizer
from modern_llm.files import atomic_folder
from modern_llm.models.saving import load_model
from modern_llm.models.verifier import VerifierModel
from modern_llm.tests.test_inference import SMALL, saved
from modern_llm.training.verifier_scores import (
    load_scorer, save_verifier, score_answers, token_scores,
)

PROBLEM = "Tom has 3 hats and buys 4 hats. How many hats does Tom have now?"
RIGHT, WRONG = (f"Tom has 3+4=<<3+4={c}>>{c} hats.\n#### {c}" for c in (7, 9))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run `it` whose verifier, with random weights, judges; and a run `other` without one."""
    root = tmp_path_factory.mktemp("score")
    generator = saved(root / "other" / "sft" / "checkpoint", SMALL)
    verifier = VerifierModel(load_model(generator), VerifierConfig(head_dropout=0.0)).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(verifier.head.weight, std=0.5)
    with atomic_folder(root / "it" / "verifier" / "checkpoint") as folder:
        save_verifier(folder, verifier, load_tokenizer(generator), (1.0, 0.01, 0.05, 2.0))
    for run in ("it", "other"):
        (root / run / "run.json").write_text('{"stages": {}}')
    return root


def score(runs: Path, *words: str, typed: bytes = b"") -> tuple[str, str, int]:
    """What `modern-llm score` prints, what it says beside it, and its exit code."""
    done = CliRunner().invoke(main, ["score", "--output-dir", str(runs), "--device", "cpu", *words],
                              input=typed)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stdout, done.stderr, done.exit_code


@pytest.mark.parametrize("place", ["it", "it/verifier", "it/verifier/checkpoint"])
def test_a_score_is_that_of_the_verifier(runs, place):
    scorer = load_scorer(runs / place)
    problem = Problem(PROBLEM, "", 0, 0)
    whole = score_answers(scorer.verifier, scorer.tokenizer, [problem] * 2, [RIGHT, WRONG])
    found = [scorer.score(PROBLEM, text) for text in (RIGHT, WRONG)]
    assert found == pytest.approx(whole.tolist(), abs=1e-5) and found[0] != found[1]


def test_a_checkpoint_that_a_kill_left_aside_is_found(runs, tmp_path):
    whole = load_scorer(runs / "it").score(PROBLEM, RIGHT)
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "checkpoint.previous").symlink_to(
        runs / "it" / "verifier" / "checkpoint")
    assert load_scorer(tmp_path).score(PROBLEM, RIGHT) == whole


@pytest.mark.parametrize("answer", [RIGHT, "#### 7", "1+1=<<1+1=2>>", "\n\n", "\n7 >> 6\n", "é日😀 7",
                                    "<|end|><|endoftext|> 7", " 7 "])
@pytest.mark.parametrize("by", ["step", "token"])
def test_the_pieces_are_the_answer(runs, answer, by):
    scorer = load_scorer(runs / "it")
    if not answer.strip():
        with pytest.raises(ValueError, match="has no text"):
            scorer.running(PROBLEM, answer, by)
        return
    strip = scorer.running(PROBLEM, answer, by)
    tokens, values = token_scores(scorer.verifier, scorer.tokenizer, Problem(PROBLEM, "", 0, 0),
                                  answer)
    assert "".join(piece for piece, _ in strip) == answer
    assert strip[-1][1] == values[-1] and {value for _, value in strip} <= set(values.tolist())
    if by == "step":
        assert len(strip) <= 1 + answer.count(">>") + answer.count("\n")
    elif "\ufffd" not in "".join(tokens):
        assert len(strip) == len(tokens)


def test_steps_end_behind_sums_and_lines(runs):
    pieces = [piece for piece, _ in load_scorer(runs / "it").running(PROBLEM, RIGHT)]
    assert pieces == ["Tom has 3+4=<<3+4=7>>", "7 hats.\n", "#### 7"]


def test_what_was_not_read_moves_no_score(runs):
    scorer = load_scorer(runs / "it")
    right, wrong = (scorer.running(PROBLEM, text, "token") for text in (RIGHT, WRONG))
    fork = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a[0] != b[0])
    assert "".join(piece for piece, _ in right[:fork]) == "Tom has 3+4=<<3+4="
    assert all(math.isclose(a[1], b[1], abs_tol=1e-5) for a, b in zip(right[:fork], wrong[:fork]))
    assert not math.isclose(right[fork][1], wrong[fork][1], abs_tol=1e-5)


def test_answers_are_ranked_and_shown(runs, tmp_path):
    (tmp_path / "answer.txt").write_text(WRONG + "\n", encoding="utf-8")
    printed, beside, code = score(runs, "--run", "it", PROBLEM, RIGHT, "-", "--file",
                                  str(tmp_path / "answer.txt"), typed=b"#### 7\n")
    scorer = load_scorer(runs / "it")
    values = [scorer.score(PROBLEM, text) for text in (RIGHT, "#### 7", WRONG)]
    order = sorted(range(3), key=lambda i: -values[i])
    table, strips = printed.split("\n\n")
    assert code == 0 and not beside
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        [str(rank), f"{values[i]:.3f}", str(i + 1)] for rank, i in enumerate(order, 1)]
    assert [line for line in strips.splitlines() if line.startswith("answer")] == [
        f"answer {i + 1}: {values[i]:.3f}" for i in order]
    assert "Tom has 3+4=<<3+4=9>>" in strips and "9 hats.\\n" in strips


def test_the_largest_fall_is_marked():
    found = lines([("a", 0.9), ("b", 0.8), ("c\n", 0.3), ("", 0.35)])
    assert [line.split()[:2] for line in found] == [
        ["0.900", "#" * 18 + ".."], ["0.800", "#" * 16 + "...."], ["0.300", "#" * 6 + "." * 14],
        ["0.350", "#" * 7 + "." * 13]]
    assert [i for i, line in enumerate(found) if "falls" in line] == [2]
    assert found[2].endswith("c\\n   <- falls by 0.500") and found[3].endswith("(the end)")


def test_json_is_for_programs(runs):
    found = json.loads(score(runs, "--run", "it", "--json", "--by", "token", PROBLEM, RIGHT, RIGHT,
                             WRONG)[0])
    answers = found["answers"]
    assert found["problem"] == PROBLEM and [a["answer"] for a in answers] == [RIGHT, RIGHT, WRONG]
    assert answers[0] == answers[1] and {a["rank"] for a in answers} in ({1, 3}, {1, 2})
    assert all(a["score"] == a["running"][-1]["score"] for a in answers)


@pytest.mark.parametrize("words, says", [
    (["--run", "it", "", "7"], "the problem '' has no text"),
    (["--run", "it", PROBLEM, RIGHT, " \n"], "the answer ' \\n' has no text"),
    (["--run", "it", PROBLEM], "there is no answer to score"),
    (["--run", "it", PROBLEM, "word " * 300], "the context of this verifier has 256: shorten"),
    (["--run", "other", PROBLEM, "7"], "Train one, `modern-llm run --stage verifier`"),
    (["--run", "itt", PROBLEM, "7"], "did you mean 'it'"),
    ([PROBLEM, "7"], "which model? Say --run NAME"),
    (["--run", "it", "--checkpoint", "x", PROBLEM, "7"], "not both"),
    (["--checkpoint", "/nowhere", PROBLEM, "7"], "/nowhere/verifier/checkpoint"),
    (["--run", "it", "--file", "/nowhere", PROBLEM], "--file /nowhere cannot be read: No such"),
    (["--run", "it", "--file", "/", PROBLEM], "--file / cannot be read: "),
    (["--run", "it", PROBLEM, "-"], "the standard input, byte 4, is not UTF-8"),
    (["--run", "it", "--device", "cudaa", PROBLEM, "7"], "device='cudaa' is unknown")])
def test_what_cannot_be_scored_is_one_line(runs, words, says):
    printed, beside, code = score(runs, *words, typed=b"caf\xe9")
    assert code == 2 and not printed and says in beside and beside.count("\n") == 1


def test_a_backslash_n_is_no_new_line(runs):
    assert "two letters" in score(runs, "--run", "it", PROBLEM, r"7 hats.\n#### 7")[1]
    assert not score(runs, "--run", "it", PROBLEM, "7 hats.\n#### 7")[1]


def test_the_result_gets_a_line_of_its_own(runs):
    typed, written = (json.loads(score(runs, "--run", "it", "--json", PROBLEM, text)[0])
                      for text in ("7 hats. \t#### 7", "7 hats.\n#### 7"))
    assert typed == written and typed["answers"][0]["answer"] == "7 hats.\n#### 7"
    glued = json.loads(score(runs, "--run", "it", "--json", PROBLEM, "7 hats.####7")[0])
    assert glued["answers"][0]["answer"] == "7 hats.####7"


def test_a_damaged_verifier_is_named(runs, tmp_path):
    for path in (runs / "it" / "verifier" / "checkpoint").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "verifier.safetensors").write_bytes(b"")
    _, beside, code = score(runs, "--checkpoint", str(tmp_path), PROBLEM, "7")
    assert code == 1 and "verifier.safetensors" in beside
