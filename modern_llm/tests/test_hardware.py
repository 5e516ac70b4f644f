"""What depends on the machine and can be tried without it: names of devices, fake GPUs, ranks, a device without float64, shares of a peak."""

import torch
import pytest
from click.testing import CliRunner

from modern_llm.checkpoints import pick_device
from modern_llm.cli import main
from modern_llm.config import ConfigError, HardwareConfig, ModelConfig, PipelineConfig
from modern_llm.models import ModernDecoderLM, save_model
from modern_llm.presets import get_pipeline_preset
from modern_llm.tokens import make_tokenizer, save_tokenizer

NO_NAMES = ["tpu", "CPU", "gpu", "GPU", "meta", "cuda:-1", "cuda:", "cuda:x", "cuda:1.0", "cuda:01", "cuda:99999999999999999999", "cuda0", "cpu:1", "mps:1",
            "auto:0", " cpu", "cpu ", "cpu\n", "", "xpu", "cuda:\u0661", "/dev/nvidia0", "device", "None"]


@pytest.fixture
def fake_gpus(monkeypatch):
    """A machine that seems to have so many GPUs; returns the list of those that were chosen."""
    def pretend(count: int) -> list:
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


# ---- names of devices ------------------------------------------------------------------------------------------------


@pytest.mark.fault("messages")
@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(ConfigError, match=r"device='.*' is unknown: say auto .*cpu.*mps.*cuda:1 for the second"):
        pick_device(name)
    with pytest.raises(ConfigError, match="hardware.device='"):
        HardwareConfig(device=name)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("name, gpus, found", [
    ("cuda:7", 0, None), ("cuda", 0, None), ("cuda:0", 0, None), ("mps", 0, None), ("mps:0", 0, None), ("cuda:7", 4, None), ("cuda:4", 4, None),
    ("cuda:3", 4, "cuda:3"), ("cuda", 4, "cuda"), ("auto", 4, "cuda"), ("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("cpu:0", 0, "cpu:0")])
def test_a_device_is_there_or_those_that_are_there_are_named(fake_gpus, name, gpus, found):
    chosen = fake_gpus(gpus)
    if found:
        assert str(pick_device(name)) == found and chosen == [3] * (found == "cuda:3")
    else:
        there = r"cuda, cpu \(cuda:0 to cuda:3\)" if gpus else "cpu"
        with pytest.raises(ConfigError, match=f"device='{name}' is not available here; there is: {there}$"):
            pick_device(name)
        assert not chosen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny base model."""
    config, folder = get_pipeline_preset("local-smoke"), tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(config.data)
    save_model(folder, ModernDecoderLM(ModelConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)))
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.fault("messages")
@pytest.mark.parametrize("command", [["sample", "--prompt", "a"], ["check-inference"]])
@pytest.mark.parametrize("name", ["tpu", "gpu", "CPU", "cuda:-1", "cuda:7", "mps", "meta", ""])
def test_commands_say_it_on_one_line(checkpoint, command, name):
    result = CliRunner().invoke(main, [*command, "--checkpoint", str(checkpoint), "--device", name])
    assert result.exit_code not in (0, 1) and isinstance(result.exception, SystemExit), result.exception
    assert f"device={name!r} is " in result.output and "cpu" in result.output and "Traceback" not in result.output


@pytest.mark.fault("messages")
@pytest.mark.parametrize("name", ["tpu", "gpu", "CPU", "cuda:-1", "meta", "cuda:x"])
def test_a_run_is_refused_before_anything_is_written(tmp_path, name):
    result = CliRunner().invoke(main, ["run", "--stage", "pretrain", "--output-dir", str(tmp_path), "-p", f"device={name}"])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    assert f"device={name!r} is " in result.output and "Traceback" not in result.output
