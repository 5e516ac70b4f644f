"""Instruction tuning: sources read from hand-made files, the mixture, judging, and the stage from a
foreign checkpoint.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import (
    CHAT_KINDS, ConfigError, ModelConfig, SFTConfig, get_pipeline_preset, names_of, override,
)
from modern_llm.data import synth
from modern_llm.data.chat import CHAT_TEMPLATE, Answer, end_id, padded_batch
from modern_llm.data.conversations import best_paths
from modern_llm.data.corpus import build_token_cache
from modern_llm.data.sources import DataError
from modern_llm.data.tokens import load_tokenizer, save_tokenizer, train_tokenizer
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model
from modern_llm.runs.stage import train_stage
from modern_llm.statistics import perplexity_ratio
from modern_llm.tests.test_stage import begin
from modern_llm.training import sft
from modern_llm.training.optim import lm_loss
from modern_llm.training.sft import InstructionExample

pytestmark = pytest.mark.usefixtures("offline")
TEXTS = [document.text for document in islice(synth.documents(), 300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(vocab_size=400, context_length=96, width=32, num_layers=2,
                                        num_heads=2, num_kv_heads=1, ffn_width=64))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("cache")
    return build_token_cache("synthetic", "train", tokenizer, max_tokens=8_000, cache_dir=place,
                             progress=False)


def write(root: Path, name: str, rows: list[dict]) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- sources


def message(name, parent, role, text, rank=None, lang="en"):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank,
            "lang": lang, "deleted": False}


TREES = [message("1", None, "prompter", "Hello?"), message("2", "1", "assistant", "worst", 2),
         message("3", "1", "assistant", "best", 0), message("4", "1", "assistant", "unranked"),
         message("5", "3", "prompter", "And then?", 1), message("6", "3", "prompter", "Why?", 0),
         message("7", "6", "assistant", "Because."), message("8", "7", "prompter", "Thanks."),
         message("9", None, "prompter", "Niemand?", lang="de"),
         message("10", "9", "assistant", "Doch."), message("11", None, "prompter", "Nobody there?"),
         message("12", "missing", "assistant", "An orphan.")]


def paths(trees, **options):
    return list(map(InstructionExample.of, best_paths(trees, **options)))


def test_message_trees_become_their_best_path(tmp_path, monkeypatch):
    write(tmp_path, "oasst1/train.jsonl", TREES)
    write(tmp_path, "oasst1/validation.jsonl", TREES[:2])
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    found = sft.instructions("oasst1", "train", 10)
    assert found == [InstructionExample("Why?", output="Because.", history=(("Hello?", "best"),)),
                     InstructionExample("Nobody there?")]
    assert [m["role"] for m in found[0].messages] == ["user", "assistant"] * 2
    assert (sft.instructions("oasst1", "validation", 10)
            == [InstructionExample("Hello?", output="worst")])
    assert (paths(TREES, languages=("de",))
            == [InstructionExample("Niemand?", output="Doch.")])


@pytest.mark.fault("tables")
@pytest.mark.parametrize(
    "more, wanted",
    [([message("13", "", "prompter", "A root?"), message("14", "13", "assistant", "Yes.")],
      [InstructionExample("A root?", output="Yes.")]),
     ([message("13", "1", "assistant", " ", -1)], []),
     ([message("13", "13", "prompter", "Round"), message(
         "14", "15", "assistant", "and"), message("15", "14", "prompter", "round")], []),
     ([message("13", None, "user", "Hello?")], "role 'user' is not 'prompter' or 'assistant'"),
     ([message("13", None, "assistant", "Hello!"), message("14", "13", "prompter", "Yes?")],
      "assistant's message has no parent_id")])
def test_odd_trees_are_no_conversations(more, wanted):
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=wanted):
            paths([*TREES, *more])
    else:
        assert paths([*TREES, *more]) == [*paths(TREES), *wanted]


@pytest.mark.fault("messages")
def test_a_language_that_no_tree_has_is_told():
    with pytest.raises(DataError, match="^.+: no conversation is in fr, xx, only in de, en"):
        paths(TREES, languages=("fr", "xx"))


def test_every_source_has_one_form(tmp_path, monkeypatch):
    write(tmp_path, "alpaca/train.jsonl",
          [{"instruction": f"Add {i}. ", "input": "to 1", "output": f"{i + 1}"}
           for i in range(300)])
    write(tmp_path, "gsm8k/train.jsonl",
          [{"question": f"{i} and 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
           for i in range(9)])
    write(tmp_path, "gsm8k/test.jsonl", [{"question": "1 and 1?", "answer": "#### 2"}])
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("sentence\tlabel\nall good \t1\nall bad \t0\n",
                                                 encoding="utf-8")
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\nso so\t0\n", encoding="utf-8")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    train, held_out = (sft.instructions("alpaca", split, 1000) for split in ("train", "validation"))
    assert (train[0].request.startswith("Add ")
            and train[0].request.endswith(".\nto 1") and train[0].kind == "open")
    assert (0 < len(held_out) < 20 and len(train) + len(held_out) == 300
            and not set(train) & set(held_out))
    problem = sft.instructions("gsm8k", "train", 1)[0]
    assert ((problem.request, problem.kind) == ("0 and 1?", "problem")
            and "<<0+1=1>>" in problem.output)
    assert (sft.instructions("sst2", "train", 9)
            == [InstructionExample(sft.SENTIMENT_REQUEST, "all good", "positive", "sentiment"),
                InstructionExample(sft.SENTIMENT_REQUEST, "all bad", "negative", "sentiment")])


def test_built_in_sources_keep_their_splits_apart():
    for source in ("synthetic", "synthetic-problems"):
        train, held_out = ({e.request for e in sft.instructions(source, split, 400)}
                           for split in ("train", "validation"))
        assert train and held_out
        assert not train & held_out
    here, there = (sft.instructions("synthetic", "train", 50, world_seed) for world_seed in (0, 1))
    assert [e for e, f in zip(here, there) if e != f and e.kind == "fact"]
    assert len(sft.instructions("synthetic", "train", 7)) == 7


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match="'alpcaa' is unknown; did you mean 'alpaca'"):
        sft.instructions("alpcaa", "train", 1)


# ---- encoding


def test_what_cannot_be_trained_is_counted(tokenizer):
    long = " ".join(["word"] * 200)
    examples = [InstructionExample("Hi.", output="Ho."), InstructionExample("Hi.", output="  "),
                InstructionExample(long, output="Ho."), InstructionExample("Hi.", output=long)]
    encoded, counts = sft.encode_examples(tokenizer, examples, 64)
    assert counts == {"read": 4, "no text": 1, "fully masked": 1, "truncated": 1, "kept": 2,
                      "tokens": sum(len(i) for i, _ in encoded),
                      "trained tokens": sum(y != -100 for _, labels in encoded for y in labels)}
    # a cut answer does not pretend to end
    assert [labels[-1] == end_id(tokenizer) for _, labels in encoded] == [True, False]
    assert all(len(ids) == len(labels) <= 64 for ids, labels in encoded)


def test_all_answers_of_a_conversation_are_trained(tokenizer):
    [(ids, labels)], _ = sft.encode_examples(
        tokenizer, [InstructionExample("b?", output="B", history=(("a?", "A"),))], 64)
    assert (tokenizer.decode([y for y in labels if y >= 0], skip_special_tokens=False)
            == "A<|end|>B<|end|>")


def test_a_source_of_which_nothing_is_left_is_an_error(tokenizer):
    with pytest.raises(
        ValueError, match="'synthetic-problems', train: none of 3 examples fits a context of 16"):
        sft.load_examples(
            SFTConfig(max_train_examples=3, sources=("synthetic-problems",), weights=(1.0,)),
            tokenizer, 16, "train")


# ---- the mixture


def numbered(sizes):
    return [[([source] * (1 + i % 3), [i] * (1 + i % 3)) for i in range(size)]
            for source, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes, weights",
                         [((100, 10), (0.5, 0.5)), ((7, 300, 20), (3, 1, 1)),
                          ((5,), (0.2,)), ((1, 1000), (0.001, 0.999))])
def test_a_mixture_has_its_shares_and_everything(sizes, weights):
    epoch = sft.mixture(numbered(sizes), weights)
    found = np.bincount([ids[0] for ids, _ in epoch]) / len(epoch)
    assert np.allclose(found, np.array(weights) / sum(weights), atol=0.01)
    assert len({(ids[0], labels[0]) for ids, labels in epoch}) == sum(sizes)
    per_example = pd.Series([(ids[0], labels[0]) for ids, labels in epoch]).value_counts()
    for source in range(len(sizes)):
        counts = per_example[[key[0] == source for key in per_example.index]]
        assert counts.max() - counts.min() <= 1


def test_a_mixture_is_no_longer_than_training():
    sources = numbered((10_000, 10))
    epoch = sft.mixture(sources, (0.9, 0.1), max_tokens=1000, seed=3)
    assert 400 < len(epoch) < 600 and abs(sum(len(ids) for ids, _ in epoch) - 1000) < 100
    assert (epoch == sft.mixture(sources, (0.9, 0.1), max_tokens=1000, seed=3)
            != sft.mixture(sources, (0.9, 0.1), max_tokens=1000, seed=4))


@pytest.mark.parametrize("batch_size, fraction",
                         [(8, 0.1), (16, 0.1), (5, 0.37), (4, 0.0), (1, 0.5), (10, 0.3)])
def test_replay_has_its_share(batch_size, fraction, cache, tokenizer):
    cfg = SFTConfig(batch_size=batch_size, replay_fraction=fraction)
    examples, _ = sft.encode_examples(tokenizer, sft.instructions("synthetic", "train", 60), 96)
    batches = sft.SFTBatches(examples, [cache], cfg, 96, seed=1)
    replay_rows = [int((batches(step)["labels"][:, 0] != -100).sum()) for step in range(20)]
    assert replay_rows == [batches.replayed(step + 1) - batches.replayed(step)
                           for step in range(20)]
    assert (abs(sum(replay_rows) - 20 * batch_size * fraction) < 1 + 1e-6
            and max(replay_rows) - min(replay_rows) <= 1)
    assert all(batches(step)["input_ids"].shape == (batch_size, 96) for step in range(3))


def test_replay_is_isolated_as_pretraining_was(cache, tokenizer):
    cfg = SFTConfig(batch_size=4, replay_fraction=0.5)
    examples, _ = sft.encode_examples(tokenizer, sft.instructions("synthetic", "train", 60), 96)
    for isolated in (True, False):
        made = list(map(sft.SFTBatches(examples, [cache], cfg, 96, isolate_documents=isolated),
                        range(10)))
        assert all(torch.equal(batch["segment_ids"][2:] > 0, batch["labels"][2:] != -100)
                   for batch in made)
        assert (max(batch["segment_ids"][2:].max() for batch in made) > 1) == isolated
        assert max(batch["segment_ids"][:2].max() for batch in made) > 1


def test_a_batch_is_a_function_of_seed_and_step(cache, tokenizer):
    cfg = SFTConfig(batch_size=6, replay_fraction=0.25)
    examples, _ = sft.encode_examples(tokenizer, sft.instructions("synthetic", "train", 60), 96)
    one, other = (sft.SFTBatches(examples, [cache], cfg, 96, seed=1) for _ in range(2))
    forwards = [one(step) for step in range(12)]  # more than an epoch
    for step in (11, 3, 0, 7):
        assert all(torch.equal(value, forwards[step][name]) for name, value in other(step).items())
    different = sft.SFTBatches(examples, [cache], cfg, 96, seed=2)(0)
    assert not torch.equal(different["input_ids"], forwards[0]["input_ids"])
    seen = torch.cat([batch["labels"][batch["labels"] >= 0] for batch in forwards])
    # of the special tokens only the two endings are said
    assert set(range(5)) & set(seen.tolist()) == {0, end_id(tokenizer)}


def test_a_packed_example_is_as_alone(model, tokenizer):
    examples, _ = sft.encode_examples(tokenizer, sft.instructions("synthetic", "train", 40), 96)
    batch = sft.SFTBatches(examples, [], SFTConfig(batch_size=8, replay_fraction=0.0), 96)(0)
    assert batch["segment_ids"].max() > 1
    alone = sft.example_nats(model, examples)
    rows_per_epoch = sft.SFTBatches(examples, [], SFTConfig(batch_size=1, replay_fraction=0.0),
                                    96).examples.rows_per_epoch
    whole = sft.SFTBatches(examples, [], SFTConfig(batch_size=rows_per_epoch, replay_fraction=0.0),
                           96)(0)
    assert lm_loss(model, whole).total.item() == pytest.approx(alone.nats.sum(), rel=1e-4)
    assert int(lm_loss(model, whole).count) == alone.tokens.sum()


def test_nats_of_examples_keep_their_order(model, tokenizer):
    examples, _ = sft.encode_examples(tokenizer, sft.instructions("synthetic", "train", 30), 96)
    table = sft.example_nats(model, examples, batch_rows=7)
    assert table.index.tolist() == list(range(30))
    assert (table.nats[4]
            == pytest.approx(lm_loss(model, padded_batch([examples[4]])).total.item(), rel=1e-4))


# ---- judging


def test_judging_follows_the_kind():
    problem = InstructionExample("q", output="#### 1,200", kind="problem")
    assert (sft.is_right(problem, "so\n#### 1200") and not sft.is_right(problem, "1200")
            and not sft.parses(problem, "1200"))
    unknown = InstructionExample("q", output="no number", kind="problem")
    assert sft.is_right(unknown, "nor here") is False  # two missing numbers are not equal
    review = InstructionExample("q", "r", "negative", "sentiment")
    assert (sft.parses(review, " Positive.") and not sft.parses(review, "positive I think")
            and sft.is_right(review, "Negative"))
    fact = InstructionExample("q", output="Anna lives in the city.", kind="fact")
    assert sft.parses(fact, "yes") and not sft.parses(fact, "yes\nno") and not sft.parses(fact, " ")
    assert (sft.parses(InstructionExample("q", output="a"), "yes\nno")
            and sft.is_right(InstructionExample("q", output="a"), "a") is None)
    table = sft.judge_answers([fact, InstructionExample("q", output="a")],
                              [Answer("x", [], [], True), Answer("a", [], [], False)])
    assert (sft.shares(table, "right") | {"low": 0}
            == {"value": 0.0, "low": 0, "high": sft.shares(table, "right")["high"], "n": 1})


def test_demonstrations_fit_into_the_context(model, tokenizer):
    items = sft.instructions("synthetic", "validation", 12)
    short = sft.few_shot_quality(model, tokenizer, items,
                                 sft.instructions("synthetic", "train", 40), 8)
    assert len(short) == 12 and not short.text.str.contains("\n").any()
    long = InstructionExample(" ".join(["word"] * 200), output="x")
    table = sft.few_shot_quality(model, tokenizer, [long], [long], 8)
    assert table.text.tolist() == [""] and table.ended.tolist() == [False]
    assert sft.answer_quality(model, tokenizer, [long], 8).ended.tolist() == [False]


def test_the_tax_is_paired():
    base = pd.DataFrame({"nats": [10.0, 200.0, 3000.0], "tokens": [10, 100, 1000]})
    tuned = base.assign(nats=base.nats + np.log(1.1) * base.tokens)
    found = perplexity_ratio(base, tuned)
    assert ([found[name] for name in ("value", "low", "high")] == pytest.approx([1.1] * 3)
            and found["n"] == 3)


# ---- the stage


def test_the_stage_from_a_checkpoint(tmp_path, tokenizer, monkeypatch):
    """Its tokenizer and its context are kept. The page of the stage: test_pipeline.py, and from a
    foreign model test_round_trip.py.
    """
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = get_pipeline_preset("lesson")
    base = tmp_path / "base"
    base.mkdir()
    save_model(base, ModernDecoderLM(replace(config.model, vocab_size=400, context_length=160)),
               eos_id=0)
    save_tokenizer(tokenizer, base)
    small = ("sft.max_steps=4 sft.batch_size=4 sft.checkpoint_every=2 sft.eval_every=2 "
             "sft.max_train_examples=60 sft.max_validation_examples=8 data.max_train_tokens=5000 "
             "data.max_validation_tokens=1500")
    run = begin(tmp_path, run="r", stage="sft", checkpoint=str(base), overrides=small)
    assert train_stage(run).step == 4
    checkpoint = run.folder / "checkpoint"
    assert (json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
            == end_id(tokenizer))
    assert (json.loads((checkpoint / "tokenizer_config.json").read_text())["chat_template"]
            == CHAT_TEMPLATE)
    assert (load_tokenizer(checkpoint).to_str() == tokenizer.to_str()
            and load_model(checkpoint).cfg.context_length == 160)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("section, name, own",
                         [("sft", "chat.jsonl", "alpaca"), ("sft", "tinystories", "alpaca"),
                          ("sft", "tatsu-lab/alpaca", "alpaca"),
                          ("sft", "text", "alpaca"), ("dpo", "pairs.jsonl", "hh-rlhf"),
                          ("dpo", "gsm8k", "hh-rlhf"), ("dpo", "synthetic-problems", "hh-rlhf")])
def test_a_source_that_no_stage_can_read_is_refused_before_anything_runs(section, name, own):
    weights = {"weights": [1]} if section == "sft" else {}
    with pytest.raises(ConfigError,
                       match=rf"{section}.sources='{name}' is "
                             rf"unknown.*MODERN_LLM_DATA/{own}/train.jsonl by the name '{own}'"):
        override(get_pipeline_preset("local-smoke"), {section: {"sources": [name], **weights}})


def test_every_preset_reads_known_sources():
    known = names_of(*CHAT_KINDS)
    assert known == ("synthetic", "synthetic-problems", "alpaca", "oasst1", "gsm8k", "sst2")
    assert (names_of("pairs"), names_of("problems"), names_of("sentences")) == (
        ("synthetic", "hh-rlhf"), ("synthetic", "gsm8k"), ("synthetic", "sst2"))
    for name in ("lesson", "local-smoke", "local-cpu", "local", "tacc-smoke", "tacc-a100",
                 "tacc-h100", "gpu-full", "h100-speedrun"):
        preset = get_pipeline_preset(name)
        assert set(preset.sft.sources) <= set(known)
    assert override(preset, {"sft": {"sources": ["sst2"], "weights": [1]}}).sft.weights == (1.0,)
