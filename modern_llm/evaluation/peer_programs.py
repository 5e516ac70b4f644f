"""The programs that `modern-llm bench --peers` compares outside of training: generation,
tokenisation, start-up, two ranks against two threads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from modern_llm.config import ModelConfig, TrainConfig
from modern_llm.data import synth
from modern_llm.data.reading import documents
from modern_llm.data.sources import mirror_root
from modern_llm.data.tokens import save_tokenizer, train_tokenizer
from modern_llm.evaluation.peer_training import CPU, Bench, llama_of, our_step, random_batch
from modern_llm.evaluation.peers import take_turns
from modern_llm.models.counts import flops_per_token, parameter_count
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.training.distributed import World, data_parallel
from modern_llm.training.optim import lm_loss
from modern_llm.training.train_step import optimizer_step
from modern_llm.training.training_state import TrainingState


def has_data(name: str) -> bool:
    """Whether the mirror has a data set."""
    root = mirror_root()
    return bool(root and (root / name).is_dir())


def compare_generation(bench: Bench, shape: str, rows: int, new_tokens: int) -> dict:
    """Greedy continuations of prompts of 32 tokens, the same on both sides."""
    cfg = bench.shapes[shape]
    torch.manual_seed(0)
    model = ModernDecoderLM(cfg).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large weights: the likeliest token is no tie
            nn.init.normal_(parameter, std=0.1)
    theirs = llama_of(model).model.eval()
    prompts = random_batch(replace(cfg, context_length=32), rows)["input_ids"]
    mask = torch.ones_like(prompts)
    settings = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                    pad_token_id=0)
    theirs.generation_config.eos_token_id = None
    answers = {}

    def our_answers() -> None:
        answers["ours"] = generate(model, prompts.tolist(), max_new_tokens=new_tokens,
                                   temperature=0)

    @torch.inference_mode()
    def their_answers() -> None:
        written = theirs.generate(prompts, attention_mask=mask, **settings)
        answers["peer"] = written[:, 32:].tolist()

    found = take_turns(our_answers, their_answers, **bench.turns)
    same = sum(a == b for a, b in zip(answers["ours"], answers["peer"])) / rows
    if same < 0.9:  # sums are added in another order: a near tie may fall the other way
        raise ValueError(f"only {same:.0%} of the answers are the same")
    # every new token reads every weight once: a single product with as many weights and rows
    side = round(parameter_count(cfg)["total"] ** 0.5)
    wide, few = torch.randn(side, side), torch.randn(rows, side)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        few @ wide
        times.append(time.perf_counter() - started)
    least = (min(times) * new_tokens
             + 32 * rows * flops_per_token(cfg) / 3 / bench.peaks["fp32"])
    return {**found, "unit": "tokens", "units": rows * new_tokens,
            "checked": f"{same:.0%} of the answers token for token",
            "limit": "one product with all weights for each token", "ours_settings": "fp32, cache",
            "peer_settings": "fp32, sdpa, its default cache",
            "ours_of_limit": least / found["ours_s"], "peer_of_limit": least / found["peer_s"]}


OUR_TOKENS = """
import sys
from modern_llm.data.corpus import build_token_cache
from modern_llm.data.tokens import load_tokenizer
source, tokenizer, out = sys.argv[1:]
print(len(build_token_cache(source, "train", load_tokenizer(tokenizer), cache_dir=out,
                            progress=False)))
"""
TOKENIZERS = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
source, tokenizer, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer + "/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(source, encoding="utf-8")]
found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
np.concatenate([np.array(one.ids, dtype=np.uint16) for one in found]).tofile(out + "/ids.bin")
print(len(found))
"""
DATASETS_MAP = """
import sys
from datasets import disable_progress_bars, load_dataset
from tokenizers import Tokenizer
source, tokenizer, out = sys.argv[1:]
disable_progress_bars()
tokenizer = Tokenizer.from_file(tokenizer + "/tokenizer.json")
encode = lambda rows: {"ids": [one.ids for one in tokenizer.encode_batch_fast(
    rows["text"], add_special_tokens=False)]}
data = load_dataset("json", data_files=source, split="train", cache_dir=out)
print(len(data.map(encode, batched=True, remove_columns=["text"])))
"""
PEAK = """
import pathlib
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(*[line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line])
"""


def compare_tokens(bench: Bench, peer: str, megabytes: float) -> dict:
    """A file of JSON lines to token ids on disk, by fresh processes, whose start is part of the
    time and whose whole memory is counted.
    """
    code = {"tokenizers": TOKENIZERS, "datasets.map": DATASETS_MAP}[peer]
    with tempfile.TemporaryDirectory() as place:
        folder, size = Path(place), 0
        texts = documents("tinystories", "train") if has_data("tinystories") else (
            document.text for _, document in synth.documents())
        texts = list(islice(texts, 20_000))
        save_tokenizer(train_tokenizer(texts[:2000], 4096), folder)
        with open(folder / "source.jsonl", "w", encoding="utf-8") as file:
            while size < megabytes * 1e6:  # each pass with other words, so that no row repeats
                for text in texts:
                    size += file.write(json.dumps({"text": f"{size} {text}"}) + "\n")
                    if size >= megabytes * 1e6:
                        break
        peaks: dict[str, list[float]] = {"ours": [], "peer": []}  # GB, start-up included

        def run(name: str, code: str) -> None:
            with tempfile.TemporaryDirectory() as out:
                done = subprocess.run(
                    [sys.executable, "-c", code + PEAK, str(folder / "source.jsonl"), place, out],
                    capture_output=True, text=True, check=True,
                    env={**os.environ, "MODERN_LLM_CACHE": out, "HF_DATASETS_OFFLINE": "1"})
            peaks[name] += [int(word) * 1024 / 1e9 for word in done.stdout.split()[1:2]]

        found = take_turns(partial(run, "ours", OUR_TOKENS), partial(run, "peer", code),
                           **{**bench.turns, "pairs": 2 if bench.quick else 3})
    return {**found, "unit": "MB", "units": megabytes, "ours_settings": "token cache, streamed",
            "peer_settings": ("one encode_batch of all" if peer == "tokenizers"
                              else "batched=True"),
            **{f"{name}_gb": max(values, default=None) for name, values in peaks.items()}}


def compare_start(bench: Bench, ours: list[str], theirs: list[str]) -> dict:
    """How long a command takes that does next to nothing, beside another's; the limit is that of
    an empty Python program.
    """
    program = shutil.which(theirs[0], path=str(Path(sys.executable).parent)) or sys.executable
    run = lambda *words: subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL)
    found = take_turns(lambda: run(sys.executable, "-m", "modern_llm.cli", *ours),
                       lambda: run(program, *theirs[1:]), pairs=3)
    empty = take_turns(lambda: run(sys.executable, "-c", "pass"), lambda: None)["ours_s"]
    return {**found, "unit": "starts", "units": 1, "limit": "python -c pass",
            "ours_of_limit": empty / found["ours_s"], "peer_of_limit": empty / found["peer_s"],
            "ours_settings": " ".join(["modern-llm", *ours]), "peer_settings": " ".join(theirs)}


def ranks_in_turns(world: World, shape: ModelConfig, rows: int, pairs: int) -> dict | None:
    """Two ranks of one thread each against one process with as many threads, on the same batch."""
    train = TrainConfig(optimizer="adamw", lr=1e-4, batch_size=rows, precision="fp32")
    world.join(CPU)
    torch.manual_seed(0)
    model = ModernDecoderLM(shape)
    loss = data_parallel(model, lm_loss, world, CPU)
    state, batch = TrainingState(model, train, CPU), random_batch(shape, rows)
    mine = world.shard(batch)
    alone = our_step(shape, rows) if world.is_main_process else None

    def together() -> None:
        torch.set_num_threads(1)
        optimizer_step(state, loss, mine, train, 1.0, world)

    def single() -> None:
        if alone:
            torch.set_num_threads(world.size)
            alone()
        world.all_reduce_max(0)  # the others wait

    return take_turns(together, single, pairs=pairs)


RANKS = """
import json, sys
from functools import partial
from modern_llm.config import ModelConfig
from modern_llm.evaluation.peer_programs import ranks_in_turns
from modern_llm.training.distributed import on_ranks
shape, rows, pairs, size = json.loads(sys.argv[1])
found, *_ = on_ranks(partial(ranks_in_turns, shape=ModelConfig(**shape), rows=rows, pairs=pairs),
                     size)
if isinstance(found, Exception):
    raise found
print(json.dumps(found))
"""


def compare_ranks(bench: Bench, shape: str, rows: int) -> dict:
    """Ranks against threads, in a process of its own, which no threads have been in before."""
    cfg = bench.shapes[shape]
    done = subprocess.run([sys.executable, "-c", RANKS, json.dumps([vars(cfg), rows, 5, 2])],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-200:])
    tokens = rows * cfg.context_length
    return {**json.loads(done.stdout.splitlines()[-1]), "unit": "tokens", "units": tokens,
            "cpu_ratio": None, "ours_settings": "2 ranks of 1 thread, DDP",
            "peer_settings": "1 process, 2 threads", "checked": "the same batch"}
