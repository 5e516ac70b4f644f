"""Few-shot prompts: the cached prefix against the full forward, what fits, calibrations, orders,
and what is reported.
"""

import itertools
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.data import synth
from modern_llm.data.synth import LABELS, Review
from modern_llm.data.tasks import sentences
from modern_llm.data.tokens import end_of_text_id, train_tokenizer
from modern_llm.evaluation.fewshot import (
    METHODS, Scorer, best_order, candidate_orders, draw_demonstrations, encode_prompts,
    fitted_prompts, label_log_probs, method_scores, order_entropies, prompt_prefix, prompt_suffix,
    sentiment_items,
)
from modern_llm.evaluation.sentiment_tables import accuracy_rows, collapse_table, confusion_table
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.prefix import continuation_log_probs, shared_length, word_log_probs

VARIANTS = {"plain": {},
            "window and sinks": {"sliding_window": 40, "use_attention_sinks": True, "num_heads": 4,
                                 "num_kv_heads": 1}}


@pytest.fixture(scope="module")
def tokenizer():
    """The label words are one token each."""
    return train_tokenizer(
        (d.text for d in itertools.islice(synth.documents(kinds=["review"]), 500)), 400)


@pytest.fixture(scope="module")
def reviews():
    return sentences("synthetic", "test", 24)


@pytest.fixture(scope="module")
def pool():
    return sentences("synthetic", "train", 60)


def make_model(**changes):
    torch.manual_seed(0)
    values = {"vocab_size": 400, "context_length": 400, "width": 32, "num_layers": 2,
              "num_heads": 2, "num_kv_heads": 1, "ffn_width": 64}
    model = ModernDecoderLM(ModelConfig(**{**values, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


# ---- the cached prefix ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_prefix_is_the_full_forward(variant, tokenizer, reviews, pool):
    """Each prompt alone, whole and unpadded, through the model's own forward."""
    model = make_model(**VARIANTS[variant])
    demonstrations, texts = draw_demonstrations(pool, 4, 1)[0], [r.text for r in reviews]
    words = Scorer(model, tokenizer).words()
    prompts = encode_prompts(
        tokenizer, [[*prompt_prefix(demonstrations), prompt_suffix(text)] for text in texts])
    assert shared_length(prompts) > 60 and len({len(prompt) for prompt in prompts}) > 1
    cached = label_log_probs(model, tokenizer, demonstrations, texts, batch_rows=7)
    with torch.no_grad():
        logs = torch.stack(
            [model.eval()(torch.tensor([prompt]))[0, -1].log_softmax(-1) for prompt in prompts])
    plain = logs[:, [word[0] for word in words]].numpy()
    assert (all(len(word) == 1 for word in words) and np.allclose(cached, plain, atol=1e-4)
            and np.ptp(cached[:, 0]) > 1e-3)


def test_long_label_words_and_channel_equal_the_full_forward(model, tokenizer, reviews, pool):
    labels = ("quite bad indeed", "so very lovely")
    pool = [Review(r.text, labels[LABELS.index(r.label)]) for r in pool]
    demonstrations, texts = (draw_demonstrations(pool, 2, 1, labels=labels)[0],
                             [r.text for r in reviews[:5]])
    scorer = Scorer(model, tokenizer, labels, batch_rows=3)
    assert all(len(word) > 1 for word in scorer.words())

    def whole(parts, tail):
        ids, tail = (encode_prompts(tokenizer, [parts])[0],
                     tokenizer.encode(tail, add_special_tokens=False).ids)
        with torch.no_grad():
            logs = model.eval()(torch.tensor([ids + tail]))[0].log_softmax(-1)
        return sum(logs[len(ids) - 1 + j, token].item() for j, token in enumerate(tail))

    direct, shown = scorer.direct(demonstrations, [prompt_suffix(text) for text in texts])
    expected = [[whole([*prompt_prefix(demonstrations), prompt_suffix(text)], f" {label}")
                 for label in labels] for text in texts]
    assert np.allclose(direct, expected, atol=1e-4) and (shown == 2).all()
    channel, shown = scorer.channel(demonstrations, texts)
    expected = [[whole(
        [*prompt_prefix(demonstrations, channel=True), f"Sentiment: {label}\nReview:"], f" {text}"
    ) for label in labels] for text in texts]
    assert np.allclose(channel, expected, atol=1e-3) and (shown == 2).all()


def test_a_score_depends_on_nothing_else_in_the_batch(model, tokenizer, reviews, pool):
    demonstrations, texts = draw_demonstrations(pool, 4, 1)[0], [r.text for r in reviews]
    model.train()
    together = label_log_probs(model, tokenizer, demonstrations, texts)
    assert model.training
    for rows in (1, 5):
        assert np.allclose(
            together, label_log_probs(model, tokenizer, demonstrations, texts, batch_rows=rows),
            atol=1e-5)
    # the shared part is then the whole prompt but its end
    alone = label_log_probs(model, tokenizer, demonstrations, texts[3:4])
    assert np.allclose(together[3], alone[0], atol=1e-4)


def test_rows_that_share_nothing_and_rows_that_are_equal(model):
    rows = [[1, 2, 3, 4], [5, 6, 7], [1, 2, 3, 4]]
    shared, plain = (continuation_log_probs(model, rows, [2, 1, 3], share=share)
                     for share in (True, False))
    assert shared_length(rows) == 0 and np.allclose(shared, plain)
    same = [[1, 2, 3, 4]] * 3
    assert np.allclose(*(continuation_log_probs(model, same, [3, 3, 3], share=share)
                         for share in (True, False)), atol=1e-5)


def test_joined_prompts_are_tokenised_as_one_text(model, tokenizer, reviews, pool):
    demonstrations = draw_demonstrations(pool, 2, 1)[0]
    text = "\n\n".join([*prompt_prefix(demonstrations), prompt_suffix(reviews[0].text)])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert end_of_text_id(tokenizer) not in ids
    expected = word_log_probs(model, [ids], Scorer(model, tokenizer).words())
    found = label_log_probs(model, tokenizer, demonstrations,
                            [r.text for r in reviews[:4]], separator="\n\n")
    assert np.allclose(found[0], expected[0], atol=1e-4)


# ---- what fits -----------------------------------------------------------------------------------


def test_demonstrations_leave_from_the_front_and_are_counted(tokenizer, reviews, pool):
    shown = prompt_prefix(draw_demonstrations(pool, 4, 1)[0])
    suffixes = [prompt_suffix(r.text) for r in reviews]
    for room in range(60, 330, 30):
        prompts, kept = fitted_prompts(tokenizer, shown, suffixes, room)
        for prompt, count, suffix in zip(prompts, kept, suffixes):
            if count < 0:
                assert prompt == [] and len(encode_prompts(tokenizer, [[suffix]])[0]) > room
            else:
                assert (prompt == encode_prompts(tokenizer, [[*shown[4 - count:], suffix]])[0]
                        and len(prompt) <= room)
                assert (count == 4
                        or len(encode_prompts(tokenizer, [[*shown[3 - count:], suffix]])[0]) > room)
    assert kept.min() == 4


def test_sentences_with_fewer_demonstrations_share_among_themselves(tokenizer, reviews, pool):
    model, demonstrations = make_model(context_length=150), draw_demonstrations(pool, 4, 1)[0]
    suffixes = [prompt_suffix(r.text) for r in reviews] + [prompt_suffix("It was very fine. " * 14)]
    scorer = Scorer(model, tokenizer, batch_rows=5)
    found, shown = scorer.direct(demonstrations, suffixes)
    prompts, _ = fitted_prompts(tokenizer, prompt_prefix(demonstrations), suffixes, 150)
    assert len(set(shown.tolist())) > 1
    assert np.allclose(
        found, word_log_probs(model, prompts, scorer.words(), batch_rows=1, share=False), atol=1e-4)


def test_a_context_shorter_than_one_example_is_an_error(tokenizer, reviews, pool):
    with pytest.raises(ValueError,
                       match="none of 24 fits even without demonstrations.*longer context_length"):
        sentiment_items(make_model(context_length=8), tokenizer, reviews, pool, shots=(1,))


def test_reviews_left_out_are_counted(tokenizer, reviews, pool):
    model, reviews = make_model(context_length=100), reviews[:10]
    odd = [Review(" ", "positive"), Review("very " * 200, "negative")]
    items = sentiment_items(model, tokenizer, [*reviews, *odd], pool, shots=(0, 4), draws=2)
    without = items[items.item >= len(reviews)]
    assert ((without.said == "").all() and without["score(positive)"].isna().all()
            and (without.shown == -1).all())
    rows = pd.DataFrame(accuracy_rows(items)).set_index("metric")
    assert rows.loc["accuracy, 0-shot, direct", "n"] == len(reviews)
    protocol = rows.loc["accuracy, 4-shot, contextual", "protocol"]
    assert "2 of 12 reviews left out" in protocol and "of 4 demonstrations fit" in protocol
    clean = sentiment_items(model, tokenizer, reviews, pool, shots=(0, 4), draws=2)
    kept = items[items.item < len(reviews)].reset_index(drop=True)
    scores = ["score(negative)", "score(positive)"]
    assert (kept.shown == clean.shown).all() and np.allclose(kept[scores], clean[scores], atol=1e-4)
    assert "(none)" in confusion_table(items)


@pytest.mark.parametrize("change, words", [
    ({"reviews": [Review("Fine.", "neutral")]},
     "under test, number 0: label 'neutral' is none of negative, positive"),
    ({"reviews": [Review("  ", "positive")]}, "none of 1 reviews has a text"),
    ({"reviews": []}, "evaluation file empty"),
    ({"pool": []}, "need 1 reviews with label '(negative|positive)', but the pool has 0"),
    ({"pool": [Review("Fine.", "ok")]}, "demonstration pool, number 0: label 'ok'"),
    ({"methods": ("direct", "chanel")}, "'chanel' is unknown; use some of direct"),
    ({"labels": ("positive", "positive")}, "."),
])
def test_bad_input(model, tokenizer, reviews, pool, change, words):
    with pytest.raises(ValueError, match=words):
        sentiment_items(model, tokenizer,
                        **{"reviews": reviews, "pool": pool, "shots": (1,), "draws": 1, **change})


def test_another_models_tokenizer_and_broken_weights(tokenizer, reviews):
    with pytest.raises(ValueError,
                       match="outside the model's 0..49: the tokenizer is another model's"):
        label_log_probs(make_model(vocab_size=50), tokenizer, [], [reviews[0].text])
    model = make_model()
    torch.nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        label_log_probs(model, tokenizer, [], [reviews[0].text])


# ---- draws, calibrations, orders -----------------------------------------------------------------


def test_draws_are_balanced_and_do_not_depend_on_their_number(pool):
    for shots in (0, 1, 3, 4, 8):
        sets = draw_demonstrations(pool, shots, 6, seed=3)
        assert sets[:2] == draw_demonstrations(pool, shots, 2, seed=3)
        for one in sets:
            counts = [sum(d.label == label for d in one) for label in LABELS]
            assert (sum(counts) == shots == len({d.text for d in one})
                    and max(counts) - min(counts) <= 1)
    assert {d.label for [d] in draw_demonstrations(pool, 1, 2)} == set(LABELS)
    assert len({tuple(d.label for d in one) for one in draw_demonstrations(pool, 4, 20)}) > 3


def test_a_prior_moves_the_threshold_and_nothing_else(model, tokenizer, reviews, pool):
    demonstrations = draw_demonstrations(pool, 4, 1)[0]
    scores = method_scores(Scorer(model, tokenizer), demonstrations,
                           [r.text for r in reviews], ("direct", "contextual", "pmi"))
    odds = {method: table[:, 1] - table[:, 0] for method, (table, _) in scores.items()}
    for method in ("contextual", "pmi"):
        assert np.ptp(odds["direct"] - odds[method]) < 1e-9
    free = label_log_probs(model, tokenizer, demonstrations, ["N/A", "", "[MASK]"])
    p = np.exp(free) / np.exp(free).sum(1, keepdims=True)
    assert np.allclose(odds["direct"] - odds["contextual"], np.log(p.mean(0)[1] / p.mean(0)[0]))


def test_candidate_orders():
    assert sorted(candidate_orders(3, 6)) == sorted(itertools.permutations(range(3)))
    for shots, count in ((4, 10), (8, 24)):
        orders = candidate_orders(shots, count)
        assert len(set(orders)) == count and orders[0] == tuple(range(shots))
        assert all(sorted(order) == list(range(shots)) for order in orders)


def test_order_selection_looks_at_no_label(model, tokenizer, reviews, pool):
    flipped = [Review(r.text, LABELS[1 - LABELS.index(r.label)]) for r in reviews]
    one, other = (sentiment_items(model, tokenizer, r, pool,
                                  shots=(4,), draws=1, methods=("ordered",), orders=4, probes=8)
                  for r in (reviews, flipped))
    assert (one.said == other.said).all()
    table = order_entropies(Scorer(model, tokenizer), draw_demonstrations(pool, 4, 1)[0],
                            [r.text for r in reviews], candidate_orders(4, 4))
    assert (table.global_entropy.between(0, math.log(2) + 1e-9).all()
            and table.local_entropy.between(0, math.log(2)).all())
    assert table.set_index("order").global_entropy[best_order(table)] == table.global_entropy.max()


def test_a_probe_too_long_for_the_context_changes_no_order(model, tokenizer):
    texts = ["a fine film", "a dull film", "what a mess"]
    shown = [Review(text, label) for text, label in zip(
        ["good fun", "no fun"], ["positive", "negative"])]
    orders, scorer = candidate_orders(2, 2), Scorer(model, tokenizer)
    alone, beside = (order_entropies(scorer, shown, probes, orders)
                     for probes in (texts, [*texts, "long " * model.cfg.context_length]))
    assert alone.notna().all().all()
    pd.testing.assert_frame_equal(alone, beside)


# ---- what is reported ----------------------------------------------------------------------------


def made_up(said, shots=4, method="direct", labels=None):
    """Items of some draws: lists of what was said, all to the same reviews."""
    labels = labels or ["negative", "positive"] * (len(said[0]) // 2)
    return pd.concat(
        [pd.DataFrame({"shots": shots, "draw": d, "method": method,
                       "item": range(len(one)), "label": labels, "said": one, "shown": shots})
         for d, one in enumerate(said)], ignore_index=True)


def test_rows_say_mean_spread_and_difference():
    gold, constant = ["negative", "positive"] * 20, ["positive"] * 40
    rows = pd.DataFrame(accuracy_rows(made_up([gold, constant]))).set_index("metric")
    assert rows.value["accuracy, 4-shot, direct"] == 0.75
    assert (tuple(rows.loc["accuracy, 4-shot, direct, over draws", ["value", "low", "high", "n"]])
            == (0.75, 0.5, 1.0, 2))
    assert (rows.value["majority class"] == 0.5
            and rows.value["accuracy, 4-shot, direct minus majority class"] == 0.25)
    assert "in 1 of 2 draws it says 'positive'" in rows.protocol["accuracy, 4-shot, direct"]
    single = pd.DataFrame(accuracy_rows(made_up([gold], shots=0))).set_index("metric")
    # Wilson
    assert (single.value["accuracy, 0-shot, direct"] == 1
            and single.low["accuracy, 0-shot, direct"] < 1)
    assert "accuracy, 0-shot, direct, over draws" not in single.index


def test_collapse_is_said_and_a_fair_answer_is_not():
    table = collapse_table(made_up(
        [["positive"] * 39 + ["negative"], ["negative"] * 40, ["negative", "positive"] * 20]))
    assert table.collapsed.tolist() == [2] and "'negative' or 'positive'" in table.words[0]
    assert collapse_table(made_up([["negative", "positive"] * 20])).words.tolist() == [""]


def test_rows_of_everything(model, tokenizer, reviews, pool):
    reviews = reviews[:10]
    items = sentiment_items(model, tokenizer, reviews, [*pool, *reviews],
                            shots=(0, 1, 2), draws=2, orders=2, probes=4)
    counts = items.groupby(["shots", "method"], sort=False).draw.nunique()
    assert ([counts.get((0, m)) for m in METHODS] == [1, 1, 1, 1, None]
            and counts[1, "direct"] == 2 and counts[2, "ordered"] == 2)
    rows = pd.DataFrame(accuracy_rows(items))
    assert (not rows.metric.duplicated().any()
            and np.isfinite(rows[["value", "low", "high"]].to_numpy()).all())
    assert (rows.low <= rows.value + 1e-12).all() and (rows.value <= rows.high + 1e-12).all()
    confusion = confusion_table(items)
    assert confusion.to_numpy().sum() == len(items)
    again = sentiment_items(model, tokenizer, reviews, [*pool, *reviews],
                            shots=(0, 1, 2), draws=2, orders=2, probes=4, batch_rows=5)
    scores = ["score(negative)", "score(positive)"]
    assert np.allclose(items[scores], again[scores], atol=1e-4)


@pytest.mark.skipif(not os.environ.get("MODERN_LLM_DATA"), reason="needs MODERN_LLM_DATA")
def test_sst2(model, tokenizer):
    reviews = sentences("sst2", "test", 20)
    items = sentiment_items(model, tokenizer, reviews, sentences("sst2", "train", 50),
                            shots=(2,), draws=2, methods=("direct", "pmi"))
    assert len(items) == 2 * 2 * 20 and (items.shown >= 0).all()
