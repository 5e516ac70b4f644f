"""GGUF files: read back by their own package, by transformers and by llama.cpp."""

import itertools
import json
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers

from modern_llm.cli import main
from modern_llm.config import ModelConfig
from modern_llm.data.chat import encode_prompt, end_id
from modern_llm.data.tasks import word_problems
from modern_llm.data.tokens import end_of_text_id, load_tokenizer, train_tokenizer
from modern_llm.interchange.export import ExportError
from modern_llm.interchange.gguf_export import export_gguf, ggml_name, pairs_side_by_side
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.saving import load_model
from modern_llm.training.sft import save_chat_model

SHAPES = {"llama": {"use_qk_norm": False},
          "qwen3": {"use_qk_norm": True, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128},
          "llama, own head": {"use_qk_norm": False, "tie_embeddings": False, "head_dim": 32},
          "qwen3, small heads": {"use_qk_norm": True}}
QUESTION = "Tom has 3 hats and buys 4 hats. How many hats?"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of each shape; every weight matters, and the most likely token is far ahead."""
    texts = [f"{problem.question} {problem.answer}"
             for problem in word_problems("synthetic", "train", 200)]
    tokenizer, found = train_tokenizer(texts, 384), {}
    for name, changes in SHAPES.items():
        torch.manual_seed(0)
        cfg = ModelConfig(**{"vocab_size": 400, "context_length": 96, "width": 64, "num_layers": 2,
                             "num_heads": 4, "num_kv_heads": 2, "ffn_width": 96, **changes})
        model = ModernDecoderLM(cfg)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else (
                torch.nn.init.uniform_(parameter, 0.5, 1.5))
        found[name] = tmp_path_factory.mktemp("run") / "sft" / "checkpoint"
        found[name].mkdir(parents=True)
        save_chat_model(found[name], model, tokenizer)
    return found


def greedy(folder, count=24):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, QUESTION)
    return prompt, generate(model, [prompt], max_new_tokens=count, temperature=0,
                            eos_id=end_id(tokenizer))[0]


def test_names_and_rows():
    assert ggml_name("model.layers.7.self_attn.k_norm.weight") == "blk.7.attn_k_norm.weight"
    assert ggml_name("model.embed_tokens.weight") == "token_embd.weight"
    rows = np.arange(8)[:, None]  # two heads of four channels
    assert pairs_side_by_side(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("shape", list(SHAPES)[:3])  # it takes every Qwen3's heads to be 128 wide
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8_0"])
def test_transformers_reads_the_same_logits(checkpoints, tmp_path, shape, dtype):
    transformers = pytest.importorskip("transformers", reason="pip install 'modern_llm[baselines]'")
    pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    path = export_gguf(checkpoints[shape], tmp_path / "model.gguf", dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([greedy(checkpoints[shape])[0]])
    with torch.no_grad():
        ours, other = load_model(checkpoints[shape])(ids), theirs(ids).logits
    apart = (ours - other).norm() / ours.norm()
    assert apart < {"fp32": 1e-5, "fp16": 5e-3, "q8_0": 0.1}[dtype]
    assert dtype == "fp32" or apart > 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_cuts_and_writes_the_same(checkpoints, tmp_path, shape):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install xllamacpp")
    pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    folder = checkpoints[shape]
    params = llama.CommonParams()
    params.model.path = str(export_gguf(folder, tmp_path / "model.gguf", "fp32"))
    params.n_ctx, params.n_gpu_layers, params.warmup = 96, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = llama.Server(params)
    tokenizer = load_tokenizer(folder)
    texts = ["17 and 170 hats.\n#### 187", " It's  3+4=<<3+4=7>>7\tkeys", "naïve 日本 🙂", QUESTION]

    def ask(what, **words):
        request = Request(f"{server.listening_address}/{what}", json.dumps(words).encode(),
                          {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)

    for text in texts:
        found = ask("tokenize", content=text, parse_special=False)["tokens"]
        assert found == tokenizer.encode(text, add_special_tokens=False).ids
    prompt, expected = greedy(folder)
    found = ask("completion", prompt=prompt, n_predict=24, temperature=0, return_tokens=True)
    ends = {end_id(tokenizer), end_of_text_id(tokenizer)}  # llama.cpp knows both by their names
    ours, theirs = (list(itertools.takewhile(lambda i: i not in ends, tokens))
                    for tokens in (expected, found["tokens"]))
    assert theirs == ours and len(ours) > 3


def test_what_is_refused(checkpoints, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    there = tmp_path / "there.gguf"
    there.write_text("mine")
    ask = lambda *words: CliRunner().invoke(main, ["export", *map(str, words)])
    source = checkpoints["llama"]
    for words, said in (
        (("--to", there), "never overwritten"),
        (("--to", tmp_path / "x.gguf", "--dtype", "q4"), "none of fp32, fp16, bf16, q8_0"),
        (("--to", tmp_path / "no" / "x.gguf"), "cannot be written")):
        done = ask("--checkpoint", source, *words)
        assert done.exit_code == 2 and said in done.output, done.output
    assert there.read_text() == "mine" and list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("changes, said", [
    ({"num_experts": 4}, "experts"), ({"use_attention_sinks": True}, "learned sinks"),
    ({"sliding_window": 16}, "a window"),
    ({"rope_factor": 2.0, "rope_scaling": "yarn", "rope_trained_context": 48}, "a stretched")])
def test_models_that_llama_cpp_would_misread_are_refused(checkpoints, tmp_path, changes, said):
    pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    cfg = ModelConfig(vocab_size=400, context_length=96, width=32, num_layers=1, num_heads=2,
                      num_kv_heads=1, ffn_width=64, use_qk_norm=False, **changes)
    save_chat_model(tmp_path, ModernDecoderLM(cfg), load_tokenizer(checkpoints["llama"]))
    with pytest.raises(ExportError, match=f"{said}.*Hugging Face folder"):
        export_gguf(tmp_path, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(checkpoints, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    torch.manual_seed(0)
    save_chat_model(tmp_path, load_model(checkpoints["llama"]),
                    load_tokenizer(checkpoints["llama"]))
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match="cuts texts by Whitespace before BPE"):
        export_gguf(tmp_path, tmp_path / "x.gguf")
