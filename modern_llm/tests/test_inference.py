"""The memory of a model that writes: measured in a process of its own, by its closed form, and
against a limit.
"""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import ModelConfig
from modern_llm.data import synth
from modern_llm.data.chat import CHAT_TEMPLATE, end_id
from modern_llm.data.tokens import save_tokenizer, train_tokenizer
from modern_llm.evaluation.inference import check_inference, current_rss, peak_rss, reset_peak_rss
from modern_llm.files import atomic_folder, read_json
from modern_llm.messages import StageError
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model

SMALL = ModelConfig(vocab_size=512, context_length=256, width=32, num_layers=1, num_heads=2,
                    num_kv_heads=1, ffn_width=64)
# 50M
LARGE = ModelConfig(vocab_size=512, context_length=512, width=768, num_layers=8, num_heads=12,
                    num_kv_heads=4, ffn_width=2048)


def saved(folder: Path, cfg: ModelConfig, chat: bool = True) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer((item.text for item, _ in zip(synth.documents(), range(300))), 512)
    with atomic_folder(folder) as temporary:
        save_model(temporary, ModernDecoderLM(cfg), eos_id=end_id(tokenizer) if chat else 0)
        save_tokenizer(tokenizer, temporary, CHAT_TEMPLATE if chat else None)
    return folder


# Each question to a fork of a process that has done nothing but import: what it takes is its own.
ASKED = """
import json, os, sys
import modern_llm.evaluation.inference
from modern_llm.cli import main
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        main(["check-inference", *words])
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"),
                    reason="reads the kernel's account of a process's memory")
def test_the_estimate_is_within_ten_percent_of_what_the_process_took(tmp_path):
    folder, tried = saved(tmp_path / "checkpoint", LARGE), (("fp32", 4, 24), ("bf16", 2, 2))
    asked = [["--checkpoint", f"{folder}", "--device", "cpu", "--count", f"{rows}",
              "--max-new-tokens", f"{tokens}", "--dtype", dtype, "--to", f"{dtype}.json"]
             for dtype, rows, tokens in tried]
    done = subprocess.run([sys.executable, "-c", ASKED, json.dumps(asked)], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert lines.count("0") == 2 == sum(line.startswith("ok: peak") for line in lines), lines
    for dtype, rows, _ in tried:
        found = read_json(tmp_path / f"{dtype}.json")
        assert found["ok"], found
        assert found["added_over_estimate"] == pytest.approx(1, abs=0.1), found
        assert found["added_gb"] < found["peak_gb"] < 12 and found["batch"] == rows
        # read from disk in float32 first
        assert ("loading" in found["estimate_gb"]) == (dtype == "bf16")


def test_too_little_memory_is_an_exit_code(tmp_path):
    saved(tmp_path / "checkpoint", SMALL)
    words = ["--limit-gb", "0.01", "--count", "2", "--max-new-tokens", "4", "--to",
             f"{tmp_path / 'mine.json'}", "--device", "cpu"]
    code, text = command("--checkpoint", f"{tmp_path / 'checkpoint'}", *words)
    assert (code == 1 and text.startswith("not ok: peak")
            and read_json(tmp_path / "mine.json")["ok"] is False)
    code, text = command("--checkpoint", f"{tmp_path / 'nothing'}")
    assert code == 2 and "Tried" in text and len(text.splitlines()) == 1


def command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["check-inference", *words])
    return done.exit_code, done.output


def test_base_models_and_short_contexts(tmp_path):
    found = check_inference(saved(tmp_path / "base", SMALL, chat=False), device="cpu", count=3,
                            batch=2, max_new_tokens=5)
    assert (found["ok"] and found["problems"]["exact match"]["n"] == 3
            and found["batch"] == 2 and found["sample"]["question"])
    assert (found["full_context_estimate_gb"] > found["estimate_gb"]["total"]
            and len(found["sha256"]) == 64)
    short = ModelConfig(**{**vars(SMALL), "context_length": 16})
    with pytest.raises(StageError, match=r"leaves room for an answer in a context of 16 tokens: "
                                         r"the shortest has \d+$"):
        check_inference(saved(tmp_path / "short", short), device="cpu", count=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"),
                    reason="reads the kernel's account of a process's memory")
def test_the_high_water_mark_sees_what_is_gone_again():
    reset_peak_rss()
    before = current_rss()
    assert peak_rss() < before + 20e6
    # of the system: an allocator might hand out what it has kept from other tests
    with mmap.mmap(-1, 100_000_000) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    assert peak_rss() > before + 95e6 and current_rss() < before + 20e6
    reset_peak_rss()
    assert peak_rss() < before + 20e6
