"""The pretraining stage as it is really run: by papermill, from several folders, and from the CLI,
stopped and resumed.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import get_pipeline_preset
from modern_llm.data.packing import TokenCache
from modern_llm.files import write_json
from modern_llm.messages import StageError
from modern_llm.runs import pipeline
from modern_llm.runs.spec import sections
from modern_llm.tests.papermill import COMMAND
from modern_llm.tests.test_stage import begin
from modern_llm.training.pretrain import Pretraining

ROOT = Path(__file__).resolve().parents[2]
FEW = "data.max_train_tokens=20000 data.max_validation_tokens=2000"
SMALL = {"preset": "lesson", "max_steps": 12,
         "overrides": f"pretrain.checkpoint_every=4 pretrain.eval_every=6 {FEW}"}


def papermill(output: Path, cwd: Path = ROOT, command: list[str] = COMMAND,
              **parameters) -> tuple[int, str]:
    notebook = os.path.relpath(ROOT / "nbs" / "03_pretrain.ipynb", cwd)
    command = [*command, notebook, str(output), "--no-progress-bar", "--log-output"]
    for name, value in {**SMALL, **parameters}.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=300)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The settings of an uninterrupted run on the built-in world and a poem."""
    poem = tmp_path_factory.mktemp("mixed") / "poem.txt"
    poem.write_text(
        "\n".join(f"The {tree} by the {place} lets its leaves go."
                  for tree in ("oak", "elm", "ash") for place in ("mill", "road", "lake")))
    return f"{SMALL['overrides']} data.sources=synthetic,{poem}"


@pytest.fixture(scope="module")
def said(mixed, tmp_path_factory):
    """That run, started by papermill from nbs/: its folder, and what it said."""
    place = tmp_path_factory.mktemp("straight")
    code, text = papermill(place / "out.ipynb", cwd=ROOT / "nbs", run="straight", output_dir=place,
                           command=[sys.executable, "-m", "papermill"], overrides=mixed)
    assert code == 0, text
    return place / "straight" / "pretrain", text


@pytest.fixture(scope="module")
def straight(said):
    return said[0]


def test_stage_leaves_its_record(straight):
    present = {p.name for p in straight.iterdir()}
    assert ({"notebook.ipynb", "params.json", "metrics.jsonl", "results.json", "checkpoint"}
            <= present)
    metrics = pd.read_json(straight / "metrics.jsonl", lines=True)
    assert ({"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "val_loss"}
            <= set(metrics.columns))
    assert metrics.step.max() == 12
    results = json.loads((straight / "results.json").read_text())
    assert 0 < results["epochs"] < 12
    measures = {row["metric"]: row for row in results["table"]}
    bits = measures["bits per byte, synthetic"]
    assert bits["low"] < bits["value"] < bits["high"] and bits["n"] > 0
    notebook = json.loads((straight / "notebook.ipynb").read_text())
    assert sum(1 for cell in notebook["cells"] for o in cell.get("outputs", [])
               if "image/png" in o.get("data", {})) >= 1
    assert ({"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "generation_config.json", "training_state.pt", "meta.json"}
            <= {p.name for p in (straight / "checkpoint").iterdir()})


def test_epochs_are_counted_bounded_and_said_when_they_are_many(tmp_path, capsys):
    few = f"{FEW} pretrain.compile=false pretrain.eval_every=100"

    def fit(name, **values):
        run = begin(tmp_path, run=name, stage="pretrain", **values)
        recipe = Pretraining(run)
        result = recipe.fit()
        run.lock.release()
        return recipe, result, capsys.readouterr().err

    recipe, result, said = fit("bounded", max_steps=50, overrides=f"{few} data.max_epochs=0.5")
    assert result.stopped == "finished" and result.step == recipe.train.max_steps < 50
    assert 0.5 - recipe.packed.epochs(1) < recipe.packed.epochs(result.step) <= 0.5
    assert f"pretrain: {result.step} steps of 50 read the text 0.5 times (data.max_epochs)" in said
    assert "is read up to" not in said
    rows = {tuple(row) for step in range(math.ceil(recipe.packed.rows_per_epoch / 16))
            for row in recipe.packed(step)["input_ids"].tolist()}
    assert len(rows) >= recipe.packed.rows_per_epoch, "an epoch is every row once"
    recipe, result, said = fit("many", overrides=f"{few} data.max_train_tokens=3000 "
                                                 "data.tokens_target=14000")
    assert result.step == math.ceil(14_000 / (16 * 128))
    assert f"the text is read up to {recipe.packed.epochs(result.step):.1f} times; beyond 4" in said


def test_bits_per_byte_on_the_way_are_of_the_documents_that_were_scored():
    sizes, ends = np.array([60_000, 9_000]), np.array([0, 15_000, 24_000])
    cache = TokenCache(Path(), {}, np.zeros(24_001, np.uint16), ends, sizes, None)

    def scores(model, most):
        assert len(cache.head(most)) == 1  # the second document is too much
        return {"text": pd.DataFrame({"nats": [30_000.0], "tokens": [15_000]})}

    recipe = SimpleNamespace(validation_caches={"text": cache}, scores=scores)
    found = Pretraining.evaluate(recipe, None)
    assert found == {"loss": 2.0, "bpb/text": pytest.approx(30_000 / 60_000 / math.log(2))}


@pytest.mark.fault("one-lacks")
@pytest.mark.fault("small-splits")
def test_a_source_that_knows_its_entropy_is_mixed_with_a_poem_that_does_not(said, mixed):
    (folder, text), poem = said, mixed.rpartition(",")[2]
    assert re.search(r"pretrain: \S+poem.txt: of \d+ characters in 1 document the last \d+ held "
                     r"out for validation", text)
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert ([row["floor bits per byte"] is None for row in results["data"]]
            == [False, True, False, True] and results["floor"] is None)
    assert ({row["metric"] for row in results["table"]}
            >= {"above the floor, synthetic", f"bits per byte, {poem}"})


def test_a_stage_that_fails_says_so_in_its_record(tmp_path):
    code, text = papermill(
        tmp_path / "out.ipynb", run="bad", output_dir=tmp_path,
        overrides="pretrain.muon_lr=1e9 pretrain.lr=1e9 pretrain.log_every=1 pretrain.grad_clip=0 "
                  + FEW)
    assert code == 1 and "diverged by step" in text and "last good checkpoint" in text
    assert (json.loads((tmp_path / "bad" / "run.json").read_text())["stages"]["pretrain"]["status"]
            == "failed")
    assert not (tmp_path / "bad" / "pretrain" / "results.json").exists()


def cli(*words, **environment):
    return CliRunner().invoke(main, [*map(str, words)], env=environment)


def test_cli_plans_skips_and_refuses(straight, mixed, tmp_path, monkeypatch):
    """A run that papermill made alone is one of the command's, too."""
    monkeypatch.chdir(ROOT)
    words = ("run", "--preset", "lesson", "--stage", "pretrain", "--run", "straight", "-p",
             f"overrides={mixed}")
    planned = cli(*words, "--max-steps", 12, "--output-dir", tmp_path, "--dry-run")
    assert (planned.exit_code == 0 and "pretrain: run" in planned.stdout
            and list(tmp_path.iterdir()) == [])
    there = ("--output-dir", os.path.relpath(straight.parent.parent, ROOT))
    again = cli(*words, "--max-steps", 12, *there)
    assert again.exit_code == 0 and "pretrain: skipped, finished before" in again.stdout, (
        again.stderr)
    other = cli(*words, "--max-steps", 13, *there)
    assert (other.exit_code == 2 and "max_steps: 12 -> 13" in other.stderr
            and "--force" in other.stderr)


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    command = [Path(sys.executable).parent / "modern-llm", "run", "--preset", "lesson", "--stage",
               "pretrain", "--max-steps", "40", "--output-dir", str(tmp_path), "--run", "123", "-p",
               f"overrides={FEW}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    folder = tmp_path / "123" / "pretrain"
    deadline = time.time() + 120
    while (not (folder / "metrics.jsonl").exists() and time.time() < deadline
           and process.poll() is None):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "the same command goes on from there" in text, text
    assert (json.loads((tmp_path / "123" / "run.json").read_text())["stages"]["pretrain"]["status"]
            == "stopped")
    assert ((folder / "checkpoint" / "model.safetensors").is_file()
            and not (folder / "results.json").exists())
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (again.returncode == 0 and "pretrain: resume" in again.stdout
            and "bits per byte" in again.stdout), again.stderr
    assert (folder / "notebook.ipynb").is_file()
    steps = pd.read_json(folder / "metrics.jsonl", lines=True).step
    assert steps.is_unique and steps.max() == 40


@pytest.mark.parametrize("words, message", [
    (("run", "--preset", "local-smok"), "did you mean 'local-smoke'"),
    (("run", "--stage", "pretrian"), "did you mean 'pretrain'"),
    (("run", "-p", "sede=1"), "did you mean 'seed'"),
    (("run", "-p", "seed"), "must look like seed=1"),
    (("presets", "local-cup"), "did you mean 'local-cpu'"),
    (("datasets", "tinystorys"), "did you mean 'tinystories'"),
])
def test_cli_refuses_with_one_line(words, message, tmp_path):
    failed = cli(*words, MODERN_LLM_RUNS=str(tmp_path))
    assert failed.exit_code == 2 and message in failed.stderr and "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_cli_datasets_exit_code(tmp_path):
    environment = {"MODERN_LLM_DATA": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    assert cli("datasets", "--preset", "local-smoke", **environment).exit_code == 0
    missing = cli("datasets", "--preset", "local-cpu", **environment)
    assert (missing.exit_code == 1 and "tinystories" in missing.stdout
            and "missing" in missing.stdout)


def test_plan_runs_resumes_skips_or_leaves_the_refusal_to_the_stage(tmp_path):
    options = {"preset": "lesson", "output_dir": str(tmp_path)}
    action = lambda **more: pipeline.Plan("pretrain", **options, **more).step("pretrain").action
    assert action() == "run"
    folder = tmp_path / "lesson" / "pretrain"
    folder.mkdir(parents=True)
    write_json(folder / "params.json",
               {"config": sections(get_pipeline_preset("lesson"), "pretrain"), "inputs": {}})
    assert action() == "resume"
    write_json(folder / "results.json", {})
    assert action() == "skip"
    assert (action(force=True) == "run" and action(max_steps=4, resume=True) == "resume"
            and action(seed=1, no_overwrite=True) == "skip")
    with pytest.raises(StageError, match="seed: 0 -> 1"):
        action(seed=1)
