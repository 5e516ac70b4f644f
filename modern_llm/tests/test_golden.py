"""The same numbers as before: the first steps of every stage, and a run that earlier code left.

`golden/trajectories.json` holds the loss and the gradient norm of 20 steps of every stage of the
preset "lesson", each stage begun from the one before; `golden/checkpoints/` a small run, written
once at the commit that its `run.json` names (its notebooks, its samples and the machine's paths are
left out), and what it gave then. A refactor that claims to change nothing leaves both as they are.
Digit for digit, on one machine before and after it:

    python -m modern_llm.tests.test_golden --print before.json
    python -m modern_llm.tests.test_golden --print after.json && cmp before.json after.json

Where other numbers are meant, `--record` writes the trajectories anew and says how far they moved,
`--record-earlier` what the earlier run gives; the run itself is not to be made anew, since it
stands for those that users have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from modern_llm.config import TrainConfig, override
from modern_llm.data.tasks import Problem
from modern_llm.data.tokens import load_tokenizer
from modern_llm.files import read_json, write_json
from modern_llm.models.saving import load_model
from modern_llm.models.verifier import load_verifier
from modern_llm.runs.lineage import own_inputs
from modern_llm.runs.outcomes import runs_table
from modern_llm.runs.pipeline import Plan, declared_parameters
from modern_llm.runs.spec import notebooks_folder
from modern_llm.runs.stage import begin, train_stage
from modern_llm.training import sft
from modern_llm.training.checkpoints import STATE_FILE, read_checkpoint
from modern_llm.training.optim import lm_loss
from modern_llm.training.trainer import Trainer
from modern_llm.training.verifier_scores import read_answers, score

GOLDEN = Path(__file__).parent / "golden"
TRAJECTORIES = GOLDEN / "trajectories.json"
EARLIER, EXPECTED = GOLDEN / "checkpoints" / "earlier", GOLDEN / "checkpoints" / "expected.json"

# ---- 20 steps of every stage ---------------------------------------------------------------------

STAGES = ("pretrain", "sft", "dpo", "verifier")
LENGTH = {"max_steps": 20, "log_every": 1, "eval_every": 20, "checkpoint_every": 20,
          "keep_checkpoints": 0}
SMALL = {
    **{f"{stage}.{name}": value for stage in STAGES for name, value in LENGTH.items()},
    "data.max_validation_tokens": 2000, "sft.max_train_examples": 500,
    "sft.max_validation_examples": 4, "dpo.max_validation_pairs": 8, "dpo.max_new_tokens": 8,
    "verifier.train_problems": 6, "verifier.validation_problems": 4,
    "verifier.samples_per_problem": 1, "verifier.validation_samples": 1,
    "verifier.max_new_tokens": 8,
    "verifier.perturbed_fraction": 0.999999,  # gold answers only: rounding could change a sample
}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# The largest relative difference that is no change. Measured against one thread of an AMD EPYC
# with AVX2: two threads give the same digits; SSE2 kernels of MKL and unvectorised ones of torch
# (MKL_CBWR=COMPATIBLE, ATEN_CPU_CAPABILITY=default) differ by 2.4e-7 in a loss and 7.1e-6 in a norm
# at most, and do not add up from stage to stage. The smallest change below, matrices 1% wider at
# the start, makes 6e-4 and 9e-3; documents kept apart make 2e-3 and 9e-2; all others 9e-3 and 5e-2,
# or more.
TOLERANCE = {"loss": 2e-5, "grad_norm": 5e-4}


@dataclass(frozen=True)
class Recipe:
    """20 steps of a stage: from which recipe's checkpoint, and what is otherwise than it was."""

    stage: str
    start: str = ""
    changed: str = ""
    first_label_hidden: bool = False  # of every instruction: one token less is trained


CHAIN = {stage: Recipe(stage, start) for stage, start in zip(STAGES, ("", *STAGES))}
CHANGED = {
    "pretrain-wider-start": Recipe("pretrain", "", "model.init_std=0.0202"),
    "pretrain-documents-apart": Recipe("pretrain", "", "data.isolate_documents=true"),
    "pretrain-warm-up": Recipe("pretrain", "", "pretrain.warmup_steps=6"),
    "pretrain-seed": Recipe("pretrain", "", "seed=1"),
    "sft-warm-up": Recipe("sft", "pretrain", "sft.warmup_steps=6"),
    "sft-order": Recipe("sft", "pretrain", "seed=1"),
    "sft-label-hidden": Recipe("sft", "pretrain", first_label_hidden=True),
    "dpo-warm-up": Recipe("dpo", "sft", "dpo.warmup_steps=4"),
    "dpo-order": Recipe("dpo", "sft", "seed=1"),
    "verifier-warm-up": Recipe("verifier", "dpo", "verifier.warmup_steps=3"),
    "verifier-order": Recipe("verifier", "dpo", "seed=1"),
}
RECIPES = CHAIN | CHANGED
# All take a minute and a half; the default proves it where it is hardest to see.
TRIED = list(CHANGED) if os.environ.get("MODERN_LLM_SLOW_TESTS") else ["pretrain-wider-start"]


def trajectories(folder: Path, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm of every step of these recipes, by one process with one thread."""
    environment = {**os.environ, **ONE_THREAD, "MPLBACKEND": "Agg",
                   "PYTHONPATH": str(notebooks_folder().parent)}
    command = [sys.executable, "-m", "modern_llm.tests.test_golden", "--train", str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for name in names:
        metrics = folder / name / RECIPES[name].stage / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        found[name] = {column: [row[column] for row in rows] for column in TOLERANCE}
    return found


def train(folder: Path, name: str) -> None:
    """Train by a recipe into `folder/name`, as the stage's notebook does."""
    recipe = RECIPES[name]
    settings = [f"{setting}={value}" for setting, value in SMALL.items()]
    values = {"run": name, "output_dir": str(folder), "device": "cpu",
              "overrides": " ".join([*settings, recipe.changed]).strip()}
    if recipe.start:
        values["checkpoint"] = str(folder / recipe.start / recipe.start / "checkpoint")
    parameters = {**declared_parameters(recipe.stage), **values}
    train_stage(begin(recipe.stage, parameters, list(parameters)))


@contextlib.contextmanager
def first_label_hidden():
    """Inside, an encoded conversation that has several labels lacks the first."""
    encode = sft.encode_example

    def encode_less(*args, **options):
        ids, labels = encode(*args, **options)
        trained = [place for place, label in enumerate(labels) if label >= 0]
        hidden = trained[:1] if len(trained) > 1 else []
        return ids, [-100 if place in hidden else label for place, label in enumerate(labels)]

    with mock.patch.object(sft, "encode_example", encode_less):
        yield


def differences(found: dict[str, list[float]], golden: dict[str, list[float]]) -> list[str]:
    """A line for each loss and gradient norm that is another one."""
    lines = []
    for column, tolerance in TOLERANCE.items():
        if len(found[column]) != len(golden[column]):
            lines.append(f"{len(found[column])} steps, not {len(golden[column])}")
        for step, (now, before) in enumerate(zip(found[column], golden[column]), 1):
            if not abs(now - before) <= tolerance * abs(before):
                lines.append(f"{column} of step {step}: {now:.7g}, was {before:.7g}")
    return lines


def largest(found: dict[str, list[float]], golden: dict[str, list[float]]) -> str:
    """The largest relative difference of the losses and of the norms, in words."""
    size = {column: max(abs(a / b - 1) for a, b in zip(found[column], golden[column]))
            for column in TOLERANCE}
    return ", ".join(f"{column} differs by at most {value:.1e}" for column, value in size.items())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return trajectories(tmp_path_factory.mktemp("golden"), [*CHAIN, *TRIED])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_before(found, stage):
    if stage == "verifier" and not torch.backends.mkl.is_available():
        pytest.skip("dropout draws other random numbers where torch is built without MKL")
    assert differences(found[stage], read_json(TRAJECTORIES)[stage]) == []


@pytest.mark.parametrize("name", TRIED)
def test_a_changed_recipe_is_noticed(found, name):
    golden = read_json(TRAJECTORIES)[CHANGED[name].stage]
    print(f"{name}: {largest(found[name], golden)}")
    assert len(differences(found[name], golden)) > 20  # of 40 numbers


# ---- a run that earlier code left ----------------------------------------------------------------

PROBLEM = Problem("Tom has 3 hats and buys 4 hats. How many hats?", "3+4=<<3+4=7>>7\n#### 7", 1, 7)
TEXTS = [PROBLEM.answer, "3+4=<<3+4=8>>8\n#### 8", "#### 7"]
IDS = torch.arange(40)[None] * 37 % 300


@pytest.fixture
def run(tmp_path):
    """A copy of the run, where a user would have it."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def batches(step: int) -> dict[str, torch.Tensor]:
    """Rows that hang on nothing but the step."""
    ids = (torch.arange(4 * 33).view(4, 33) * 37 + 11 * step) % 300
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def resumed(stage_folder: Path) -> Trainer:
    """The run's pretraining, to be resumed for three more steps."""
    settings = read_json(stage_folder / "params.json")["config"]["pretrain"]
    cfg = replace(override(TrainConfig(), settings), max_steps=15, log_every=1)
    return Trainer(load_model(stage_folder / "checkpoint"), lm_loss, batches, cfg, stage_folder,
                   device="cpu", resume=True, progress_bar=False)


def three_losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.fit().history[-3:]]


def question_ids(run: Path) -> list[int]:
    return load_tokenizer(run / "pretrain" / "checkpoint").encode(PROBLEM.question).ids


def logits(run: Path) -> np.ndarray:
    """Of the last token of a row, by the run's pretrained model."""
    with torch.no_grad():
        return load_model(run / "pretrain" / "checkpoint")(IDS)[0, -1].numpy()


def judged(run: Path) -> tuple[np.ndarray, list[float]]:
    """What the run's verifier reads in some answers, and its scores."""
    folder = run / "verifier" / "checkpoint"
    verifier, tokenizer = load_verifier(folder), load_tokenizer(folder)
    parts = read_answers(verifier, tokenizer, [PROBLEM] * len(TEXTS), TEXTS)
    return parts, [score(verifier, tokenizer, PROBLEM, text) for text in TEXTS]


def earlier_numbers(run: Path) -> dict:
    """What the run gives, as it is kept; it trains on in its folder."""
    parts, scores = judged(run)
    return {"question_ids": question_ids(run), "logits": logits(run).tolist(),
            "parts": parts.tolist(), "scores": scores,
            "losses": three_losses(resumed(run / "pretrain"))}


def test_an_earlier_run_is_still_a_finished_one(run):
    rows = {row["stage"]: row["status"] for row in runs_table(run.parent)}
    pretrained = run / "pretrain" / "checkpoint"
    assert rows == {"pretrain": "finished", "verifier": "finished"}
    assert own_inputs("sft", run) == {"pretrain": pretrained}
    for stage, start in {"pretrain": {}, "verifier": {"checkpoint": str(pretrained)}}.items():
        overrides = read_json(run / stage / "params.json")["overrides"]
        plan = Plan(stage, preset="lesson", run=run.name, output_dir=str(run.parent), device="cpu",
                    overrides=overrides, **start)
        step = plan.step(stage)
        assert (step.action, step.why) == ("skip", "finished before, nothing has changed")


def test_an_earlier_model_gives_the_same_logits(run):
    expected = read_json(EXPECTED)
    assert question_ids(run) == expected["question_ids"]
    assert np.allclose(logits(run), expected["logits"], rtol=0, atol=1e-5)


def test_an_earlier_verifier_gives_the_same_scores(run):
    expected = read_json(EXPECTED)
    parts, scores = judged(run)
    assert np.allclose(parts, expected["parts"], rtol=1e-5, atol=1e-5)
    assert np.allclose(scores, expected["scores"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("stage", ["pretrain", "verifier"])
def test_an_earlier_training_state_holds_no_code(run, stage):
    state, meta = read_checkpoint(run / stage / "checkpoint")
    assert state["step"] == meta["step"] and STATE_FILE in meta["sha256"]
    assert all(optimizer["state"] for optimizer in state["optimizers"])


def test_an_earlier_training_goes_on(run):
    expected, stage = read_json(EXPECTED)["losses"], run / "pretrain"
    kept = read_checkpoint(stage / "checkpoint")[0]
    forgetful = resumed(Path(shutil.copytree(stage, run / "forgetful")))
    trainer = resumed(stage)
    assert trainer.state.step == kept["step"] == 12
    for optimizer, saved in zip(trainer.state.optimizers, kept["optimizers"], strict=True):
        for number, moments in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, saved["state"][number][name])
                       for name, value in moments.items())
    assert np.allclose(three_losses(trainer), expected, rtol=TOLERANCE["loss"], atol=0)
    for optimizer in forgetful.state.optimizers:
        optimizer.state.clear()
    without_moments = three_losses(forgetful)[-1]
    assert abs(without_moments / expected[-1] - 1) > 10 * TOLERANCE["loss"]  # the losses do tell


# ---- recording -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modern_llm.tests.test_golden")
    parser.add_argument("--print", metavar="FILE", type=Path,
                        help="write this machine's trajectories there")
    parser.add_argument("--record", action="store_true", help=f"write {TRAJECTORIES.name} anew")
    parser.add_argument("--record-earlier", action="store_true", help=f"write {EXPECTED.name} anew")
    parser.add_argument("--train", nargs="+", metavar=("FOLDER", "RECIPE"),
                        help="train by these recipes into a folder")
    given = parser.parse_args()
    for name in given.train[1:] if given.train else ():
        hidden = RECIPES[name].first_label_hidden
        with first_label_hidden() if hidden else contextlib.nullcontext():
            train(Path(given.train[0]), name)
    with tempfile.TemporaryDirectory() as folder:
        if given.print or given.record:
            os.environ["MODERN_LLM_CACHE"] = str(Path(folder) / "cache")
            found = trajectories(Path(folder), list(CHAIN))
            for stage, golden in read_json(TRAJECTORIES).items():
                print(f"{stage}: {largest(found[stage], golden)}")
            for path in filter(None, (given.print, TRAJECTORIES if given.record else None)):
                write_json(path, found)
        if given.record_earlier:
            run = Path(shutil.copytree(EARLIER, Path(folder) / "earlier"))
            write_json(EXPECTED, earlier_numbers(run))


if __name__ == "__main__":
    main()
