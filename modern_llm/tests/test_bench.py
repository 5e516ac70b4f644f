"""`modern-llm bench`: its lines on a tiny model, without what a borrowed GPU machine lacks."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.files import CHECKOUT
from modern_llm.messages import StageError
from modern_llm.training import bench
from modern_llm.training.bench_lines import KERNELS, Line, ladder, shape_for
from modern_llm.training.bench_measures import wait_for

# all but torch, numpy, safetensors, tokenizers, tqdm, click, pandas, matplotlib and what those need
MISSING = ("papermill", "nbdev", "fastcore", "execnb", "datasets", "pyarrow", "transformers",
           "seaborn", "psutil", "huggingface_hub", "jupyterlab", "IPython", "ipykernel", "nbformat",
           "scipy")
SCRIPT = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from modern_llm.cli import main
from modern_llm.training import bench

whole, wanted = bench.ladder, sys.argv[2:]
bench.ladder = lambda shape: [line for line in whole(shape) if line.name in wanted]
main(["bench", "--device", "cpu", "--to", sys.argv[1]])
"""
TRIED = ["matrix bf16", "step bf16", "step blocks compiled", "step Muon", "profile", "memory sft",
         "memory dpo", "memory verifier", "sampling 2 fp32", "training", "step fp16"]
if os.environ.get("MODERN_LLM_THOROUGH_TESTS"):  # further steps that are compiled, each in seconds
    TRIED[3:3] = ["step loss compiled"]
    TRIED[-2:] = ["step model compiled", "training", "step flash", "step fp16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a line of every kind leaves."""
    place = tmp_path_factory.mktemp("bench") / "cpu"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(place), *TRIED], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and f"{len(TRIED)} ok; {place}" in done.stdout, done
    return place


def test_every_kind_of_line_is_measured(folder):
    table = pd.read_csv(folder / "lines.csv").set_index("line")
    assert list(table.index) == TRIED and set(table.status) == {"ok"}
    assert table.tflops["matrix bf16"] > 0 and 0 < table.of_matrix["step bf16"] < 10
    assert (table.estimate_gb[["memory sft", "memory dpo", "memory verifier"]] > 0).all()
    assert table.tokens_per_s["sampling 2 fp32"] > 0
    assert table.floor["training"] < table.loss["training"] < 7
    assert (sorted(path.name for path in folder.iterdir())
            == ["bench.json", "kernels.csv", "lines.csv", "lines.jsonl", "memory.png",
                "sampling.png", "steps.png", "training.jsonl", "training.png"])
    summary = json.loads((folder / "bench.json").read_text())
    assert summary["machine"]["torch"] == torch.__version__ and len(summary["lines"]) == len(TRIED)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_differs_in_one_setting_from_the_line_it_names(device):
    lines = ladder(shape_for(torch.device(device)))
    names = [line.name for line in lines]
    assert len(set(names)) == len(names) and {line.kind for line in lines} == set(bench.MEASURES)
    settings = {line.name: line.settings for line in lines if line.kind == "step"}
    for line in lines:
        if line.kind == "step" and line.name != "step fp32":
            assert names.index(line.against) < names.index(line.name)
            assert len(line.settings.items() - settings[line.against].items()) == 1
    assert sum(line.seconds for line in lines) < 15 * 60
    kernels = {line.settings["attention"] for line in lines if line.kind == "step"}
    assert kernels == {"as trained", *(KERNELS if device == "cuda" else ["flash"])}


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda"])
def test_whatever_works_behind_the_host_is_waited_for(monkeypatch, name):
    waited = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(
        synchronize=lambda: waited.append(device.type)))
    wait_for(torch.device(name))
    assert waited == ([] if name == "cpu" else [name])


def few_lines(monkeypatch, **measures):
    """A bench of one line for each of these functions."""
    monkeypatch.setattr(bench, "ladder", lambda shape: [Line(name, name) for name in measures])
    for name, measure in measures.items():
        monkeypatch.setitem(bench.MEASURES, name, measure)


def test_what_fails_is_tried_again_and_what_is_there_is_not_measured_again(monkeypatch, tmp_path):
    calls = []

    def fine(*shape):
        calls.append("fine")
        return {"tokens_per_s": 5.0}

    def large(*shape):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words")

    def wrong(*shape):
        calls.append("wrong")
        raise RuntimeError("no kernel\nhere")

    def killed(*shape):
        calls.append("killed")
        if calls.count("killed") == 1:
            raise KeyboardInterrupt
        return {}

    few_lines(monkeypatch, large=large, fine=fine, wrong=wrong, killed=killed)
    with pytest.raises(KeyboardInterrupt):
        bench.bench("cpu", tmp_path, 1)
    rows = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["out of memory", "ok", "failed"]
    assert (rows[0]["why"], rows[2]["why"]) == ("CUDA out of memory",
                                                "RuntimeError: no kernel here")
    assert len(pd.read_csv(tmp_path / "lines.csv")) == 3
    with open(tmp_path / "lines.jsonl", "a") as file:
        file.write('{"line": "kil')  # torn
    again = bench.bench("cpu", tmp_path, 1, retry=False)  # as after a lost GPU
    assert [row["line"] for row in again] == ["large", "fine", "wrong", "killed"]
    assert calls == ["fine", "wrong", "killed", "killed"]
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 4
    monkeypatch.setitem(bench.MEASURES, "large", lambda *shape: {})
    again = bench.bench("cpu", tmp_path, 1)  # by its user
    assert {row["line"]: row["status"] for row in again} == {
        "fine": "ok", "killed": "ok", "large": "ok", "wrong": "failed"}
    assert calls == ["fine", "wrong", "killed", "killed", "wrong"]
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 4


def test_what_does_not_fit_into_the_minutes_is_named_and_measured_later(monkeypatch, tmp_path):
    few_lines(monkeypatch, fine=lambda *shape: {})
    said = CliRunner().invoke(main, ["bench", "--device", "cpu", "--to", str(tmp_path), "--minutes",
                                     "0"]).output
    assert "fine: left out: needs about 0.5 s" in said and "1 left out" in said
    [row] = bench.bench("cpu", tmp_path, 1)
    assert row["status"] == "ok" and len((tmp_path / "lines.jsonl").read_text().splitlines()) == 1


def test_lines_of_two_machines_are_not_mixed(monkeypatch, tmp_path):
    few_lines(monkeypatch, killed=lambda *shape: sys.exit(1))
    facts = {"device": "one", "threads": 8, "torch": "2.9"}
    monkeypatch.setattr(bench, "machine", lambda device: facts)
    with pytest.raises(SystemExit):
        bench.bench("cpu", tmp_path, 1)
    few_lines(monkeypatch, fine=lambda *shape: {})
    facts = facts | {"torch": "2.10"}  # none of its lines was known
    bench.bench("cpu", tmp_path, 1)
    for changed, words in (({"device": "another"}, "device one; here is device another"),
                           ({"threads": 1, "torch": "3"},
                            "threads 8, torch 2.10; here is threads 1, torch 3")):
        monkeypatch.setattr(bench, "machine", lambda device: facts | changed)
        with pytest.raises(StageError, match=f"was begun with {words}: name another folder"):
            bench.bench("cpu", tmp_path, 1)
    assert json.loads((tmp_path / "bench.json").read_text())["machine"] == facts


def test_a_lost_gpu_is_taken_up_by_another_process(monkeypatch, tmp_path):
    def breaking(*shape):
        calls.append("breaking")
        raise RuntimeError("illegal memory access")

    calls, started = [], []
    few_lines(monkeypatch, breaking=breaking, fine=lambda *shape: calls.append("fine") or {})
    monkeypatch.setattr(bench, "works", lambda device: calls[-1] != "breaking")
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words) or sys.exit(0))
    CliRunner().invoke(main, ["bench", "--device", "cpu", "--to", str(tmp_path)])
    [words] = started
    assert words[1] == "-c" and words[3:8] == ["bench", "--device", "cpu", "--to", str(tmp_path)]
    assert 7.5 < float(words[9]) <= 8 and len((tmp_path / "lines.jsonl").read_text()) > 10
    # what is started runs this package, whatever the working folder holds; and it comes to an end
    (tmp_path / "modern_llm.py").write_text("raise SystemExit('another package')")
    done = subprocess.run([*words[:3], "bench", "--help"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "Usage: modern-llm bench" in done.stdout, done
    assert "1 failed, 1 ok" in CliRunner().invoke(main, words[3:]).output
    assert calls == ["breaking", "fine"] and len(started) == 1


@pytest.mark.thorough
def test_two_checkouts_take_turns(tmp_path):
    """This one against itself does the same; what is no checkout is refused."""
    words = [sys.executable, CHECKOUT / "scripts" / "step_ratio.py"]
    small = ["--preset", "lesson", "--steps", "3", "--document", "9"]
    done = subprocess.run([*words, CHECKOUT, *small], capture_output=True, text=True, check=True)
    assert re.search(r"lesson pretrain 9 0 0 1: \d\.\d\d \[.*3 steps; .* 0\.0e\+00 apart",
                     done.stdout)
    done = subprocess.run([*words, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and f"{tmp_path} is no checkout" in done.stderr
