"""A stage starts only when it can, and refuses by naming the value, the place and the remedy;
nothing is written then.
"""

import gc
import json
import signal
from pathlib import Path

import pytest

from modern_llm.config import ConfigError, parse_overrides
from modern_llm.files import atomic_folder, read_json, write_json
from modern_llm.messages import StageError
from modern_llm.runs.launch import collect_again
from modern_llm.runs.parameters import report_folder, resolve
from modern_llm.runs.preflight import fit_micro_batch
from modern_llm.runs.record import machine
from modern_llm.runs.scheduler import PREEMPTION_SIGNALS
from modern_llm.runs.stage import begin as begin_stage, config_table

DECLARED = ["preset", "run", "seed", "max_steps", "max_minutes", "device", "overrides",
            "output_dir", "resume", "force"]


def begin(tmp_path, cells=(), stage="pretrain", **values):
    parameters = {"preset": "lesson", "run": "", "seed": 0, "max_steps": None, "max_minutes": None,
                  "device": "", "overrides": "", "output_dir": str(tmp_path), "checkpoint": "",
                  "resume": False, "force": False, **values}
    return begin_stage(stage, {**parameters, "In": list(cells)},
                       DECLARED + ["checkpoint"] * (stage != "pretrain"))


@pytest.mark.parametrize("values, error, message", [
    ({"preset": "lessen"}, ConfigError, "did you mean 'lesson'"),
    ({"overrides": "model.widht=32"}, ConfigError, "widht.*did you mean 'width'"),
    ({"overrides": "model.width"}, ConfigError, "must look like"),
    ({"max_steps": 0}, ConfigError, "max_steps=0 must be greater"),
    ({"max_steps": "many"}, ConfigError, "max_steps='many' is str, should be int"),
    ({"seed": 10**30}, ConfigError, "seed=1000.* must lie in"),
    ({"force": "no"}, ConfigError, "force='no' is str, should be True or False"),
    ({"preset": 7}, ConfigError, "preset=7 is int, should be text"),
    ({"overrides": "model=3 model.width=2"}, ConfigError, "both as a value and as a section"),
    ({"overrides": "pretrain.micro_batch_size=-4"}, ConfigError,
     "micro_batch_size=-4 must be greater"),
    ({"overrides": "pretrain.betas=2,3"}, ConfigError, "betas=.2.0, 3.0. must lie in"),
    ({"overrides": "pretrain.lr=Infinity"}, ConfigError, "lr=inf must be .* finite"),
    ({"stage": "sft", "checkpoint": 3}, ConfigError, "checkpoint=3 is int, should be text"),
    ({"stage": "eval", "max_steps": 3}, ConfigError, "max_steps is not a setting of EvalConfig"),
    ({"stage": "sft", "preset": "local-smoke"}, StageError,
     "no finished stage pretrain.*--stage pretrain.*--checkpoint PATH"),
    ({"stage": "dpo", "preset": "local-smoke", "checkpoint": "/no/where"}, StageError,
     "Tried /no/where, /no/where/checkpoint"),
    ({"device": "gpu"}, ConfigError, "hardware.device='gpu' is unknown"),
    ({"run": "../up"}, ConfigError, "is not a folder name"),
    ({"overrides": "hardware.ranks=2"}, StageError,
     "hardware.ranks=2, but 1 process was started: run `modern-llm run --stage pretrain"),
    ({"overrides": "hardware.ranks=3"}, ConfigError,
     "hardware.ranks=3 does not divide pretrain.batch_size=16"),
    ({"overrides": "data.sources=no-such-data"}, StageError, "no-such-data"),
])
def test_refused_before_anything_is_written(tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        begin(tmp_path, **values)
    assert list(tmp_path.iterdir()) == []


def test_unknown_injected_parameter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown parameter 'max_step'; did you mean 'max_steps'"):
        begin(tmp_path, cells=["import math", "# Parameters\nmax_step = 3\n"])
    assert list(tmp_path.iterdir()) == []


def test_preset_too_big_for_this_machine(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    with pytest.raises(StageError) as caught:
        begin(tmp_path, preset="tacc-h100")
    for part in ("data.tokenizer=bpe", "needs a CUDA GPU with 70 GB", "memory: ", "data: ",
                 "wikitext-103-raw-v1", "local-cpu", "device=cpu"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_big_model_is_forced_onto_the_cpu(tmp_path):
    run = begin(tmp_path, preset="tacc-h100", device="cpu", max_steps=2,
                overrides="pretrain.batch_size=2 pretrain.micro_batch_size=1 "
                          "data.sources=synthetic data.tokenizer=bpe")
    assert ((run.device, run.config.pretrain.max_steps, run.config.data.sources)
            == ("cpu", 2, ("synthetic",)))


def test_record_and_existing_runs(tmp_path):
    first = begin(tmp_path, run="mine", max_steps=7)
    assert first.folder == tmp_path / "mine" / "pretrain"
    record = read_json(tmp_path / "mine" / "run.json")
    assert (record["stages"]["pretrain"]["status"] == "running"
            and record["config"]["pretrain"]["max_steps"] == 7)
    assert {"git_commit", "versions", "device", "seed"} <= record.keys()
    assert read_json(first.folder / "params.json")["max_steps"] == 7
    with pytest.raises(StageError, match="'mine' exists.*was begun.*resume=True.*force=True"):
        begin(tmp_path, run="mine")
    assert begin(tmp_path, run="mine", resume=True).resume
    first.finish({"table": []})
    assert read_json(tmp_path / "mine" / "run.json")["stages"]["pretrain"]["status"] == "finished"
    with pytest.raises(StageError, match="is finished"):
        begin(tmp_path, run="mine")
    again = begin(tmp_path, run="mine", force=True)
    assert not again.resume and not (again.folder / "results.json").exists()


def test_run_without_a_name_never_touches_another(tmp_path):
    first, second = begin(tmp_path), begin(tmp_path)
    assert first.run == "lesson" and second.run.startswith("lesson-2")


def test_unwritable_folder_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StageError, match="cannot write to .*choose another place with output_dir"):
        begin(blocker)


def test_micro_batch_shrinks_to_the_memory_there_is():
    config = resolve("pretrain", {"preset": "tacc-h100"})
    fitted = fit_micro_batch(config, "pretrain", 24 * 2**30).pretrain
    assert 1 <= fitted.micro_batch < config.pretrain.micro_batch
    assert fitted.batch_size == config.pretrain.batch_size == 128
    with pytest.raises(StageError, match="even one sequence at a time"):
        fit_micro_batch(config, "pretrain", 2**30)


@pytest.mark.parametrize("text, nested", [
    ("model.width=64 pretrain.lr=1e-3", {"model": {"width": 64}, "pretrain": {"lr": 1e-3}}),
    ("model.use_attention_sinks=true", {"model": {"use_attention_sinks": True}}),
    ("data.sources=a,b", {"data": {"sources": ["a", "b"]}}),
    ("data.sources=a", {"data": {"sources": ["a"]}}),
    ("eval.baselines=", {"eval": {"baselines": []}}),
    ("", {}),
])
def test_overrides(text, nested):
    assert parse_overrides(text) == nested


def test_every_package_setting_is_json():
    config = resolve("pretrain", {"preset": "lesson", "seed": 3, "device": "cpu", "max_minutes": 2})
    assert (config.seed, config.hardware.device, config.pretrain.max_minutes) == (3, "cpu", 2.0)
    json.dumps(machine("cpu"))


# ---- what a stage starts from --------------------------------------------------------------------


def finished(runs: Path, stage: str, seed: int = 0, run: str = "lesson", width: int = 32) -> Path:
    """A run's stage as it looks when it is finished, with an untrained model."""
    import torch

    from modern_llm.config import ModelConfig
    from modern_llm.models.decoder import ModernDecoderLM
    from modern_llm.models.saving import save_model

    torch.manual_seed(seed)
    folder = runs / run / stage
    with atomic_folder(folder / "checkpoint") as temporary:
        save_model(temporary, ModernDecoderLM(ModelConfig(width=width, num_layers=1, num_heads=2,
                                                          num_kv_heads=1, ffn_width=32)))
    write_json(folder / "params.json", {"stage": stage, "inputs": {}})
    write_json(folder / "results.json", {"table": []})
    return folder / "checkpoint"


def test_stages_start_from_the_last_checkpoint_of_their_run(tmp_path):
    made = {stage: finished(tmp_path, stage, seed)
            for seed, stage in enumerate(("pretrain", "sft"))}
    assert begin(tmp_path).run.startswith("lesson-2"), "the name is taken"
    assert begin(tmp_path, stage="dpo").inputs == {"sft": made["sft"]}
    assert begin(tmp_path, stage="verifier").inputs == {"sft": made["sft"]}
    judged = begin(tmp_path, stage="eval")
    assert judged.inputs == made and judged.start == made["sft"] and judged.config.model.width == 32
    assert begin(tmp_path, stage="attention").start == made["sft"]
    made["dpo"] = finished(tmp_path, "dpo", 2)
    made["verifier"] = finished(tmp_path, "verifier", 3)
    assert (begin(tmp_path, stage="verifier", run="lesson", force=True).inputs
            == {"dpo": made["dpo"]})
    finished(tmp_path, "verifier", 3)
    judged = begin(tmp_path, stage="eval", run="lesson", force=True)
    assert judged.inputs == made and judged.start == made["dpo"]
    record = read_json(judged.folder / "params.json")
    assert set(record["config"]) == {"data", "eval", "sft.sources", "dpo.sources", "seed"}
    assert (record["inputs"]["dpo"]["sha256"]
            == read_json(made["dpo"] / "meta.json")["sha256"]["model.safetensors"])


def test_an_unfinished_stage_is_no_start(tmp_path):
    finished(tmp_path, "pretrain", run="mine")
    (tmp_path / "mine" / "pretrain" / "results.json").unlink()
    with pytest.raises(StageError, match="no finished stage pretrain"):
        begin(tmp_path, stage="sft", preset="local-smoke", run="mine")
    assert begin(tmp_path, stage="sft", preset="local-smoke", run="mine",
                 checkpoint=str(tmp_path / "mine")).start.parent.name == "pretrain"


def test_a_checkpoint_given_by_hand_is_the_only_input_and_decides_the_architecture(
    tmp_path, capsys
):
    given = finished(tmp_path, "pretrain", run="other")
    finished(tmp_path, "pretrain", run="mine", width=64)
    run = begin(tmp_path, stage="sft", run="mine",
                checkpoint=str(given), overrides="model.width=128")
    assert run.inputs == {"checkpoint": given} and run.config.model.width == 32
    assert "model.width: 128 -> 32" in capsys.readouterr().err
    again = begin(tmp_path, stage="sft", run="mine", checkpoint=str(given), resume=True)
    assert again.resume and again.inputs == run.inputs
    with pytest.raises(StageError, match="was begun from other weights"):
        begin(tmp_path, stage="sft", run="mine", resume=True)


def test_a_run_that_began_at_sft_is_judged_against_what_it_was_given(tmp_path):
    given = finished(tmp_path, "pretrain", run="other")
    sft = finished(tmp_path, "sft", 1, run="mine")
    write_json(tmp_path / "mine" / "sft" / "params.json",
               {"inputs": {"checkpoint": {"path": str(given), "sha256": ""}}})
    assert begin(tmp_path, stage="eval", run="mine").inputs == {"pretrain": given, "sft": sft}


@pytest.mark.parametrize(
    "stage, source", [("sft", "sft.sources=alpaca sft.weights=1"), ("dpo", "dpo.sources=hh-rlhf"),
                      ("verifier", "verifier.problems=gsm8k"), ("eval", "eval.sentiment=sst2")])
def test_a_stage_asks_for_the_data_it_reads_and_no_other(tmp_path, monkeypatch, stage, source):
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    finished(tmp_path, "pretrain")
    finished(tmp_path, "sft")
    with pytest.raises(StageError, match=f"data: {source.split('=')[1].split()[0]} not found"):
        begin(tmp_path, stage=stage, overrides=source, run="lesson", force=True)
    other = "attention" if stage != "attention" else "dpo"
    assert begin(tmp_path, stage=other, overrides=source, run="lesson", force=True).start


def test_the_record_keeps_what_it_says_of_other_stages(tmp_path):
    begin(tmp_path, run="mine", max_steps=7).finish({"table": []})
    finished(tmp_path, "pretrain", run="mine")
    begin(tmp_path, stage="sft", run="mine", max_steps=9)
    record = read_json(tmp_path / "mine" / "run.json")
    assert (record["config"]["pretrain"]["max_steps"] == 7
            and record["config"]["sft"]["max_steps"] == 9)
    assert (record["stages"]["pretrain"]["status"] == "finished"
            and "pid" not in record["stages"]["pretrain"])
    assert record["stages"]["sft"]["status"] == "running" and record["stages"]["sft"]["pid"] > 0


def test_the_config_table_shows_every_stage(tmp_path):
    config = resolve("pretrain", {"preset": "lesson"})
    for stage, rows in {"pretrain": {"budget", "data"}, "sft": {"replay fraction", "optimizer"},
                        "dpo": {"beta", "batch"}, "verifier": {"lm weight"},
                        "eval": {"num problems", "data"}, "attention": {"parameters"}}.items():
        assert rows <= set(config_table(config, stage).index), stage


def test_the_lesson_preset_makes_its_small_base_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    small = ("pretrain.max_steps=2 pretrain.batch_size=2 data.max_train_tokens=20000 "
             "data.max_validation_tokens=2000 data.tokenizer_vocab_size=300")
    first = begin(tmp_path / "runs", stage="sft", overrides=small)
    assert "making a small base" in capsys.readouterr().err
    assert (first.start.is_relative_to(tmp_path / "cache" / "bases")
            and set(first.inputs) == {"pretrain"})
    assert read_json(first.start.parents[1] / "run.json")["threads"] == 1, (
        "the same base on every machine")
    second = begin(tmp_path / "runs", stage="attention", overrides=small + " sft.lr=1e-4")
    assert "made before" in capsys.readouterr().err and second.inputs == first.inputs
    other = resolve("sft", {"preset": "lesson", "overrides": small, "seed": 5})
    from modern_llm.runs.bases import base_name

    names = {base_name(("pretrain",), config, "cpu")
             for config in (first.config, second.config, other)}
    assert len(names) == 2, "another seed makes another base, another learning rate of SFT does not"


def test_reports_of_runs_kept_elsewhere_stay_with_them(tmp_path):
    assert report_folder(tmp_path / "mine") == tmp_path / "mine" / "report"
    checkout = Path(__file__).resolve().parents[2]
    assert report_folder(checkout / "runs" / "mine") == checkout / "report"


# ---- bad luck ------------------------------------------------------------------------------------


def test_a_preempted_stage_is_resumed_without_being_told_only_under_the_same_settings(
    tmp_path, capsys
):
    first = begin(tmp_path, run="mine", max_steps=7)
    with pytest.raises(StageError, match="was preempted and checkpointed"):
        first.require("preempted")
    again = begin(tmp_path, run="mine", max_steps=7)
    assert (again.resume and again.folder == first.folder
            and "was preempted, goes on" in capsys.readouterr().err)
    with pytest.raises(StageError, match="was stopped"):
        again.require("stopped")
    with pytest.raises(StageError, match="run 'mine' exists: stage pretrain was begun"):
        begin(tmp_path, run="mine", max_steps=7)
    begin(tmp_path, run="mine", max_steps=7, resume=True).mark("preempted")
    with pytest.raises(StageError, match="run 'mine' exists"):
        begin(tmp_path, run="mine", max_steps=8)
    assert not begin(tmp_path, run="mine", max_steps=7, force=True).resume


def test_an_unnamed_run_is_resumed_after_preemption_too(tmp_path):
    begin(tmp_path).mark("preempted")
    assert begin(tmp_path).run == "lesson" and begin(tmp_path).run.startswith("lesson-2")


def test_changed_data_is_named_and_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Tom has 3 hats.\n" * 50)
    options = {"run": "mine", "overrides": f"data.sources={path}"}
    run = begin(tmp_path / "runs", **options)
    files = read_json(run.folder / "params.json")["data_files"]
    assert ([entry["path"] for entry in files.values()] == [str(path)]
            and all(len(entry["sha256"]) == 64 for entry in files.values()))
    path.touch()
    assert begin(tmp_path / "runs", **options, resume=True).resume, "the time alone says nothing"
    path.write_text("Tom has 4 hats.\n" * 50)
    with pytest.raises(StageError, match=f"begun with other data: data file {path}: sha256 .* -> "
                                         ".*Put the former file back, or say force=True"):
        begin(tmp_path / "runs", **options, resume=True)
    assert not begin(tmp_path / "runs", **options, force=True).resume


def test_a_disk_that_fills_up_is_named_and_costs_no_result(tmp_path, monkeypatch):
    run = begin(tmp_path, run="mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modern_llm.runs.record.write_json", full)
        with pytest.raises(StageError, match="cannot write to .*mine.pretrain: No space left on "
                                             "device; make room .* resume=True"):
            run.finish({"table": []})
    assert (not (run.folder / "results.json").exists()
            and begin(tmp_path, run="mine", resume=True).resume)
    run.finish({"table": []})
    assert read_json(run.folder / "results.json") == {"table": []}


def test_a_lost_device_is_named_with_the_way_on(tmp_path, capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    names = {"preset": "lesson", "run": "mine", "seed": 0, "max_steps": None, "max_minutes": None,
             "device": "", "overrides": "",
             "output_dir": str(tmp_path), "resume": False, "force": False}
    run = begin_stage("pretrain", {**names, "In": [], "get_ipython": lambda: shell}, DECLARED)
    shell.run_cell("import torch; raise torch.AcceleratorError('CUDA error: the device is gone')")
    assert "the device cpu is lost" in capsys.readouterr().err
    assert read_json(tmp_path / "mine" / "run.json")["stages"]["pretrain"]["status"] == "failed"
    run.lock.release()


def test_a_warning_that_code_in_c_turns_into_another_error_is_a_warning_still(tmp_path):
    """As the reader of safetensors does, when a signal arrives while it makes a tensor."""
    from IPython.core.interactiveshell import InteractiveShell

    class ZMQInteractiveShell(InteractiveShell):
        """A kernel's shell, by its name."""

    shell, former = (ZMQInteractiveShell(),
                     {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS})
    names = {"preset": "lesson", "run": "mine", "seed": 0, "max_steps": None, "max_minutes": None,
             "device": "", "overrides": "",
             "output_dir": str(tmp_path), "resume": False, "force": False}
    try:
        run = begin_stage("pretrain", {**names, "In": [], "get_ipython": lambda: shell}, DECLARED)
        cell = ("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
                "except BaseException:\n    raise ValueError('no shape')")
        assert isinstance(shell.run_cell(cell).error_in_exec, ValueError)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert read_json(tmp_path / "mine" / "run.json")["stages"]["pretrain"]["status"] == "preempted"
    run.lock.release()


def test_garbage_is_collected_again_where_a_process_of_ours_had_stopped_it():
    gc.unfreeze()
    collect_again()  # here nothing had
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    collect_again()
    assert gc.isenabled() and gc.get_freeze_count() > 10_000
