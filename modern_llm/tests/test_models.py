"""Models, counts and generation: the edge cases that their chapters do not show."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modern_llm.config import PRESETS, ConfigError, ModelConfig, TrainConfig
from modern_llm.files import DamagedFolder, atomic_folder
from modern_llm.models import counts
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import Sampling, generate, next_token_probabilities, stream
from modern_llm.models.saving import load_model, save_model
from modern_llm.models.streams import StreamCache

CFG = ModelConfig(vocab_size=64, context_length=32, width=32, num_layers=2, num_heads=4,
                  num_kv_heads=2, ffn_width=64, zero_init_outputs=False, init_std=0.3)
VARIANTS = {
    "sinks": replace(CFG, use_attention_sinks=True),
    "experts": replace(CFG, num_experts=4, use_qk_norm=False),
    "dropout": replace(CFG, dropout=0.2),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ModernDecoderLM(CFG)


@pytest.fixture
def checkpoint(model, tmp_path):
    with atomic_folder(tmp_path / "checkpoint") as folder:
        save_model(folder, model, eos_id=0)
    return tmp_path / "checkpoint"


def test_counts_and_generation_import_alone():
    code = ("import sys, modern_llm.models.counts; assert 'torch' not in sys.modules; import "
            "modern_llm.models.generation")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_aux_loss_comes_from_every_layer():
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 16))
    one, two = (ModernDecoderLM(replace(VARIANTS["experts"], num_layers=n)).hidden(ids)[1]
                for n in (1, 2))
    assert two.item() > 1.5 * one.item() > 0
    assert ModernDecoderLM(CFG).hidden(ids)[1].item() == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = ModernDecoderLM(VARIANTS[name])
        model.gradient_checkpointing = checkpointed
        hidden, aux = model.hidden(torch.arange(32).view(2, 16))
        (hidden.square().sum() + aux).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("preset", ["local-smoke", "tacc-h100"])
def test_init_scales(preset):
    cfg = replace(PRESETS[preset]().model, num_layers=1, vocab_size=512)
    model = ModernDecoderLM(cfg)
    assert all(p.abs().max() == 0 for n, p in model.named_parameters()
               if n.endswith(("o_proj.weight", "down_proj.weight")))
    assert abs(model.embed_tokens.weight.std().item() / cfg.init_std - 1) < 0.05
    assert 0 < model.norm.weight[0] <= 1


def test_load_names_the_paths_it_tried(tmp_path):
    with pytest.raises(FileNotFoundError, match="tried .*nowhere.*nowhere.previous"):
        load_model(tmp_path / "nowhere")


def test_load_after_a_kill_between_renames(checkpoint, model):
    checkpoint.rename(checkpoint.with_name("checkpoint.previous"))
    assert torch.equal(load_model(checkpoint).norm.weight, model.norm.weight)


def test_flipped_bit_is_noticed(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedFolder, match="model.safetensors.*sha256"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", "half"])
def test_bad_weights_without_meta(checkpoint, content):
    (checkpoint / "meta.json").unlink()
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000] if content == "half" else content)
    with pytest.raises(DamagedFolder, match="truncated or damaged"):
        load_model(checkpoint)


def test_missing_weights_and_bad_config(checkpoint):
    (checkpoint / "meta.json").unlink()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(DamagedFolder, match="config.json is not JSON"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text(
        '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text('{"modern_llm": {"widht": 3}}')
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "field, value", [("vocab_size", 128), ("ffn_width", 96), ("num_kv_heads", 4), ("num_layers", 3),
                     ("num_layers", 1), ("use_qk_norm", False), ("use_attention_sinks", True),
                     ("num_experts", 4), ("tie_embeddings", False), ("width", 64)])
def test_weights_of_another_shape_name_the_field(checkpoint, field, value):
    (checkpoint / "meta.json").unlink()
    values = json.loads((checkpoint / "config.json").read_text())
    values["modern_llm"][field] = value
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"compare .*{field}"):
        load_model(checkpoint)


def test_dtype_and_second_save(checkpoint, model, tmp_path):
    half = load_model(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.embed_tokens.weight
    save_model(tmp_path, half)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).norm.weight.dtype == torch.bfloat16
    assert len(generate(half, [[1, 2], [3]], max_new_tokens=3)[1]) == 3


def test_loaded_weights_do_not_share_the_file(checkpoint):
    model, before = load_model(checkpoint), (checkpoint / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert load_model(checkpoint).embed_tokens.weight.abs().sum() > 0
    assert all(p.requires_grad for p in model.parameters())


def test_surplus_tensor(checkpoint):
    (checkpoint / "meta.json").unlink()
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(2, 32)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="'score.weight'.*absent"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "options, message",
    [({"temperature": -1}, "temperature=-1"), ({"top_k": 0}, "top_k=0"), ({"top_p": 0}, "top_p=0"),
     ({"min_p": 2}, "min_p=2"), ({"repetition_penalty": 0}, "repetition_penalty=0"),
     ({"stop": [[]]}, "stop="), ({"max_new_tokens": -1}, "max_new_tokens=-1")])
def test_settings_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1]], **{"max_new_tokens": 2, **options})
    with pytest.raises(ValueError, match=message):
        stream(model, [1], **{"max_new_tokens": 2, **options})


def test_empty_requests(model):
    assert generate(model, [], max_new_tokens=3) == []
    assert generate(model, [[1], [2, 3]], max_new_tokens=0) == [[], []]
    with pytest.raises(TypeError, match="max_tokens"):
        generate(model, [[1]], max_tokens=3)


def test_mode_and_gradients_are_restored(model):
    parts = stream(model, [1], max_new_tokens=5)
    next(parts)
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    parts.close()
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.embed_tokens.weight.grad is not None


def test_on_token_sees_exactly_the_answer(model):
    plain = generate(model, [[1], [2]], max_new_tokens=10, seed=3)
    stop = [plain[0][3:6]]
    heard = [[], []]
    answers = generate(model, [[1], [2]], max_new_tokens=10, seed=3, stop=stop,
                       on_token=lambda r, t: heard[r].append(t))
    assert heard == answers and len(answers[0]) <= 3 and answers[0] == plain[0][: len(answers[0])]


def test_unfinished_stop_sequence_is_shown_at_the_end(model):
    plain = generate(model, [[1]], max_new_tokens=4, temperature=0)[0]
    assert generate(model, [[1]], max_new_tokens=4, temperature=0,
                    stop=[[plain[3], 63, 62]])[0] == plain


def test_padding_is_not_counted_as_seen(model):
    options = dict(max_new_tokens=5, temperature=0, repetition_penalty=1.7)
    together = generate(model, [[1, 2, 3, 4], [5]], **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in ([1, 2, 3, 4], [5])]


def test_filters_keep_at_least_one_token():
    logits = torch.tensor([[0.0, 50.0, 0.0, 0.0]])
    for options in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-6}):
        p = next_token_probabilities(logits, Sampling(1, **options))
        assert p.argmax() == 1 and torch.isclose(p.sum(), torch.tensor(1.0))


def test_training_memory_moves_the_right_way():
    cfg, train = PRESETS["tacc-h100"]().model, TrainConfig(batch_size=32)
    total = lambda cfg=cfg, **changes: counts.training_memory(cfg,
                                                              replace(train, **changes))["total"]
    assert (total(gradient_checkpointing=True) < total()
            < total(optimizer="adamw") < total(optimizer="adamw", ema_decay=0.99))
    assert total(micro_batch_size=8) < total() < total(precision="fp32")
    assert counts.flops_per_token(cfg, context=2048) > counts.flops_per_token(cfg)
    assert (counts.flops_per_token(replace(cfg, sliding_window=64), 2048)
            == counts.flops_per_token(replace(cfg, sliding_window=64)))


# ---- streams -------------------------------------------------------------------------------------


@given(kept=st.integers(0, 5), window=st.integers(1, 9), layers=st.integers(1, 2),
       pieces=st.lists(st.integers(1, 9), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_stream_reads_the_first_and_the_last(kept, window, layers, pieces):
    """Whatever pieces it comes in: positions stay in the cache, and of one layer the last token's
    logits are those of the kept tokens and its window alone.
    """
    cfg = ModelConfig(vocab_size=32, context_length=16, width=16, num_layers=layers, num_heads=2,
                      num_kv_heads=1, ffn_width=16, zero_init_outputs=False, init_std=0.3)
    torch.manual_seed(0)
    model, cache = ModernDecoderLM(cfg).eval(), StreamCache(cfg, 1, kept, window)
    pieces = [min(piece, window) for piece in pieces]
    ids = torch.randint(0, 32, (1, sum(pieces)))
    with torch.inference_mode():
        for part in ids.split(pieces, dim=1):
            logits = model(part, cache=cache)[0, -1]
            assert cache.length <= kept + window and cache.end <= kept + 2 * window
        if layers > 1:
            return
        n = ids.shape[1]
        seen = ids if n <= kept + window else torch.cat(
            [ids[:, :kept], ids[:, n - (cache.end - cache.begin):]], dim=1)
        torch.testing.assert_close(logits, model(seen)[0, -1], rtol=1e-3, atol=1e-4)


def test_a_stream_refuses_what_it_cannot_hold():
    cfg = ModelConfig(vocab_size=32, context_length=16, width=16, num_layers=1, num_heads=2,
                      num_kv_heads=1, ffn_width=16)
    for kept, window in ((-1, 4), (4, 0), (4, 13)):
        with pytest.raises(ValueError, match=f"kept={kept} and window={window} must be"):
            StreamCache(cfg, 1, kept, window)
    model = ModernDecoderLM(cfg)
    with pytest.raises(ValueError, match="13 tokens at once are more than its window of 12"):
        model(torch.zeros(1, 13, dtype=torch.long), cache=StreamCache(cfg, 1))
    with pytest.raises(ValueError, match="prompt 1 has 2 tokens and prompt 0 1; with streaming"):
        generate(model, [[1], [1, 2]], max_new_tokens=2, streaming=True)
    several = generate(model, [[1, 2, 3]], max_new_tokens=40, samples=3, streaming=True, seed=2)
    alone = generate(model, [[1, 2, 3]] * 3, max_new_tokens=40, streaming=True, seed=2)
    assert several == alone and all(len(row) == 40 for row in several)
