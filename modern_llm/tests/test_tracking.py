"""The curves in TensorBoard and trackio, read back by their own readers: equal to metrics.jsonl,
each step once, whenever the run was killed; and nothing of the run depends on them.
"""

import configparser
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import NOTEBOOKS, TRAINED, ConfigError, get_pipeline_preset, override
from modern_llm.config.schema import TRACKERS
from modern_llm.files import write_json
from modern_llm.messages import StageError
from modern_llm.report.comparing import Measured, differing
from modern_llm.runs import pipeline, preflight
from modern_llm.runs.capsule import files_of
from modern_llm.runs.spec import sections
from modern_llm.tests.test_pipeline import kill
from modern_llm.tests.test_stage import begin
from modern_llm.tests.test_trainer import CONFIG
from modern_llm.training.checkpoints import (
    RunFolder, append_row, load_checkpoint, read_metrics,
)
from modern_llm.training.distributed import World
from modern_llm.training.recording import Recorder
from modern_llm.training.tracking import CURVES, Mirror, how_to_look, numbers

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"step": step, "tokens": 10 * step, "loss": 1 / step, "mfu": None} for step in range(1, 8)]


def installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


trackers = pytest.mark.parametrize("tracker", [pytest.param(name, marks=pytest.mark.skipif(
    not installed(name), reason=f"pip install 'modern_llm[{name}]'")) for name in TRACKERS])


def curves_in(tracker: str, run: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What the tracker's own reader finds of a training: metric -> (step, value)."""
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(run / "tensorboard" / name), size_guidance={"scalars": 0})
        read.Reload()
        return {tag: [(event.step, event.value) for event in read.Scalars(tag)]
                for tag in read.Tags()["scalars"]}
    # a process of its own, as trackio reads the name of its folder once
    code = ("import json, sys; from trackio.sqlite_storage import SQLiteStorage; "
            "print(json.dumps(SQLiteStorage.get_logs('modern_llm', sys.argv[1])))")
    done = subprocess.run([sys.executable, "-c", code, f"{run.name}/{name}"], check=True,
                          env={**os.environ, "TRACKIO_DIR": str(run / "trackio")},
                          capture_output=True, text=True)
    found: dict = {}
    for row in json.loads(done.stdout):
        for metric, value in numbers(row).items():
            found.setdefault(metric, []).append((row["step"], value))
    return found


def agree(tracker: str, run: Path, name: str) -> int:
    """The curves are the rows of metrics.jsonl, each once and in order; how many there are."""
    wanted: dict = {}
    for row in read_metrics(run / name / "metrics.jsonl"):
        for metric, value in numbers(row).items():
            wanted.setdefault(metric, []).append((row["step"], value))
    found = curves_in(tracker, run, name)
    assert found.keys() == wanted.keys() and "loss" in wanted and "step" not in wanted
    for metric, points in wanted.items():
        steps, values = zip(*points)
        assert [step for step, _ in found[metric]] == list(steps), metric
        values = np.float32(values) if tracker == "tensorboard" else np.array(values)
        assert [value for _, value in found[metric]] == values.tolist(), metric
    return len(wanted["loss"])


# ---- a training that is killed -------------------------------------------------------------------

TRAIN = """
import os, sys
from dataclasses import replace
from pathlib import Path
from modern_llm.tests.test_trainer import CONFIG, toy, trainer
from modern_llm.training.tracking import Mirror
run, tracker, dies = Path(sys.argv[1]), *sys.argv[2:]
mirror = Mirror(tracker, run, run / "sft" / "control") if tracker else None
calls = iter(range(10**6))
def on_row():
    call = next(calls)
    if dies == f"before {call}":
        os.kill(os.getpid(), 9)
    mirror.update()
    if dies == f"after {call}":
        os.kill(os.getpid(), 9)
cfg = replace(CONFIG, log_every=1)
trainer(toy(), run / "sft" / "control", cfg, resume=True, on_row=on_row if tracker else None).fit()
"""


def train(run: Path, tracker: str = "", dies: str = "") -> int:
    """Train 14 steps with a row each and a checkpoint every five; at its `dies`, as in "after 8",
    the process is killed after the row of that step, and before or after it is copied.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    done = subprocess.run([sys.executable, "-c", TRAIN, str(run), tracker, dies], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@trackers
def test_a_killed_training_ends_with_every_step_once(tracker, tmp_path):
    train(tmp_path / "plain")
    for dies, copied in (("after 8", 8), ("before 10", 9)):
        run = tmp_path / dies
        assert train(run, tracker, dies) == -signal.SIGKILL
        assert len(curves_in(tracker, run, "sft/control")["loss"]) == copied
        assert train(run, tracker) == 0
        assert agree(tracker, run, "sft/control") == CONFIG.max_steps
        # and the training is the one that nobody looked at
        one, other = (load_checkpoint(where / "sft/control/checkpoint")[0]["module"]
                      for where in (tmp_path / "plain", run))
        assert all(torch.equal(one[name], other[name]) for name in one)


def words(place: Path, *more: str) -> list[str]:
    return ["run", "--preset", "lesson", "--stage", "pretrain", "--run", "it", "--output-dir",
            str(place), "--max-steps", "30", *more, "-p", "overrides=pretrain.log_every=1 "
            "pretrain.checkpoint_every=10 pretrain.eval_every=10 data.max_train_tokens=20000 "
            "data.max_validation_tokens=2000"]


@trackers
def test_a_stage_killed_as_it_trains_and_started_again(tracker, tmp_path):
    command = [sys.executable, "-m", "modern_llm.cli", *words(tmp_path, "-p", f"tracker={tracker}")]
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "it" / "pretrain", time.time() + 500
    while (len(read_metrics(folder / "metrics.jsonl")) < 14 and process.poll() is None
           and time.time() < deadline):
        time.sleep(0.01)
    kill(process, tmp_path, "pretrain")
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "pretrain: resume" in again.stdout
    assert how_to_look(tracker, tmp_path / "it") in again.stdout + again.stderr
    assert agree(tracker, tmp_path / "it", "pretrain") == 30
    # without it, the stage is the same: finished, and not done again
    plan = CliRunner().invoke(main, words(tmp_path, "--dry-run"))
    assert plan.exit_code == 0 and "pretrain: skip" in plan.output, plan.output
    assert sorted(name.split("/")[0] for name in files_of(tmp_path / "it")
                  if name.split("/")[0] in TRACKERS) == []


@trackers
def test_the_curves_of_a_run_that_has_ended(tracker, tmp_path):
    run = tmp_path / "ended"
    run.mkdir()
    write_json(run / "run.json", {"stages": {}, "config": {}})
    for name in ("pretrain", "dpo/control"):
        (run / name).mkdir(parents=True)
        for row in ROWS:
            append_row(run / name / "metrics.jsonl", row)
    command = [sys.executable, "-m", "modern_llm.cli", "curves", "ended", "--to", tracker,
               "--output-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    for _ in range(2):  # the second time in place of the first
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"dpo/control, pretrain\n{how_to_look(tracker, run)}\n"
        for name in ("pretrain", "dpo/control"):
            assert agree(tracker, run, name) == len(ROWS)


@pytest.mark.skipif(not installed("trackio"), reason="pip install 'modern_llm[trackio]'")
def test_trackio_keeps_to_one_folder_in_a_process(tmp_path):
    code = ("import sys; from pathlib import Path\n"
            "from modern_llm.training.tracking import Mirror\n"
            "for run in map(Path, sys.argv[1:]):\n    Mirror('trackio', run, run / 'sft').update()")
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    ask = lambda **more: subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")],
        env={**environment, **more}, capture_output=True, text=True)
    refused = ask()
    assert refused.returncode == 1 and "restart the kernel, or set TRACKIO_DIR" in refused.stderr
    assert ask(TRACKIO_DIR=str(tmp_path / "all")).returncode == 0


# ---- the copy, whatever it is kept in ------------------------------------------------------------


class Listed:
    """Curves in a list; `broken` is an error that the next copy raises."""

    def __init__(self):
        self.rows, self.broken = [], None

    def start(self, rows):
        self.rows = []
        self.add(rows)

    def add(self, rows):
        if self.broken:
            raise self.broken
        self.rows += [{"step": row["step"], **numbers(row)} for row in rows]


@pytest.fixture
def listed(monkeypatch):
    curves = Listed()
    monkeypatch.setitem(CURVES, "tensorboard", lambda run, name: curves)
    return curves


def test_it_copies_what_is_new_and_whole(listed, tmp_path):
    rows = tmp_path / "sft" / "metrics.jsonl"
    rows.parent.mkdir()
    mirror = Mirror("tensorboard", tmp_path, rows.parent)
    mirror.update()
    assert listed.rows == []
    for row in ROWS[:3]:
        append_row(rows, row)
    mirror.update()
    with open(rows, "a") as file:
        file.write('{"step": 4, "lo')
    mirror.update()
    assert [row["step"] for row in listed.rows] == [1, 2, 3]
    with open(rows, "a") as file:
        file.write('ss": 0.5}\n')
    mirror.update()
    assert listed.rows[-1] == {"step": 4, "loss": 0.5}
    assert listed.rows[0] == {"step": 1, "tokens": 10, "loss": 1.0}  # what is null is no point
    Mirror("tensorboard", tmp_path, rows.parent).update()
    assert [row["step"] for row in listed.rows] == [1, 2, 3, 4]


def test_a_tracker_that_fails_stops_a_training_before_it_begins_and_never_later(listed, tmp_path,
                                                                                capsys):
    (tmp_path / "sft").mkdir()
    listed.broken = OSError("No space left on device")
    mirror = Mirror("tensorboard", tmp_path, tmp_path / "sft")
    with pytest.raises(StageError, match="tracker='tensorboard'.*No space left.*tracker=null"):
        mirror.update()
    listed.broken = None
    mirror.update()
    listed.broken = ValueError("what nobody expects")
    for row in ROWS:
        append_row(tmp_path / "sft" / "metrics.jsonl", row)
        mirror.update()
    said = capsys.readouterr().err
    assert said.count("what nobody expects") == 1 and "training goes on" in said
    assert listed.rows == []


def test_only_the_first_rank_copies(tmp_path):
    for rank in (0, 1):
        calls = []
        Recorder(RunFolder(tmp_path, world=World(rank, 2)), CONFIG,
                 on_row=lambda: calls.append(rank))
        assert calls == [0] * (rank == 0)


# ---- the setting ---------------------------------------------------------------------------------


def test_it_is_a_setting_of_no_stage():
    config = get_pipeline_preset("lesson")
    assert config.tracker is None
    watched = override(config, {"tracker": "trackio"})
    assert all(sections(config, stage) == sections(watched, stage) for stage in NOTEBOOKS)
    one, other = (Measured("", None, {"tracker": value}) for value in (None, "trackio"))
    assert differing(one, other) == {}
    with pytest.raises(ConfigError, match="tracker='tensorbord' is unknown; did you mean 'tensorb"):
        override(config, {"tracker": "tensorbord"})


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_one_line_before_anything_is_written(tracker, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(preflight, "distribution", missing)
    options = {"preset": "lesson", "output_dir": str(tmp_path), "overrides": f"tracker={tracker}"}
    remedy = rf"pip install 'modern_llm\[{tracker}\]'"
    for stage in TRAINED:
        with pytest.raises(StageError, match=remedy):
            pipeline.Plan(stage, **options)
    with pytest.raises(StageError, match=remedy):
        begin(tmp_path, overrides=f"tracker={tracker}")
    done = CliRunner().invoke(main, words(tmp_path, "-p", f"tracker={tracker}"))
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    (tmp_path / "it").mkdir()
    done = CliRunner().invoke(main, ["curves", "it", "--to", tracker, "--output-dir",
                                     str(tmp_path)])
    assert done.exit_code == 2 and f"pip install 'modern_llm[{tracker}]'" in done.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "it"]
    pipeline.Plan("attention", **options)  # which trains nothing


def test_curves_of_nothing_and_of_a_run_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "distribution", lambda name: True)
    ask = lambda name: CliRunner().invoke(main, ["curves", name, "--to", "tensorboard",
                                                 "--output-dir", str(tmp_path)])
    (tmp_path / "empty").mkdir()
    assert "no run 'emty'" in ask("emty").stderr and "nothing was trained" in ask("empty").stderr
    monkeypatch.setattr("modern_llm.runs.parameters.is_in_use", lambda folder: True)
    assert "is under way" in ask("empty").stderr


def test_nothing_is_imported_before_it_is_asked_for():
    code = ("import sys, modern_llm.cli, modern_llm.runs.stage, modern_llm.runs.record, "
            "modern_llm.training.tracking; "
            "print({'torch', 'tensorboard', 'trackio'} & {*sys.modules})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "set()\n"


def test_each_is_an_extra_of_its_name():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    for name in TRACKERS:
        assert settings["DEFAULT"][f"{name}_requirements"].startswith(f"{name}>=")
    assert (*CURVES,) == TRACKERS
