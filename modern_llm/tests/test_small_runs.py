"""Small models side by side: batches of seed and step, training in place, differences by seed."""

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import ModelConfig, TrainConfig
from modern_llm.data.tokens import end_of_text_id
from modern_llm.evaluation.small_runs import SmallText, joined, seed_differences, train_small
from modern_llm.models.decoder import ModernDecoderLM


@pytest.fixture(scope="module")
def text():
    return SmallText.of("synthetic", 400, 4000, 1000)


def test_the_text_is_as_long_as_asked_and_begins_with_a_document(text):
    end = end_of_text_id(text.tokenizer)
    assert (len(text.train), len(text.held_out)) == (4000, 1000)
    assert text.train[0] == end and text.held_out[0] == end and (text.train == end).sum() > 5
    assert joined(["a cat", "a hat"], text.tokenizer, 3).tolist()[0] == end


def test_a_text_that_is_too_short_is_refused(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"Note {n} about herons and reeds." for n in range(400)))
    with pytest.raises(ValueError, match=r"notes.txt, validation: has \d+ tokens, of which 90,000"):
        SmallText.of(str(notes), 300, 100, 90_000)


def test_batches_are_a_function_of_seed_and_step(text):
    one, again = (text.batch(3, 4, 16, seed=1) for _ in range(2))
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert torch.equal(one["input_ids"][:, 1:], one["labels"][:, :-1])
    for other in (text.batch(4, 4, 16, seed=1), text.batch(3, 4, 16, seed=2)):
        assert not torch.equal(one["input_ids"], other["input_ids"])


def test_a_model_is_trained_in_place(text):
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(vocab_size=408, context_length=17, width=32, num_layers=1,
                                        num_heads=2, num_kv_heads=1, ffn_width=64))
    before = model.embed_tokens.weight.clone()
    cfg = TrainConfig(max_steps=6, batch_size=4, warmup_steps=1, precision="fp32", log_every=1,
                      eval_every=3, checkpoint_every=6, keep_checkpoints=0)
    pad = lambda batch: {name: torch.nn.functional.pad(value, (1, 0), value=-100 * (name[0] == "l"))
                         for name, value in batch.items()}
    found = train_small(model, text, cfg, 16, 0, pad, lambda _: {"loss": 2.0})
    assert not torch.equal(model.embed_tokens.weight, before)
    assert found.step.tolist() == [1, 2, 3, 4, 5, 6] and found.tokens.iloc[-1] == 6 * 4 * 17
    assert found.val_loss.dropna().tolist() == [2.0, 2.0]


def test_differences_are_paired_by_seed():
    table = pd.DataFrame([{"model": model, "seed": seed, "loss": base + 10 * seed}
                          for seed in range(3) for model, base in (("a", 1.0), ("b", 1.5))])
    found = seed_differences(table, "loss", ["b"], "a").loc["b"]
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.5])  # the seeds' own level is gone
    table.loc[1, "loss"] += 0.3  # b of seed 0
    found = seed_differences(table, "loss", ["b"], "a").loc["b"]
    each = np.array([0.8, 0.5, 0.5])
    half = 4.303 * each.std(ddof=1) / 3**0.5
    assert found.tolist() == pytest.approx([0.6, 0.6 - half, 0.6 + half])
