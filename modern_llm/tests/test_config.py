"""Presets resolve, round-trip through JSON, and refuse what they do not know."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import (
    ALIASES, PRESETS, ConfigError, get_pipeline_preset, local_cpu, override, preset_with,
    steps_wanted, tacc_h100, to_dict,
)
from modern_llm.models import counts
from modern_llm.runs.parameters import choose_folder, resolve
from modern_llm.runs.pipeline import Plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_preset_resolves_and_round_trips(name, tmp_path):
    preset = get_pipeline_preset(name)
    path = tmp_path / "same.json"
    path.write_text(json.dumps(to_dict(preset)))
    assert get_pipeline_preset(str(path)) == preset
    assert preset.name == ALIASES.get(name, name)


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_a_file_in_configs_is_the_preset_of_its_name(name):
    """What `modern-llm presets NAME` prints, and the same run: its name, folder and settings."""
    path = ROOT / "configs" / f"{name.replace('-', '_')}.json"
    shown = CliRunner().invoke(main, ["presets", name]).output
    assert path.read_text(encoding="utf-8") == shown, "run `make export` and commit the result"
    assert get_pipeline_preset(str(path)) == get_pipeline_preset(name)
    by_name, by_file = (Plan(stage="sft", preset=preset) for preset in (name, str(path)))
    assert by_file.run_folder == by_name.run_folder and by_file.configs == by_name.configs
    assert choose_folder("sft", {"preset": str(path), "force": True})[0] == by_name.run_folder.name


def test_configs_holds_the_presets_and_nothing_else():
    assert ({path.stem.replace("_", "-") for path in (ROOT / "configs").iterdir()}
            == {*PRESETS, *ALIASES})


def test_json_preset_starts_from_a_base(tmp_path):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({"base": "local-cpu", "model": {"width": 512}}))
    wide = get_pipeline_preset(str(path))
    # its run is another one than the base's
    assert wide == replace(local_cpu(), name="wide", model=replace(local_cpu().model, width=512))


@pytest.mark.parametrize("values, message", [
    ({"model": {"widht": 3}}, r"model\.widht.*did you mean 'width'"),
    ({"modle": {}}, r"modle.*did you mean 'model'"),
    ({"model": {"width": "128"}}, r"model\.width='128' is str, should be int"),
    ({"model": {"width": True}}, r"model\.width=True is bool, should be int"),
    ({"model": 3}, r"model=3 must be a JSON object"),
    ({"data": {"sources": "synthetic"}}, r"data\.sources='synthetic' is str, should be a list"),
    ({"model": {"num_heads": 3}}, r"num_heads=3 does not divide model\.width=128; use one of"),
    ({"model": {"num_kv_heads": 3}},
     r"num_kv_heads=3 does not divide model\.num_heads=4; use one of \[1, 2, 4\]"),
    ({"pretrain": {"optimizer": "adam"}}, r"optimizer='adam' is unknown; did you mean 'adamw'"),
    ({"pretrain": {"micro_batch_size": 5}}, r"micro_batch_size=5 does not divide"),
    ({"data": {"tokenizer": "gpt2"}}, r"vocab_size=512 is under"),
    ({"base": "local-smok"}, r"base='local-smok' is not a preset; did you mean 'local-smoke'"),
])
def test_bad_json_names_place_and_remedy(values, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        get_pipeline_preset(str(path))


@pytest.mark.fault("encodings")
def test_a_preset_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "mine.json").write_text('{"base": "lesson", "seed": 3}', encoding="utf-8-sig")
    preset = get_pipeline_preset(str(tmp_path / "mine.json"))
    assert (preset.name, preset.seed) == ("mine", 3)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("text, message", [
    ('{"sft": {"lr": 0.001}, "sft": {"max_steps": 5}}', "'sft' stands in one object twice"),
    ('{"model": {"width": 64, "width": 128}}', "'width' stands in one object twice"),
    ('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON: maximum recursion"),
    ('{"pretrain": {"lr": 0}}', r"^pretrain\.lr=0"),
])
def test_what_json_would_swallow_is_refused(text, message, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        get_pipeline_preset(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("text, message",
                         [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_file_that_is_no_preset(text, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        get_pipeline_preset(str(path))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tacc-h100'"):
        get_pipeline_preset("tacc-h10")
    with pytest.raises(ConfigError, match="cannot be read"):
        get_pipeline_preset("no-such-file.json")


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_fits_the_memory_it_names(name):
    """Training fits the GPU (or 8 GB of main memory) it was sized for; inference fits 12 GB."""
    preset = get_pipeline_preset(name)
    limit = (preset.hardware.min_gpu_memory_gb or 8) * 2**30
    assert counts.training_memory(preset.model, preset.pretrain)["total"] <= limit
    assert counts.inference_memory(preset.model, batch=16, context=preset.model.context_length,
                                   bytes_per_value=2)["total"] <= 12 * 2**30


def test_the_model_of_tacc_h100_has_253m_parameters():
    assert round(counts.parameter_count(tacc_h100().model)["total"] / 1e6) == 253


def test_config_and_cli_import_no_torch():
    code = ("import sys, modern_llm.cli, modern_llm.runs.pipeline, modern_llm.runs.stage, "
            "modern_llm.config; print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "False\n"


@pytest.mark.fault("messages")
@pytest.mark.parametrize("length", [1, 2, 8, 10, 15])
def test_a_context_too_short_for_any_stage_is_refused_with_the_shortest(length):
    with pytest.raises(ConfigError,
                       match=f"model.context_length={length} leaves no room .* use at least 16"):
        override(get_pipeline_preset("lesson"), {"model": {"context_length": length}}, "overrides")
    assert override(get_pipeline_preset("lesson"),
                    {"model": {"context_length": 16}}, "overrides").model.context_length == 16


def test_tokens_decide_the_steps_of_pretraining():
    words = "data.tokens_target=1000000"
    config = preset_with("local-smoke", words)
    each = config.pretrain.batch_size * config.model.context_length
    assert config.pretrain.max_steps == steps_wanted(config) == -(-1_000_000 // each)
    assert steps_wanted(get_pipeline_preset("local-smoke")) == 800
    asked = {"preset": "local-smoke", "overrides": words}
    assert resolve("pretrain", asked).pretrain.max_steps == config.pretrain.max_steps
    with pytest.raises(ConfigError, match=r"data.tokens_target=1000000 makes \d+ steps, and "
                                          "max_steps=7 was asked for: say one of them"):
        resolve("pretrain", {**asked, "max_steps": 7})
    assert resolve("sft", {**asked, "max_steps": 7}).sft.max_steps == 7
    for value in ("0", "-1", "nan"):
        with pytest.raises(ConfigError, match=r"data.max_epochs"):
            preset_with("local-smoke", f"data.max_epochs={value}")
