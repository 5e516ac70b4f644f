"""What this machine is and what can run here: every fact is the machine's own, and what is missing
is named with its remedy.
"""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import machine, main
from modern_llm.cluster.duration import ASSUMED_START_MINUTES, CPU_FLOPS, estimate
from modern_llm.config import PRESETS, get_pipeline_preset, override
from modern_llm.messages import StageError
from modern_llm.runs.data_files import missing_data
from modern_llm.runs.preflight import GIB, available_memory, can_compile, preflight
from modern_llm.training.training_state import has_bf16_units

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
# what local-cpu reads
LOCAL_CPU = {"wikitext-2-raw-v1", "tinystories", "sst2", "alpaca", "hh-rlhf"}


@pytest.fixture(autouse=True)
def nothing_known(offline):
    """No data, and nothing remembered of an earlier look."""
    for known in (machine.place_of, machine.has_tokenizer, machine.has_model):
        known.cache_clear()


def typed(*words):
    done = CliRunner().invoke(main, ["doctor", "--quick", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def prospects():
    return {row["preset"]: row for row in json.loads(typed("--json").stdout)["presets"]}


def test_the_facts_are_those_of_this_machine():
    done = typed("--json")
    found = json.loads(done.stdout)
    facts = found["machine"]
    assert done.exit_code == 0 and found["ok"], found["problems"]
    assert len(found["problems"]) == (not can_compile())
    assert facts["torch"]["version"] == torch.__version__ and facts["executable"] == sys.executable
    assert facts["bf16_units"] == has_bf16_units() and facts["compiles"] == can_compile()
    assert facts["free_memory_gb"] == pytest.approx(available_memory() / GIB, rel=0.3)
    assert facts["attention"]["cpu"] == ["flash", "math"]
    assert facts["datasets"]["synthetic"] == "built-in" and facts["datasets"]["sst2"] == ""
    assert {row["preset"] for row in found["presets"]} == set(PRESETS)


@NO_GPU
def test_what_a_preset_lacks_is_what_a_run_would_say():
    """Of every preset: it runs here exactly if each of its stages would start."""
    for name, row in prospects().items():
        config, refused = get_pipeline_preset(name), []
        for stage in machine.stages_of(config):
            try:
                preflight(config, stage)
            except StageError as error:
                refused.append(str(error))
        assert row["runs"] == (not refused and not row["missing"]), (name, refused)
        assert all(each in "".join(missing_data(config, machine.stages_of(config)))
                   for each in set(row["missing"]) & set(machine.data_of(config)))
    wanted = get_pipeline_preset("tacc-h100").hardware.min_gpu_memory_gb
    first = prospects()["tacc-h100"]["problems"][0]
    assert first["kind"] == "device" and f"needs a CUDA GPU with {wanted:g} GB" in first["what"]


def test_its_stages_are_those_of_a_whole_run():
    assert machine.stages_of(get_pipeline_preset("local-smoke")) == [
        "pretrain", "sft", "dpo", "verifier", "eval", "attention"]
    assert machine.stages_of(get_pipeline_preset("smollm2-135m"))[0] == "sft"
    chosen = override(get_pipeline_preset("lesson"), {"grpo": {"with_all": True}})
    assert "grpo" in machine.stages_of(chosen)


def test_missing_data_are_named_with_the_remedy(tmp_path, monkeypatch):
    row = prospects()["local-cpu"]
    assert set(row["missing"]) == LOCAL_CPU and not row["runs"] and row["minutes"] is None
    assert [problem["kind"] for problem in row["problems"]] == ["data"]
    assert "modern-llm prefetch --preset PRESET" in row["problems"][0]["remedy"]
    for name in LOCAL_CPU - {"sst2"}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}\n")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    machine.place_of.cache_clear()
    found = json.loads(typed("--json").stdout)
    assert found["presets"][list(PRESETS).index("local-cpu")]["missing"] == ["sst2"]
    assert found["machine"]["datasets"]["tinystories"] == "mirror"


def test_too_little_memory_is_a_no_and_an_exit_code(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 20_000_000)
    row = prospects()["local-smoke"]
    assert not row["runs"] and row["needs_gb"] > 0.02 and row["problems"][0]["kind"] == "memory"
    done = typed()
    assert done.exit_code == 1 and "local-smoke cannot run here" in done.stdout


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "LEAST_DISK", 1e18)
    done = typed()
    said = " ".join(done.stdout.split())
    assert done.exit_code == 1 and "make room, or set MODERN_LLM_RUNS to a folder" in said


def test_the_table_is_for_people():
    text = typed().stdout
    for said in ("python ", "torch ", "processor ", "not measured; 136 GFLOP/s", "SLURM ",
                 "attention   cpu: ", "MODERN_LLM_DATA is not set",
                 "\nlocal-smoke can run: modern-llm run"):
        assert said in text, text
    line, = (line for line in text.splitlines() if line.startswith("local-smoke  "))
    assert line.split()[1] == "yes" and "about" in line and "here" in line
    assert "\n* local-cpu, " in text or torch.cuda.is_available()
    assert text.count("not here: ") == 2 and max(map(len, text.splitlines())) <= 100


def test_speed_is_operations_over_time(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks) / 4)
    monkeypatch.setitem(machine.MATRIX, "cpu", 64)
    assert machine.product_speed("cpu", "float32") == pytest.approx(2 * 64**3 * 4)


def test_a_measured_speed_is_what_the_estimate_takes():
    config, start = get_pipeline_preset("local-smoke"), ASSUMED_START_MINUTES["cpu"]
    minutes = [estimate(config, "pretrain", machine.NOWHERE, None, peak=peak).minutes - start
               for peak in (None, CPU_FLOPS, 2 * CPU_FLOPS)]
    assert minutes[0] == minutes[1] == pytest.approx(2 * minutes[2])
    if not torch.cuda.is_available():  # local-smoke trains in fp32
        slow, fast, same = (machine.prospect("local-smoke", {"cpu": speeds})["minutes"]
                            for speeds in ({"float32": 1e11, "bfloat16": 1e12},
                                           {"float32": 1e12, "bfloat16": 1e12},
                                           {"float32": 1e11, "bfloat16": 1e13}))
        assert slow == same > fast > 0


def test_what_is_required_and_not_here(monkeypatch):
    wanted = ["numpy>=99", "torch>=2.9", "nothing-here>=1; extra == 'docs'",
              "tomli>=2; python_version < '3.0'"]
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    version = machine.version("numpy")
    assert machine.unmet() == [f"numpy>=99 ({version})"]
    assert machine.unmet("docs") == ["nothing-here>=1 (not installed)"]
    assert machine.unmet("dev") == []
    done = typed()
    said = " ".join(done.stdout.split())
    assert done.exit_code == 1 and f"required and not here: numpy>=99 ({version}): " in said


def test_it_works_without_torch(tmp_path):
    code = ("import sys; sys.modules['torch'] = None; from modern_llm.cli import main; "
            "main(['doctor'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "torch cannot be imported" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "local-smoke cannot run here" in done.stdout
