"""A stage starts only when it can, and refuses by naming the value, the place and the remedy; nothing is written then."""

import json

import pytest

from modern_llm import stage as st
from modern_llm.config import ConfigError
from modern_llm.files import read_json

DECLARED = ["preset", "run", "seed", "max_steps", "max_minutes", "device", "overrides", "output_dir", "resume", "force"]


def begin(tmp_path, cells=(), **values):
    parameters = {"preset": "lesson", "run": "", "seed": 0, "max_steps": None, "max_minutes": None, "device": "",
                  "overrides": "", "output_dir": str(tmp_path), "resume": False, "force": False, **values}
    return st.begin("pretrain", {**parameters, "In": list(cells)}, DECLARED)


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
    ({"overrides": "pretrain.micro_batch_size=-4"}, ConfigError, "micro_batch_size=-4 must be greater"),
    ({"overrides": "pretrain.betas=2,3"}, ConfigError, "betas=.2.0, 3.0. must lie in"),
    ({"overrides": "pretrain.lr=Infinity"}, ConfigError, "lr=inf must be .* finite"),
    ({"device": "gpu"}, ConfigError, "hardware.device='gpu' is unknown"),
    ({"run": "../up"}, ConfigError, "is no folder name"),
    ({"overrides": "data.sources=no-such-data"}, st.StageError, "no-such-data"),
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
    with pytest.raises(st.StageError) as caught:
        begin(tmp_path, preset="tacc-h100")
    for part in ("data.tokenizer=bpe", "needs a CUDA GPU with 70 GB", "memory: ", "data: ", "wikitext-103-raw-v1", "local-cpu", "device=cpu"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_big_model_is_forced_onto_the_cpu(tmp_path):
    run = begin(tmp_path, preset="tacc-h100", device="cpu", max_steps=2,
                overrides="pretrain.batch_size=2 pretrain.micro_batch_size=1 data.sources=synthetic data.tokenizer=bpe")
    assert (run.device, run.config.pretrain.max_steps, run.config.data.sources) == ("cpu", 2, ("synthetic",))


def test_record_and_existing_runs(tmp_path):
    first = begin(tmp_path, run="mine", max_steps=7)
    assert first.folder == tmp_path / "mine" / "pretrain"
    record = read_json(tmp_path / "mine" / "run.json")
    assert record["stages"]["pretrain"]["status"] == "running" and record["config"]["pretrain"]["max_steps"] == 7
    assert {"git_commit", "versions", "device", "seed"} <= record.keys()
    assert read_json(first.folder / "params.json")["max_steps"] == 7
    with pytest.raises(st.StageError, match="'mine' exists.*was begun.*resume=True.*force=True"):
        begin(tmp_path, run="mine")
    assert begin(tmp_path, run="mine", resume=True).resume
    first.finish({"table": []})
    assert read_json(tmp_path / "mine" / "run.json")["stages"]["pretrain"]["status"] == "finished"
    with pytest.raises(st.StageError, match="is finished"):
        begin(tmp_path, run="mine")
    again = begin(tmp_path, run="mine", force=True)
    assert not again.resume and not (again.folder / "results.json").exists()


def test_run_without_a_name_never_touches_another(tmp_path):
    first, second = begin(tmp_path), begin(tmp_path)
    assert first.run == "lesson" and second.run.startswith("lesson-2")


def test_unwritable_folder_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(st.StageError, match="cannot write to .*choose another place with output_dir"):
        begin(blocker)


def test_micro_batch_shrinks_to_the_memory_there_is():
    config = st.resolve("pretrain", {"preset": "tacc-h100"})
    fitted = st.fit_micro_batch(config, "pretrain", 40 * 2**30).pretrain
    assert 1 <= fitted.micro_batch < config.pretrain.micro_batch
    assert fitted.batch_size == config.pretrain.batch_size == 128
    with pytest.raises(st.StageError, match="even one sequence at a time"):
        st.fit_micro_batch(config, "pretrain", 2**30)


@pytest.mark.parametrize("text, nested", [
    ("model.width=64 pretrain.lr=1e-3", {"model": {"width": 64}, "pretrain": {"lr": 1e-3}}),
    ("model.use_attention_sinks=true", {"model": {"use_attention_sinks": True}}),
    ("data.sources=a,b", {"data": {"sources": ["a", "b"]}}),
    ("data.sources=a", {"data": {"sources": ["a"]}}),
    ("", {}),
])
def test_overrides(text, nested):
    assert st.parse_overrides(text) == nested


def test_every_package_setting_is_json():
    config = st.resolve("pretrain", {"preset": "lesson", "seed": 3, "device": "cpu", "max_minutes": 2})
    assert (config.seed, config.hardware.device, config.pretrain.max_minutes) == (3, "cpu", 2.0)
    json.dumps(st.machine("cpu"))
