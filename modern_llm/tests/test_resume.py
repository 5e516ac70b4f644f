"""What can be resumed, and what a record says then: a stage that was begun goes on, or is refused
before anything is written.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st
from torch import nn

from modern_llm.cli import main
from modern_llm.config import ConfigError, TrainConfig
from modern_llm.files import atomic_folder, read_json, write_json, write_text
from modern_llm.messages import StageError
from modern_llm.runs import execution, pipeline
from modern_llm.runs.parameters import resolve
from modern_llm.runs.spec import MAY_CHANGE
from modern_llm.tests.test_stage import begin, finished
from modern_llm.training.optim import LossOutput
from modern_llm.training.trainer import Trainer

pytestmark = pytest.mark.fault("record")


def snapshot(folder):
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def stage_at(tmp_path, stage="pretrain", steps=6, done=False, **values):
    """A stage of the run `mine` that has trained for some of 8 steps, or is finished."""
    if stage != "pretrain":
        finished(tmp_path, "pretrain", run="mine")
        values["checkpoint"] = str(tmp_path / "mine")
    values |= {"max_steps": 8} if stage in ("pretrain", "sft", "dpo", "verifier") else {}
    run = begin(tmp_path, run="mine", stage=stage, **values)
    with atomic_folder(run.folder / "checkpoint", {"step": steps}) as folder:
        (folder / "training_state.pt").write_bytes(b"")
    if done:
        results = ({"steps": steps, "train_seconds": 1.0} if stage not in ("eval", "attention")
                   else {})
        run.finish({"table": [], **results})
    run.lock.release()
    return run, {"stage": stage, "run": "mine", "resume": True, **values}


CHANGED = [
    ("pretrain", "seed", {"seed": 1}),
    ("pretrain", "pretrain.batch_size", {"overrides": "pretrain.batch_size=8"}),
    ("pretrain", "pretrain.optimizer", {"overrides": "pretrain.optimizer=adamw"}),
    ("pretrain", "pretrain.ema_decay", {"overrides": "pretrain.ema_decay=0.9"}),
    ("pretrain", "model.width", {"overrides": "model.width=96"}),
    ("pretrain", "model.num_layers", {"overrides": "model.num_layers=1"}),
    ("pretrain", "model.num_kv_heads", {"overrides": "model.num_kv_heads=2"}),
    ("pretrain", "model.context_length", {"overrides": "model.context_length=64"}),
    ("pretrain", "model.rope_theta", {"overrides": "model.rope_theta=500"}),
    ("pretrain", "model.rope_scaling", {"overrides": "model.rope_scaling=linear"}),
    ("pretrain", "model.use_attention_sinks", {"overrides": "model.use_attention_sinks=true"}),
    ("pretrain", "model.dropout", {"overrides": "model.dropout=0.1"}),
    ("pretrain", "data.tokenizer_vocab_size", {"overrides": "data.tokenizer_vocab_size=400"}),
    ("pretrain", "data.max_train_tokens", {"overrides": "data.max_train_tokens=1000"}),
    ("pretrain", "data.world_seed", {"overrides": "data.world_seed=1"}),
    ("sft", "sft.replay_fraction", {"overrides": "sft.replay_fraction=0.3"}),
    ("sft", "sft.weights", {"overrides": "sft.weights=0.9,0.1"}),
    ("sft", "model.context_length", {"overrides": "model.context_length=64"}),
    ("dpo", "dpo.beta", {"overrides": "dpo.beta=0.5"}),
    ("dpo", "dpo.loss", {"overrides": "dpo.loss=ipo"}),
    ("verifier", "verifier.train_problems", {"overrides": "verifier.train_problems=7"}),
    ("verifier", "verifier.kind", {"overrides": "verifier.kind=encoder"}),
    ("eval", "eval.num_problems", {"overrides": "eval.num_problems=7"}),
    ("eval", "seed", {"seed": 5}),
    ("attention", "data.world_seed", {"overrides": "data.world_seed=1"}),
]


@pytest.mark.parametrize("done", [False, True], ids=["begun", "finished"])
@pytest.mark.parametrize("stage, name, values", CHANGED,
                         ids=[f"{stage}-{name}" for stage, name, _ in CHANGED])
def test_what_made_a_stage_cannot_change_and_nothing_is_written(tmp_path, stage, name,
                                                                values, done):
    _, same = stage_at(tmp_path, stage, done=done)
    before = snapshot(tmp_path)
    with pytest.raises(StageError,
                       match=rf"(?s)stage {stage} {'is finished' if done else 'was begun'} in "
                             rf".*cannot go on.*\n  - {name}: .* -> .*cannot change under way.*"
                             r"former settings.*force=True.*another run name"):
        begin(tmp_path, **{**same, **values})
    assert snapshot(tmp_path) == before
    again = begin(tmp_path, **same)
    assert again.resume, "its own command goes on"


@pytest.mark.parametrize("name",
                         ["lr", "max_minutes", "eval_every", "precision", "schedule", "compile"])
def test_a_finished_stage_does_not_claim_settings_it_never_used(tmp_path, name):
    """There is no step to come that they could be used in."""
    values = {"lr": 1e-4, "max_minutes": 5, "eval_every": 3, "precision": "bf16",
              "schedule": "cosine", "compile": "true"}
    _, same = stage_at(tmp_path, steps=8, done=True)
    before = snapshot(tmp_path)
    with pytest.raises(StageError, match=rf"(?s)is finished.*pretrain.{name}: .*\nIt has 8 steps "
                                         r"behind it.*none to come"):
        begin(tmp_path, **same, overrides=f"pretrain.{name}={values[name]}")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("steps", [6, 5, 1])
def test_a_stage_is_not_made_shorter_than_it_is(tmp_path, steps):
    _, same = stage_at(tmp_path)
    with pytest.raises(StageError, match=rf"(?s)pretrain.max_steps: 8 -> {steps}\nIt has 6 steps "
                                         rf"behind it and, with pretrain.max_steps={steps}, none"):
        begin(tmp_path, **{**same, "max_steps": steps})


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_how_long_how_often_and_how_fast_may_change_and_the_record_says_from_which_step_on(
    tmp_path, name
):
    values = {"max_steps": 9, "max_minutes": 5.0, "precision": "bf16", "compile": True,
              "gradient_checkpointing": True, "betas": [0.8, 0.9], "schedule": "cosine",
              "micro_batch_size": 2, "grad_clip": 0.5}
    value = values.get(name, 1)
    run, same = stage_at(tmp_path)
    former = read_json(run.folder / "params.json")
    words = ({"overrides": f"pretrain.{name}={json.dumps(value).strip('[]').replace(' ', '')}"}
             if name != "max_steps" else {"max_steps": 9})
    again = begin(tmp_path, **{**same, **words})
    assert again.resume and (again.folder / "checkpoint").is_dir()
    record = read_json(run.folder / "params.json")
    if name == "micro_batch_size":  # another one would round differently
        assert (again.config.pretrain.micro_batch_size
                == former["config"]["pretrain"]["micro_batch_size"]
                and "changed_under_way" not in record)
        return
    assert record["config"]["pretrain"][name] == value
    change, = record["changed_under_way"]
    assert change["from_step"] == 6 and change["settings"][0].startswith(
        f"pretrain.{name}: {json.dumps(former['config']['pretrain'][name])} -> ")


def test_changes_add_up_and_a_sitting_without_one_adds_none(tmp_path):
    run, same = stage_at(tmp_path)
    for steps, values in ((6, {"max_steps": 9}), (7, {"max_steps": 9}), (7, {"max_steps": 12})):
        with atomic_folder(run.folder / "checkpoint", {"step": steps}):
            pass
        begin(tmp_path, **{**same, **values}).lock.release()
    assert [change["from_step"]
            for change in read_json(run.folder / "params.json")["changed_under_way"]] == [6, 7]


def test_a_finished_stage_that_is_trained_on_has_no_results_until_it_has_new_ones(tmp_path):
    """Else a kill under way would leave results of other weights, and tables that were kept would
    be taken for the new model's.
    """
    run, same = stage_at(tmp_path, "sft", steps=8, done=True)
    for name in ("answers_base.jsonl", "answers_sft.jsonl"):
        write_text(run.folder / name, "{}\n")
    again = begin(tmp_path, **{**same, "max_steps": 12})
    assert (again.resume
            and read_json(run.folder / "params.json")["config"]["sft"]["max_steps"] == 12)
    assert (not (run.folder / "results.json").exists()
            and read_json(run.folder / "results.previous.json")["steps"] == 8)
    assert (not (run.folder / "answers_sft.jsonl").exists()
            and (run.folder / "answers_base.jsonl").exists())


def test_a_finished_stage_stays_finished_when_repeating_it_fails(tmp_path):
    from IPython.core.interactiveshell import InteractiveShell

    from modern_llm.runs.stage import begin as begin_stage
    from modern_llm.tests.test_stage import DECLARED

    stage_at(tmp_path, steps=8, done=True)
    shell = InteractiveShell()
    names = {"preset": "lesson", "run": "mine", "seed": 0, "max_steps": 8, "max_minutes": None,
             "device": "", "overrides": "",
             "output_dir": str(tmp_path), "resume": True, "force": False}
    run = begin_stage("pretrain", {**names, "In": [], "get_ipython": lambda: shell}, DECLARED)
    shell.run_cell("raise ValueError('bad luck')")
    run.lock.release()
    assert read_json(tmp_path / "mine" / "run.json")["stages"]["pretrain"]["status"] == "finished"


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"config": 3}', '{"config": {"seed": 0}, "inputs": []}',
             "\x00\x01"],
    ids=["missing", "empty", "half", "list", "nothing", "number", "inputs", "bytes"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_record_is_named_with_the_remedy(tmp_path, text, resume):
    run, same = stage_at(tmp_path, steps=8, done=True)
    path = run.folder / "params.json"
    path.unlink() if text is None else path.write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(
        StageError, match=f"{path} is (missing|damaged).*whole copy.*force=True.*another run name"):
        begin(tmp_path, **{**same, "resume": resume})
    assert snapshot(tmp_path) == before
    result = CliRunner().invoke(main,
                                ["run", "--preset", "lesson", "--stage", "pretrain", "--run",
                                 "mine", "--output-dir", str(tmp_path), *["--resume"] * resume])
    assert (result.exit_code == 2 and str(path) in result.output and "--force" in result.output
            and snapshot(tmp_path) == before)
    assert not begin(tmp_path, **{**same, "resume": False, "force": True}).resume


def test_a_damaged_run_json_is_named_before_force_deletes_anything(tmp_path):
    run, same = stage_at(tmp_path, steps=8, done=True)
    (tmp_path / "mine" / "run.json").write_text("{")
    before = snapshot(tmp_path)
    with pytest.raises(StageError,
                       match="run.json is damaged .*delete it: the stages' own files stay"):
        begin(tmp_path, **{**same, "resume": False, "force": True})
    assert snapshot(tmp_path) == before


def test_a_setting_that_an_older_record_does_not_have_is_named(tmp_path):
    run, same = stage_at(tmp_path)
    record = read_json(run.folder / "params.json")
    del record["config"]["model"]["rope_factor"], record["context_length"]
    write_json(run.folder / "params.json", record)
    with pytest.raises(StageError, match="model.rope_factor: not there -> 1.0"):
        begin(tmp_path, **same)


def test_a_run_from_before_the_other_rules_of_longer_contexts_goes_on(tmp_path):
    run, same = stage_at(tmp_path)
    record = read_json(run.folder / "params.json")
    del record["config"]["model"]["rope_scaling"]
    write_json(run.folder / "params.json", record)
    with pytest.raises(StageError, match='model.rope_scaling: "llama3" -> "linear"'):
        begin(tmp_path, **{**same, "overrides": "model.rope_scaling=linear"})
    assert begin(tmp_path, **same).resume


def test_to_resume_and_to_delete_is_one_thing_too_many(tmp_path):
    _, same = stage_at(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="resume=True goes on with what is there, force=True "
                                          "deletes it: say one of them"):
        begin(tmp_path, **{**same, "force": True})
    assert snapshot(tmp_path) == before


def test_other_weights_to_start_from_are_refused_and_nothing_is_written(tmp_path):
    _, same = stage_at(tmp_path, "sft")
    other = finished(tmp_path, "pretrain", seed=7, run="other")
    before = snapshot(tmp_path)
    with pytest.raises(StageError, match="was begun from other weights"):
        begin(tmp_path, **{**same, "checkpoint": str(other)})
    assert snapshot(tmp_path) == before


# ---- the command line ----------------------------------------------------------------------------


def ask(tmp_path, *words):
    result = CliRunner().invoke(main, ["run", "--preset", "lesson", "--stage", "pretrain", "--run",
                                       "mine", "--output-dir",
                                       str(tmp_path), "--max-steps", "8", "-p", "seed=0", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("words, line",
                         [(("-p", "data.sources=synthetic,tinystories"),
                           'data.sources: ["synthetic"] -> ["synthetic", "tinystories"]'),
                          (("-p", "model.width=96"), "-> 96"), (("-p", "seed=1"), "seed: 0 -> 1"),
                          (("-p", "pretrain.batch_size=8"), "pretrain.batch_size: 16 -> 8"),
                          (("-p", "pretrain.lr=1e-4"), "none to come")])
@pytest.mark.parametrize("resume", [True, False])
def test_the_command_suggests_nothing_that_would_destroy(tmp_path, words, line, resume):
    stage_at(tmp_path, steps=8, done=True)
    before = snapshot(tmp_path)
    code, text = ask(tmp_path, *words, *["--resume"] * resume)
    assert (code == 2 and line in text and "--force" in text and "--run NAME" in text
            and "--resume" not in text and "--no-overwrite" in text)
    assert snapshot(tmp_path) == before
    assert ask(tmp_path)[0] == 0 and snapshot(tmp_path) == before, (
        "its own command still finds it finished")


def test_the_command_offers_to_go_on_where_that_is_true(tmp_path):
    stage_at(tmp_path)
    code, text = ask(tmp_path, "-p", "pretrain.lr=1e-4", "--dry-run")
    assert code == 2 and "--resume to go on with the new settings" in text
    code, text = ask(tmp_path, "-p", "pretrain.lr=1e-4", "--resume", "--dry-run")
    assert code == 0 and "pretrain: resume (pretrain.lr: 0.003 -> 0.0001)" in text


def test_a_later_stage_that_is_refused_stops_the_pipeline_at_its_start(tmp_path):
    stage_at(tmp_path, "sft")
    shutil.rmtree(tmp_path / "mine" / "pretrain")
    before = snapshot(tmp_path)
    result = CliRunner().invoke(main, ["run", "--preset", "lesson", "--run", "mine", "--output-dir",
                                       str(tmp_path), "-p", "sft.beta=1"])
    assert result.exit_code == 2
    result = CliRunner().invoke(main, ["run", "--preset", "lesson", "--run", "mine", "--output-dir",
                                       str(tmp_path), "-p", "sft.batch_size=2"])
    assert (result.exit_code == 2 and "sft.batch_size" in result.output
            and snapshot(tmp_path) == before)


def test_the_model_card_says_what_was_changed_under_way(tmp_path):
    from modern_llm.models.saving import read_config
    from modern_llm.report.card import model_card

    checkpoint = finished(tmp_path, "pretrain", run="mine")
    record = resolve("pretrain", {"preset": "lesson"})
    from modern_llm.runs.spec import sections

    write_json(tmp_path / "mine" / "run.json",
               {"stages": {"pretrain": {"status": "finished", "seconds": 1}}})
    write_json(tmp_path / "mine" / "pretrain" / "params.json", {
        "preset": "lesson", "config": sections(record, "pretrain"), "inputs": {},
        "changed_under_way": [{"from_step": 6, "settings": ["pretrain.lr: 0.003 -> 0.001"]}]})
    for name, value in (("tokenizer_config.json", {}),):
        write_json(checkpoint / name, value)
    from modern_llm.data.tokens import make_tokenizer, save_tokenizer

    save_tokenizer(make_tokenizer(record.data), checkpoint)
    card = model_card(checkpoint, read_config(checkpoint), "LlamaForCausalLM", "float32", 1, "mine")
    assert "* From step 6 of pretrain on: pretrain.lr: 0.003 -> 0.001." in card


# ---- any split into sessions ---------------------------------------------------------------------


def tiny_run(folder, steps, stops):
    """Train a tiny model to the end, stopped and begun again after each of `stops` steps."""
    cfg = TrainConfig(max_steps=steps, batch_size=2, optimizer="muon", warmup_steps=2, eval_every=3,
                      log_every=1, checkpoint_every=9, keep_checkpoints=0, ema_decay=0.9)

    def loss_fn(module, batch):
        # drawn in the step: its generator's state must come back too
        noise = torch.randn(()) * 0.01
        error = ((module(batch["x"]) - batch["x"].flip(-1)).square().mean()
                 + noise * module[0].weight.sum())
        return LossOutput(error * 2, torch.tensor(2.0), {})

    def batches(step):
        return {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(step))}

    for stop in [*stops, None]:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        trainer = Trainer(
            module, loss_fn, batches, cfg, folder,
            evaluate=lambda module: {"loss": 0.0, "drawn": torch.rand(()).item()},
            save_model=lambda module, place: torch.save(module.state_dict(), place / "model.pt"),
            device="cpu", resume=True, progress_bar=False)
        if stop is not None:
            trainer.should_stop = lambda: trainer.state.step >= stop
        result = trainer.fit()
    assert result.stopped == "finished"
    return (trainer.state.state_dict(),
            [{k: v for k, v in row.items() if k not in ("tokens_per_s", "data_wait_s")}
             for row in result.history])


def same(one, other):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, dict):
        return (one.keys() == other.keys()
                and all(same(one[name], other[name]) for name in one if name != "seconds"))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("unbroken"), 7, [])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(stops=st.lists(st.integers(1, 6), max_size=3).map(sorted))
def test_any_split_into_sittings_gives_the_same_weights_and_rows(tmp_path_factory, unbroken, stops):
    state, rows = tiny_run(tmp_path_factory.mktemp("split"), 7, stops)
    assert same(state, unbroken[0])
    assert [{k: v for k, v in row.items() if k != "loss"} for row in rows if row["step"] == 7] == [
        {k: v for k, v in row.items() if k != "loss"} for row in unbroken[1] if row["step"] == 7]


# ---- records edited by hand ----------------------------------------------------------------------

DAMAGED = [("run.json", {"stages": {"pretrain": "preempted"}}),
           ("run.json", {"stages": {"pretrain": None}}),
           ("run.json", {"stages": []}), ("run.json", {"config": 3}),
           ("run.json", {"stages": {"pretrain": {"status": "stopped", "seconds": "5"}}}),
           ("pretrain/params.json", {"inputs": {"a": "b"}}),
           ("pretrain/params.json", {"inputs": {"a": {"path": "b"}}}),
           ("pretrain/params.json", {"data_files": {"a": {}}}),
           ("pretrain/params.json", {"data_files": {"a": 5}}),
           ("pretrain/params.json", {"config": "x"}), ("pretrain/results.json", {"steps": "x"}),
           ("pretrain/results.json", {"train_seconds": [1]})]


@pytest.mark.parametrize("name, edit", DAMAGED, ids=[f"{name}-{edit}" for name, edit in DAMAGED])
def test_a_record_edited_by_hand_is_named_and_nothing_is_written(tmp_path, name, edit):
    run, parameters = stage_at(tmp_path, done=True)
    write_json(run.folder.parent / name, {**read_json(run.folder.parent / name), **edit})
    before = snapshot(tmp_path)
    with pytest.raises(StageError, match=f"{Path(name).name} is damaged"):
        begin(tmp_path, **{**parameters, "max_steps": 20})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("report", ["x", [1], {"path": 5}, {"path": "/etc/hostname"}, {}])
def test_a_report_that_the_record_misnames_is_written_anew(tmp_path, report):
    run, _ = stage_at(tmp_path, done=True)
    write_json(tmp_path / "mine/run.json",
               {**read_json(tmp_path / "mine/run.json"), "report": report})
    assert pipeline.Plan("report", preset="lesson", run="mine",
                         output_dir=str(tmp_path)).step("report").action == "run"


def test_a_report_of_damaged_results_says_which(tmp_path):
    run, _ = stage_at(tmp_path, done=True)
    (run.folder / "results.json").write_text("{")
    with pytest.raises(
        StageError, match="pretrain/results.json is not JSON.*delete it and run that stage again"):
        execution.write_the_report(pipeline.Plan("report", preset="lesson", run="mine",
                                                output_dir=str(tmp_path)).step("report"))


def test_a_job_that_is_queued_again_begins_anew_once(tmp_path, monkeypatch):
    run, _ = stage_at(tmp_path)
    plan = pipeline.Plan("pretrain", preset="lesson", run="mine",
                         output_dir=str(tmp_path), max_steps=8, force=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_json((tmp_path / "mine/jobs").mkdir() or tmp_path / "mine/jobs/7.json", {})
    for count, noted_before, action in (
        ("0", True, "run"), ("1", False, "run"), ("1", True, "resume")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        os.utime(tmp_path / "mine/jobs/7.json", (0, 0) if noted_before else None)
        step = plan.step("pretrain")
        assert (step.action, bool(step.parameters.get("force"))) == (action, action == "run")


@pytest.mark.fault("promises")
def test_a_ctrl_c_before_training_stops_it_all_the_same(tmp_path, monkeypatch, capsys):
    """A stage clears its folder when it begins; who asked before is asked for again."""
    step = pipeline.Plan("pretrain", preset="lesson", run="mine",
                         output_dir=str(tmp_path)).step("pretrain")
    script = ("import pathlib, sys, time\nstop = pathlib.Path(sys.argv[1])\nfor _ in "
              "range(3000):\n    time.sleep(0.01)\n    if stop.exists(): break\nstop.unlink()\n"
              "for _ in range(1000):\n    time.sleep(0.01)\n    if stop.exists(): sys.exit(3)\n")
    words = [sys.executable, "-I", "-S", "-c", script, str(step.folder / execution.STOP_FILE)]
    monkeypatch.setattr(
        execution, "start_papermill",
        lambda *_: subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True))
    # ignored where the tests were started in the background
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        code = execution.execute(step)
    finally:
        signal.signal(signal.SIGINT, former)
    assert code == 3 and not (step.folder / execution.STOP_FILE).exists()
    assert "Ctrl-C again kills" in capsys.readouterr().err


@pytest.mark.parametrize("units", [False, True], ids=["no bf16 units", "bf16 units"])
def test_a_precision_left_open_is_the_machines_and_stays_what_it_was(tmp_path, monkeypatch, units):
    """Resumed on another processor a run goes on in the precision that it began with."""
    state = "modern_llm.training.training_state.has_bf16_units"
    monkeypatch.setattr(state, lambda: units)
    run, same = stage_at(tmp_path, overrides="pretrain.precision=auto")
    meant = "bf16" if units else "fp32"
    assert run.config.pretrain.precision == meant
    assert read_json(run.folder / "params.json")["config"]["pretrain"]["precision"] == meant
    assert read_json(run.folder.parent / "run.json")["config"]["pretrain"]["precision"] == meant
    monkeypatch.setattr(state, lambda: not units)
    again = begin(tmp_path, **same)
    assert again.resume and again.config.pretrain.precision == meant
    assert "changed_under_way" not in read_json(run.folder / "params.json")
