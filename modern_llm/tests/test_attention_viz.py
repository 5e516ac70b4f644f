"""Attention pictures: weights, the tokens of the examples, and what the observations may say."""

import math
import string

import pandas as pd
import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.data.tokens import end_of_text_id, train_tokenizer
from modern_llm.evaluation.attention import (
    ROLES, attention_maps, examples, head_role, head_table, induction_attention, key_table,
    observations, planted_repetition, repetition_gain, row_measures, tokenise_example,
    without_head,
)
from modern_llm.evaluation.attention_figures import heads_figure, maps_figure
from modern_llm.figures import small_png
from modern_llm.models.decoder import ModernDecoderLM


def made() -> ModernDecoderLM:
    torch.manual_seed(1)
    return ModernDecoderLM(
        ModelConfig(vocab_size=128, context_length=64, width=32, num_layers=2, ffn_width=32,
                    init_std=0.5, zero_init_outputs=False))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [string.printable * 2, *(example.text for example in examples(True))], 512)


def test_half_precision_is_close_enough_not_to_be_refused():
    maps = attention_maps(made().to(torch.bfloat16), torch.arange(12)[None])
    assert maps.dtype == torch.float32 and (maps.sum(-1) - 1).abs().max() < 1e-2


def test_hooks_are_removed_after_a_refusal():
    model = made()
    model.layers[0].self_attn.register_forward_hook(lambda layer, inputs, output: output + 1)
    with pytest.raises(ValueError, match="rebuild the layer's output only"):
        attention_maps(model, torch.arange(6)[None])
    assert sum(len(block.self_attn._forward_hooks) for block in model.layers) == 1


def test_a_learned_sink_counts_as_sink_and_as_a_choice():
    t, share = 6, 0.25
    even = torch.ones(t, t).tril() / torch.arange(1, t + 1)[:, None]
    measures = row_measures(even[None, None] * (1 - share))
    assert torch.allclose(measures["sink"], measures["first"] + share)
    row = torch.tensor([share, *[(1 - share) / 3] * 3])
    assert math.isclose(measures["entropy"][0, 0, 0].item(),
                        -(row * row.log()).sum().item(), rel_tol=1e-5)
    assert measures["evenness"].max() <= 1
    with pytest.raises(ValueError, match="no third query"):
        row_measures(even[None, None, :2, :2])


def test_planted_repetition():
    planted, control = planted_repetition(range(10, 50), 8, 5, start_id=3, seed=1)
    assert planted.shape == control.shape == (5, 17) and (planted[:, 0] == 3).all()
    assert (torch.equal(planted[:, 1:9], planted[:, 9:])
            and torch.equal(planted[:, :9], control[:, :9]))
    assert all(len(set(row[1:].tolist())) == 16 for row in control)
    assert torch.equal(planted, planted_repetition(range(10, 50), 8, 5, start_id=3, seed=1)[0])
    perfect = torch.zeros(1, 1, 1, 17, 17)
    for i in range(8):  # query of token i's second occurrence, key behind its first one
        perfect[..., 9 + i, 2 + i] = 1
    assert induction_attention(perfect).item() == 1
    with pytest.raises(ValueError, match="too few"):
        planted_repetition(range(10), 8, 5, start_id=3)


@pytest.mark.parametrize("built_in", [True, False])
def test_examples_in_tokens(tokenizer, built_in):
    for example in examples(built_in):
        item = tokenise_example(tokenizer, example, end_of_text_id(tokenizer))
        t = item.input_ids.shape[1]
        assert len(item.labels) == t and all(0 < i < t for i in item.keys)
        marked = "".join(tokenizer.decode([item.input_ids[0, i].item()]) for i in item.keys)
        assert all(word in marked for word in example.keys)
        assert tokenizer.decode(item.input_ids[0, 1:].tolist()) == example.text
        assert example.answer.startswith(tokenizer.decode([item.answer_id]))


def test_a_key_word_that_is_not_there(tokenizer):
    from dataclasses import replace

    with pytest.raises(ValueError, match="'unicorn'"):
        tokenise_example(tokenizer, replace(examples(True)[0], keys=("unicorn",)), 0)


def test_built_in_examples_follow_the_world():
    assert examples(True, 0)[2] != examples(True, 1)[2]
    assert examples(True, 0)[:2] == examples(True, 1)[:2]


def test_without_head_is_the_model_with_zeroed_columns():
    model, ids = made().eval(), torch.arange(10)[None]
    with torch.inference_mode():
        whole = model(ids)
        with without_head(model, 1, 2):
            silenced = model(ids)
        assert torch.equal(model(ids), whole) and not torch.equal(silenced, whole)
        model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        assert torch.allclose(model(ids), silenced, atol=1e-5)


def test_from_model_to_sentences(tokenizer):
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(
        vocab_size=512, width=32, num_layers=2, ffn_width=32)).eval()
    items = [tokenise_example(tokenizer, example, 0) for example in examples(True)[2:]]
    maps = [attention_maps(model, item.input_ids)[:, 0] for item in items]
    planted, control = planted_repetition(range(5, 105), 10, 4, 0)
    heads = head_table(maps, attention_maps(model, planted), attention_maps(model, control))
    assert len(heads) == 8 and heads.notna().all().all()
    keys = {item.example.name: key_table(model, item, weights)
            for item, weights in zip(items, maps)}
    for table in keys.values():  # a fresh model with zeroed outputs does not depend on any head
        assert abs(table["answer without it"] - table.attrs["answer"]).max() < 1e-6
    saved = repetition_gain(model, planted, control)
    gain = {"value": saved.mean().item(), "low": saved.min().item(), "high": saved.max().item()}
    told = observations(heads, gain, 0.05, keys)
    assert len(told) == 6 + len(items) and "threshold of induction: 0." in told[5]
    strongest = heads.copy()
    strongest.loc[(1, 3), ["induction", "role"]] = [0.9, "induction"]
    assert ("head 1.3 puts 0.90" in (said := observations(strongest, gain, 0.05, keys)[5])
            and "threshold of induction: 1." in said)
    for name, fig in {"heads": heads_figure(heads), "maps": maps_figure(maps[0])}.items():
        assert small_png(fig).startswith(b"\x89PNG"), name


def test_roles_go_by_order_and_threshold():
    nothing = pd.Series(dict.fromkeys([name for _, name, _ in ROLES], 0.0))
    assert head_role(nothing) == "mixed"
    for role, name, threshold in ROLES:
        assert head_role(nothing.mask(nothing.index == name, threshold)) == role
        assert head_role(nothing.mask(nothing.index == name, threshold - 0.01)) == "mixed"
    assert head_role(nothing + 1) == ROLES[0][0]
