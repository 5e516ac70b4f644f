"""Does a model fit a small machine? Load it, let it answer word problems, and hold the memory it
took against a limit.

What `modern-llm check-inference` does. On a CPU it counts the resident memory of this process (the
kernel's high-water mark), on a GPU what torch reserved; beside it stands the closed form of chapter
11 for the same batch.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

import torch

from modern_llm.config import ModelConfig
from modern_llm.data.chat import (
    continuations, document_prompt, encode_prompt, end_id, is_chat_model,
)
from modern_llm.data.tasks import mark, problem_request, word_problems
from modern_llm.data.tokens import end_of_text_id, load_tokenizer
from modern_llm.files import read_json, write_json
from modern_llm.interchange.hub import weights_digest
from modern_llm.messages import StageError
from modern_llm.models.counts import inference_memory, parameter_count
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.saving import load_model, save_model
from modern_llm.statistics import mean_interval
from modern_llm.training.training_state import pick_device

GB = 10**9
LIMIT_GB = 12.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def current_rss() -> int:
    """Bytes of main memory that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """The most bytes of main memory this process ever held, or held since `reset_peak_rss` where
    the system can forget.
    """
    # the kernel's mark of this program; the one of getrusage may be the parent's, from before the
    # program was loaded
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak_rss() -> None:
    """Set the high-water mark back to what is held now (Linux; elsewhere it stays)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def warm_up(device: torch.device) -> None:
    """Save, load and ask a tiny model: the libraries, threads and kernels that any model needs are
    there before anything is counted.
    """
    tiny = ModernDecoderLM(ModelConfig(vocab_size=64, context_length=32, width=32, num_layers=1,
                                       num_heads=2, num_kv_heads=1, ffn_width=64))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, tiny)
        generate(load_model(folder, device), [[1, 2, 3], [4]], max_new_tokens=4)


def check_inference(folder: Path, *, device: str = "auto", dtype: str | None = None,
                    limit_gb: float = LIMIT_GB, batch: int = 8, count: int = 16,
                    problems: str = "synthetic", max_new_tokens: int = 128) -> dict:
    """Load a checkpoint, let it answer word problems greedily, and compare the peak of memory with
    a limit and with the estimate.

    Args:
        folder: a checkpoint folder.
        device: "cpu", "cuda", "mps" or "auto".
        dtype: of the weights: "fp32", "bf16", "fp16"; None keeps what is on disk.
        limit_gb: gigabytes (10**9 bytes) that the whole process may take.
        batch: problems answered at once.
        count: how many problems.
        problems: "synthetic", or a data set of problems.
        max_new_tokens: of an answer.

    Returns:
        What goes into inference_ok.json: `ok`, the peak, what the model added above the process
        before it, the estimate of that by part and their ratio, the estimate at full context, the
        share of right answers with its interval, a sample.

    Raises:
        StageError: no problem leaves room for an answer in the model's context.
    """
    where, began = pick_device(device), time.perf_counter()
    warm_up(where)
    gpu = where.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
    reset_peak_rss()
    before = torch.cuda.memory_reserved(where) if gpu else current_rss()
    model, tokenizer = load_model(folder, where, DTYPES.get(dtype)).eval(), load_tokenizer(folder)
    asked, chat = word_problems(problems, "test", count), is_chat_model(folder, tokenizer)
    room = model.cfg.context_length - 1
    prompts = [encode_prompt(tokenizer, problem_request(problem)) if chat
               else document_prompt(tokenizer, [], f"Question: {problem.question}\nAnswer:", room)
               for problem in asked]
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) < room]
    if not kept:
        raise StageError(f"{folder}: no problem of {problems} leaves room for an answer in a "
                         f"context of {model.cfg.context_length} tokens: "
                         + (f"the shortest has {min(map(len, prompts))}" if problems == "synthetic"
                            else "say --problems synthetic for shorter ones"))
    asked, prompts = [asked[i] for i in kept], [prompts[i] for i in kept]
    answers = continuations(model, tokenizer, prompts,
                            end_id(tokenizer) if chat else end_of_text_id(tokenizer),
                            max_new_tokens=max_new_tokens, batch_rows=batch)
    peak = torch.cuda.max_memory_reserved(where) if gpu else peak_rss()
    marked, bytes_per_value = mark(asked, answers), model.embed_tokens.weight.element_size()
    longest = max(map(len, prompts))
    written = min(longest + max_new_tokens, model.cfg.context_length)
    estimate = inference_memory(model.cfg, min(batch, len(prompts)), written, bytes_per_value,
                                prompt=longest)
    whole = inference_memory(model.cfg, batch, None, bytes_per_value)["total"]
    on_disk = getattr(torch, read_json(folder / "config.json")["dtype"])
    if on_disk.itemsize != bytes_per_value:  # while they are converted, the weights are there twice
        estimate["loading"] = (estimate["weights"]
                               + parameter_count(model.cfg)["total"] * on_disk.itemsize)
    expected = max(estimate["total"], estimate.get("loading", 0))
    return {
        "ok": peak <= limit_gb * GB and bool(marked.tokens.gt(0).all()), "limit_gb": limit_gb,
        "peak_gb": peak / GB, "added_gb": (peak - before) / GB,
        "estimate_gb": {part: size / GB for part, size in estimate.items()},
        "added_over_estimate": (peak - before) / expected, "full_context_estimate_gb": whole / GB,
        "measured": "memory reserved by torch on the GPU" if gpu
                    else "resident memory of the process; added: above that after imports",
        "device": torch.cuda.get_device_name(where) if gpu else str(where),
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "parameters": parameter_count(model.cfg)["total"],
        "checkpoint": f"{folder.parent.name}/{folder.name}",
        "sha256": weights_digest(folder), "batch": min(batch, len(prompts)),
        "longest_prompt": longest, "max_new_tokens": max_new_tokens,
        "problems": {"source": problems, "exact match": mean_interval(marked.right.astype(float))},
        "sample": {"question": asked[0].question, "answer": answers[0].text},
        "seconds": round(time.perf_counter() - began, 1)}


def write_check(folder: Path, target: Path | None, **options) -> tuple[dict, Path]:
    """`check_inference`, written to `target`, or to inference_ok.json beside a checkpoint of a run,
    else in the working folder.
    """
    beside = folder.parent if (folder.parent / "params.json").is_file() else Path.cwd()
    path = Path(os.path.expanduser(target or beside / "inference_ok.json"))
    # said before the work, not after it
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise StageError(f"{path} cannot be written: it is a folder, or there is none around it "
                         "that you may write to; name a file with --to")
    found = check_inference(folder, **options)
    try:
        return found, write_json(path, found)
    except OSError as error:
        raise StageError(f"{path} cannot be written: {error.strerror or error}; name another file "
                         "with --to") from error
