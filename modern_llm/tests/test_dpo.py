"""Preference pairs and their loss: what is read, what is cut, what a batch holds, what training
does to a small model.
"""

import dataclasses
import json
import math
import random
import runpy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import (
    ConfigError, DPOConfig, DataConfig, ModelConfig, get_pipeline_preset, override,
)
from modern_llm.data import synth
from modern_llm.data.chat import encode_chat, end_id
from modern_llm.data.packing import IGNORED
from modern_llm.data.pairs import (
    Pair, dialogue_pair, encode_pair, encode_pairs, pair_batch, preference_pairs,
)
from modern_llm.data.tokens import train_tokenizer
from modern_llm.evaluation.dpo_control import control_rows
from modern_llm.files import CHECKOUT
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model
from modern_llm.runs.record import StageRun
from modern_llm.training import dpo
from modern_llm.training.dpo import PairBatches, alarms, dpo_loss, pair_log_probs, preference_loss
from modern_llm.training.sft import save_chat_model
from modern_llm.training.train_step import micro_batches
from modern_llm.training.trainer import Trainer

ROW = {"chosen": "\n\nHuman: Hello.\n\nAssistant: Hi.",
       "rejected": "\n\nHuman: Hello.\n\nAssistant: Go on."}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"{pair.prompt} {pair.chosen} {pair.rejected}"
             for pair, _ in zip(synth.preferences(), range(300))]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def examples(tokenizer):
    pairs, _ = preference_pairs("synthetic", "train", 48)
    return encode_pairs(tokenizer, pairs, 128)[0]


def small_model(seed=0, std=0.05):
    torch.manual_seed(seed)
    model = ModernDecoderLM(ModelConfig(vocab_size=400, context_length=128, width=32, num_layers=2,
                                        num_heads=2, num_kv_heads=1, ffn_width=64))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


# ---- reading -------------------------------------------------------------------------------------


def test_built_in_pairs_depend_on_the_split_and_hold_their_rule():
    train, counts = preference_pairs("synthetic", "train", 200)
    again, _ = preference_pairs("synthetic", "train", 300)
    held_out, _ = preference_pairs("synthetic", "validation", 200)
    test, _ = preference_pairs("synthetic", "test", 200)
    assert counts == {"read": 200, "kept": 200} and train == again[:200] and held_out != test
    assert not {pair.request for pair in train} & {pair.request for pair in held_out + test}
    for pair in train:
        assert (all(synth.obeys(rule, pair.chosen, pair.chosen) for rule in synth.RULES)
                and not synth.obeys(pair.rule, pair.rejected, pair.chosen))


def test_dialogues_of_a_file_are_read_and_every_drop_is_counted(tmp_path, monkeypatch):
    long = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant:"
    rows = [ROW, {"chosen": long + " D.", "rejected": long + " E.\n\nStill E."},
            {**ROW, "rejected": ROW["chosen"] + " "},
            {**ROW, "rejected": long + " D."}, {**ROW, "rejected": "\n\nHuman: Hello."},
            {**ROW, "rejected": "\n\nHuman: Hello.\n\nAssistant:"},
            {"chosen": "no dialogue", "rejected": ""}]
    (tmp_path / "hh-rlhf").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "hh-rlhf" / f"{split}.jsonl").write_text("".join(
            json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    pairs, counts = preference_pairs("hh-rlhf", "train", 100)
    assert counts == {"read": 7, "kept": 2, "an answer is empty": 1, "answers equal": 1,
                      "no answer at the end": 2, "prompts differ": 1}
    assert ([m["role"] for m in pairs[1].prompt] == ["user", "assistant", "user"]
            and pairs[1].rejected == "E.\n\nStill E.")


@pytest.mark.parametrize(
    "row, reason",
    [({}, "no answer at the end"), ({"chosen": None, "rejected": None}, "no answer at the end"),
     ({"chosen": "\n\nAssistant: Hi.", "rejected": "\n\nAssistant: Ho."}, "no answer at the end"),
     ({"chosen": ROW["chosen"] + "\n\nHuman: Thanks", "rejected": ROW["rejected"]},
      "no answer at the end")])
def test_rows_that_are_no_pairs(row, reason):
    assert dialogue_pair(row) == reason


def test_unknown_names_are_errors_that_help():
    with pytest.raises(ValueError, match="did you mean 'hh-rlhf'"):
        preference_pairs("hh_rlhf", "train", 1)
    with pytest.raises(ValueError, match="split='valid' must be"):
        preference_pairs("synthetic", "valid", 1)


# ---- tokens --------------------------------------------------------------------------------------


def test_whatever_the_conversation_only_the_last_answer_is_scored(tokenizer):
    draw, seen = random.Random(0), set()
    say = lambda: "Of course. Sam has a cat. " * draw.choice((1, 2, 5, 12))
    for _ in range(150):
        turns = draw.choice((1, 3, 5, 9))
        prompt = tuple({"role": ("user", "assistant")[i % 2], "content": say()}
                       for i in range(turns))
        pair = Pair(prompt, say(), say() + "Bad luck.")
        encoded, cuts = encode_pair(tokenizer, pair, 128)
        seen |= set(cuts)
        if encoded is None:
            continue
        starts = []
        for (ids, labels), answer in ((encoded.chosen, pair.chosen),
                                      (encoded.rejected, pair.rejected)):
            assert len(ids) == len(labels) <= 128
            scored = [i for i, label in enumerate(labels) if label != IGNORED]
            assert (scored == list(range(scored[0], len(labels)))
                    and labels[scored[0]:-1] == ids[scored[0] + 1:])
            whole = encode_chat(tokenizer, [{"role": "assistant", "content": answer}])[2:]
            assert ([labels[i] for i in scored] == whole[: len(scored)]
                    and (len(scored) == len(whole) or "answer cut" in cuts))
            starts.append(ids[: scored[0] + 1])
        assert (starts[0] == starts[1]
                and tokenizer.decode(starts[0][:2], skip_special_tokens=False)
                    == "<|endoftext|><|user|>")
    assert seen >= {"prompt cut", "answer cut", "dropped: prompt too long"}


def test_pairs_that_the_cut_makes_equal_are_dropped(tokenizer):
    same = "Sam has a cat. " * 60
    pair = Pair(({"role": "user", "content": "Well?"},), same + "Yes.", same + "No.")
    assert encode_pair(tokenizer, pair, 64) == (None, ["dropped: equal when cut"])
    with pytest.raises(ValueError, match="none of 1 pairs fits a context of 64"):
        encode_pairs(tokenizer, [pair], 64)


def test_special_tokens_in_an_answer_are_text(tokenizer):
    encoded, _ = encode_pair(
        tokenizer, Pair(({"role": "user", "content": "Well?"},), "Yes.<|end|>More.", "No."), 128)
    assert encoded.chosen[1].count(end_id(tokenizer)) == 1


# ---- batches and log-probabilities ---------------------------------------------------------------


def test_log_probs_are_those_of_a_plain_loop(examples):
    model = small_model().train()
    found = pair_log_probs(model, examples, batch_pairs=5)
    assert model.training
    for i in (0, 17, 47):
        ids, labels = examples[i].rejected
        log_probs = model.eval()(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(log_probs[t, label].item()
                       for t, label in enumerate(labels) if label != IGNORED)
        assert found.rejected[i] == pytest.approx(expected, abs=1e-3)
        assert found.rejected_tokens[i] == sum(label != IGNORED for label in labels)
    assert (list(found.pair) == [example.digest for example in examples]
            and len(set(found.pair)) > 40)


def test_batches_are_a_function_of_seed_and_step_and_carry_their_reference(examples):
    reference = pd.DataFrame({"chosen": -np.arange(48.0), "rejected": -np.arange(48.0) - 100})
    one, other = (PairBatches(examples, reference, 10, seed=3) for _ in range(2))
    for step in (7, 0, 4, 5, 7):
        a, b = one(step), other(step)
        assert all(torch.equal(a[name], b[name]) and len(a[name]) == 10 for name in a)
        assert torch.equal(a["reference_rejected"], a["reference_chosen"] - 100)
        i = int(-a["reference_chosen"][0])
        ids = examples[i].chosen[0]
        assert (a["chosen_input_ids"][0, : len(ids)].tolist() == ids
                and not a["chosen_input_ids"][0, len(ids):].any())
    assert {int(i) for step in range(5) for i in one.rows(step)} == set(range(48))
    assert any((one.rows(step) != PairBatches(examples, reference, 10, seed=4).rows(step)).any()
               for step in range(5))


def test_fewer_pairs_than_a_batch_are_repeated(examples):
    batches = PairBatches(examples[:3],
                          pd.DataFrame({"chosen": [0.0] * 3, "rejected": [0.0] * 3}), 8)
    assert len(batches.rows(0)) == 8 and set(batches.rows(5)) == {0, 1, 2}


def test_the_reference_is_kept_and_other_pairs_are_refused(tmp_path, examples):
    path = tmp_path / "reference.jsonl"
    first = dpo.reference_log_probs(path, small_model(0), examples[:8])
    # another model: the file counts
    again = dpo.reference_log_probs(path, small_model(1), examples[:8])
    pd.testing.assert_frame_equal(first, again)
    assert np.allclose(first.chosen, pair_log_probs(small_model(0), examples[:8]).chosen, atol=1e-4)
    with pytest.raises(ValueError, match="other pairs than the 8 of this run.*force=True"):
        dpo.reference_log_probs(path, small_model(0), examples[1:9])


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [DPOConfig(beta=0.3), DPOConfig(beta=0.3, label_smoothing=0.2),
                                 DPOConfig(beta=0.3, loss="ipo")])
def test_losses_against_their_formulas(cfg):
    values = [torch.tensor([x], dtype=torch.float64) for x in (-20.0, -25.0, -22.0, -24.0)]
    loss, margin = preference_loss(*values, cfg)
    z = math.log(1 + math.exp(-0.3 * 3)), math.log(1 + math.exp(0.3 * 3))
    expected = ((3 - 1 / 0.6) ** 2 if cfg.loss == "ipo"
                else (1 - cfg.label_smoothing) * z[0] + cfg.label_smoothing * z[1])
    assert margin.item() == pytest.approx(0.9) and loss.item() == pytest.approx(expected, abs=1e-12)


def test_very_large_margins_stay_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = preference_loss(far, *torch.zeros(3, 2), DPOConfig(beta=0.5))
    loss.sum().backward()
    assert loss.isfinite().all() and far.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("cfg",
                         [DPOConfig(), DPOConfig(loss="ipo", length_normalised=True, beta=0.5),
                          DPOConfig(sft_weight=0.7, replay_weight=0.3)])
def test_the_cut_into_micro_batches_changes_nothing(cfg, examples):
    model, reference = small_model(), pair_log_probs(small_model(1), examples)
    rows = {"input_ids": torch.arange(120).view(6, 20),
            "labels": torch.arange(120).view(6, 20) + 1, "segment_ids": torch.ones(6, 20).int()}
    replay = rows if cfg.replay_weight else None
    batch = PairBatches(examples, reference, 8, replay=replay)(2)
    whole, parts = (dpo_loss(model, batch, cfg),
                    [dpo_loss(model, part, cfg) for part in micro_batches(batch, 2)])
    assert whole.count == 8 == sum(part.count for part in parts)
    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-4)
    for name, value in whole.metrics.items():
        assert value.item() == pytest.approx(sum(part.metrics[name].item() for part in parts),
                                             rel=1e-3, abs=1e-2), name
    table = dpo.compare(pair_log_probs(model, examples), reference,
                        cfg).iloc[PairBatches(examples, reference, 8).rows(2)]
    assert (table.preference.mean()
            == pytest.approx(whole.metrics["preference"].item() / 8, rel=1e-3))


def test_replayed_rows_are_what_the_sources_say_and_enter_the_loss(tokenizer, examples):
    kinds, data = ("text", "synthetic", "synthetic-problems"), DataConfig()
    replay = dpo.replay_rows(tokenizer, kinds, data, 12, 128)
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=False)
             for ids in replay["input_ids"]]
    assert len(texts) == 12 and all(value.shape == (12, 128) for value in replay.values())
    assert (not any("<|user|>" in text for text in texts[:4])
            and torch.equal(replay["input_ids"][:4, 1:], replay["labels"][:4, :-1]))
    assert all("<|user|>" in text for text in texts[4:]) and all("<<" in text for text in texts[8:])
    # no facts among the instructions
    assert not any("live" in text or "pet" in text for text in texts[4:8])
    isolated = dpo.replay_rows(tokenizer, ("text",),
                               dataclasses.replace(data, isolate_documents=True), 3,
                               128)["segment_ids"]
    assert isolated.max() > 2 and (isolated.diff(dim=1) >= 0).all()
    reference = pair_log_probs(small_model(1), examples)
    plain, with_replay = (PairBatches(examples, reference, 8, replay=part)
                          for part in (None, replay))
    batch, again = with_replay(3), with_replay(3)
    assert (all(torch.equal(batch[name], again[name]) for name in batch)
            and len(batch["replay_input_ids"]) == 8)
    # the pairs are the same
    assert all(torch.equal(value, batch[name]) for name, value in plain(3).items())
    model, cfg = small_model(), DPOConfig(replay_weight=0.5)
    out, without = dpo_loss(model, batch, cfg), dpo_loss(model, plain(3), cfg)
    labels = batch["replay_labels"]
    logits = model(batch["replay_input_ids"], batch["replay_segment_ids"]).transpose(1, 2)
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (nats.sum(1) / (labels != IGNORED).sum(1)).sum().item()
    assert out.metrics["replay"].item() == pytest.approx(expected, rel=1e-4)
    assert (out.total - without.total).item() == pytest.approx(0.5 * expected, rel=1e-4)


# ---- a run ---------------------------------------------------------------------------------------

RUN = DPOConfig(max_steps=16, batch_size=8, optimizer="adamw", lr=4e-3, weight_decay=0.0,
                warmup_steps=2, log_every=4, checkpoint_every=6, keep_checkpoints=0,
                precision="fp32")


def train(folder, examples, cfg=RUN, **options):
    model = small_model()
    reference = dpo.reference_log_probs(folder / "reference.jsonl", model, examples)
    trainer = Trainer(model, partial(dpo_loss, cfg=cfg),
                      PairBatches(examples, reference, cfg.batch_size), cfg, folder, device="cpu",
                      progress_bar=False, **options)
    return model, trainer.fit()


def test_a_small_model_learns_its_pairs_and_a_resumed_run_ends_in_the_same_weights(
    tmp_path, examples
):
    model, result = train(tmp_path / "straight", examples)
    last = result.history[-1]
    assert result.history[0]["preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["preference"] < 0.4 and last["margin"] > 0.5 and last["reward_accuracy"] > 0.9
    assert not alarms(pd.DataFrame(result.history).assign(chosen_shift=0), RUN)

    count = iter(range(7))
    train(tmp_path / "cut", examples, should_stop=lambda: next(count, None) is None)
    resumed, result = train(tmp_path / "cut", examples, resume=True)
    assert result.step == 16
    assert all(torch.equal(a, b)
               for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))


def test_every_loss_moves_the_pairs_apart(tmp_path, examples):
    for name, changes in {"ipo": {"loss": "ipo"}, "smooth": {"label_smoothing": 0.2},
                          "normal": {"length_normalised": True, "beta": 2.0},
                          "sft": {"sft_weight": 1.0}}.items():
        _, result = train(tmp_path / name, examples,
                          dataclasses.replace(RUN, max_steps=12, **changes))
        assert result.history[-1]["reward_accuracy"] > 0.8, name
    assert result.history[-1]["chosen_shift"] > 1  # the SFT term holds the chosen answer up


def test_answers_are_cut_in_the_prompt_and_end_by_themselves_or_not(tokenizer):
    talk = [{"role": ("user", "assistant")[i % 2], "content": "Sam has a cat. " * 5}
            for i in range(7)]
    found = dpo.write_answers(
        small_model(), tokenizer,
        [talk, talk[:1], [{"role": "user", "content": "Sam has a cat. " * 50}]], 12)
    assert len(found) == 3 and found.tokens[0] > 0 and found.tokens.max() <= 12
    assert found.tokens[2] == 0 and not found.ended[2]  # no room to answer


# ---- the control ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("start")
    save_chat_model(folder, small_model(), tokenizer)
    return folder


def tuning(start, folder, resume=False, **changes):
    """The stage's recipe, on a small model."""
    small = {"max_steps": 8, "max_train_pairs": 24, "max_validation_pairs": 8, "max_new_tokens": 4,
             "replay_sources": ["text"], "eval_every": 8, "checkpoint_every": 3}
    config = override(get_pipeline_preset("lesson"), {
        "data": {"tokenizer_vocab_size": 400}, "dpo": {**small, **changes}})
    config = dataclasses.replace(config, model=small_model().cfg)
    return dpo.PreferenceTuning(StageRun("dpo", "small", config, "cpu", folder, resume, 0.0,
                                         {"checkpoint": start}))


def saved(folder):
    return load_model(folder / "checkpoint").state_dict()


def test_the_control_is_the_run_without_its_preferences_and_leaves_the_run_alone(start, tmp_path):
    recipe = tuning(start, tmp_path / "both")
    assert recipe.fit().stopped == "finished"
    for name, changes in (("without", {"preference_weight": 0.0}), ("alone", {"control": False})):
        tuning(start, tmp_path / name, **changes).fit()
        assert not (tmp_path / name / "control").exists()
    both, control, without, alone = (saved(tmp_path / name)
                                     for name in ("both", "both/control", "without", "alone"))
    assert all(torch.equal(value, control[name]) for name, value in without.items())
    assert all(torch.equal(value, both[name]) for name, value in alone.items())
    assert not any(torch.equal(value, control[name]) for name, value in both.items())
    assert not list((tmp_path / "both").glob("checkpoints/*"))


def test_an_interrupted_control_goes_on_to_the_same_weights(start, tmp_path):
    tuning(start, tmp_path / "straight").fit()
    cut = tuning(start, tmp_path / "cut")
    drawn = cut.batches

    def batches(step):
        if step == 4 and (tmp_path / "cut" / "control").exists():
            (tmp_path / "cut" / "STOP").write_text("preempted")  # as the pipeline asks the stage
        return drawn(step)

    cut.batches = batches
    assert cut.fit().stopped == "preempted"
    result = tuning(start, tmp_path / "cut", resume=True).fit()
    assert result.stopped == "finished" and result.step == 8
    for part in (".", "control"):
        one, other = saved(tmp_path / "straight" / part), saved(tmp_path / "cut" / part)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    tuning(start, tmp_path / "cut", resume=True).fit()  # all is done: nothing is refused or moved
    again = saved(tmp_path / "cut" / "control")
    assert all(torch.equal(value, again[name]) for name, value in other.items())


def test_a_stage_that_stopped_trains_no_control(start, tmp_path):
    recipe = tuning(start, tmp_path / "minutes", max_minutes=1e-9)
    assert recipe.fit().stopped == "max_minutes"
    rows = [json.loads(line) for line in open(tmp_path / "minutes" / "control" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1]  # as many as the minutes allowed
    recipe = tuning(start, tmp_path / "stopped")
    drawn = recipe.batches

    def batches(step):
        (tmp_path / "stopped" / "STOP").touch()
        return drawn(step)

    recipe.batches = batches
    assert recipe.fit().stopped == "stopped"
    assert not (tmp_path / "stopped" / "control").exists()


def test_the_control_stands_in_the_table_pair_by_pair(start, tmp_path):
    recipe = tuning(start, tmp_path)
    recipe.fit()
    after = pair_log_probs(load_model(tmp_path / "checkpoint"), recipe.held_out)
    control = pair_log_probs(load_model(tmp_path / "control" / "checkpoint"), recipe.held_out)
    pairs = pd.DataFrame({"source": "synthetic", "after": (after.chosen > after.rejected) * 1.0,
                          "prompt": [example.pair.request for example in recipe.held_out]})
    says = pd.DataFrame({"all rules": [True, False, None, True]})
    text = {"synthetic": pd.DataFrame({"nats": [3.0, 4.0], "tokens": [2, 2]})}
    worse = {"synthetic": text["synthetic"].assign(nats=[3.1, 4.2])}

    def judge(model, name):
        assert name == "control" and torch.equal(
            model.embed_tokens.weight, saved(tmp_path / "control")["embed_tokens.weight"])
        return pd.DataFrame({"all rules": [True, True, None, False]}), worse

    found = {row["metric"]: row for row in control_rows(recipe, pairs, says, text, judge)}
    right = (control.chosen > control.rejected).mean()
    assert found["preference accuracy, control, synthetic"]["value"] == pytest.approx(right)
    assert (found["preference accuracy, after - control, synthetic"]["value"]
            == pytest.approx(pairs.after.mean() - right))
    shift = (control.chosen - recipe.before.chosen).sum() / control.chosen_tokens.sum()
    assert (found["chosen log-probability, change, control"]["value"]
            == pytest.approx(shift, abs=1e-5))
    assert found["obeys all rules, control"]["value"] == pytest.approx(2 / 3)
    difference = found["obeys all rules, after - control"]
    assert difference["value"] == 0 and difference["low"] < 0 < difference["high"]
    assert found["perplexity tax, control, synthetic"]["value"] == pytest.approx(math.exp(0.3 / 4))
    without = tuning(start, tmp_path / "none", control=False)
    assert control_rows(without, pairs, says, text, judge) == []


def test_the_preference_weight_scales_its_term_and_1_changes_no_bit(examples):
    model, reference = small_model(), pair_log_probs(small_model(1), examples)
    batch = PairBatches(examples, reference, 8)(0)
    cfg = DPOConfig(sft_weight=0.5)
    one, half, none = (dpo_loss(model, batch, dataclasses.replace(cfg, preference_weight=weight))
                       for weight in (1.0, 0.5, 0.0))
    preference = one.metrics["preference"]
    assert all(out.metrics["preference"] == preference for out in (half, none))
    nats = -(one.total - preference - half.total + 0.5 * preference)
    assert abs(nats.item()) < 1e-3
    assert (one.total - none.total).item() == pytest.approx(preference.item(), rel=1e-5)
    (chosen, _), (counts, _) = dpo.concatenated_log_probs(model, batch)
    assert none.total.item() == pytest.approx(0.5 * (-chosen / counts).sum().item(), rel=1e-6)


def test_weights_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ConfigError, match="dpo.preference_weight=-1 must not be negative"):
        DPOConfig(preference_weight=-1)
    with pytest.raises(ConfigError, match="all 0: nothing is left .* set one of them above 0"):
        DPOConfig(preference_weight=0)
    assert not DPOConfig(preference_weight=0, sft_weight=1).trains_control
    assert not DPOConfig().trains_control and DPOConfig(replay_weight=1).trains_control
    assert not DPOConfig(sft_weight=1, control=False).trains_control


# ---- alarms --------------------------------------------------------------------------------------

STEPS = pd.DataFrame({"step": range(0, 101, 10),
                      "preference": np.linspace(0.69, 0.2, 11), "reward_accuracy": 0.9,
                      "chosen_shift": -0.1, "chosen_tokens": 20.0, "val_answer_tokens": 20.0})


@pytest.mark.parametrize("changes, raised", [
    ({}, []),
    ({"chosen_shift": -STEPS.step / 150}, ["chosen answers collapse"]),
    ({"chosen_shift": -STEPS.step / 150, "val_chosen_shift": -0.2}, []),  # what is held out counts
    ({"val_answer_tokens": 20 + STEPS.step / 5}, ["answers grow"]),
    ({"val_answer_tokens": 8 + STEPS.step / 8}, []),  # towards the chosen ones
    ({"val_answers_ended": 0.9 - STEPS.step / 150}, ["answers do not end"]),
    ({"val_answers_ended": 0.9 - STEPS.step / 1000}, []),
    ({"val_preference": 0.69 + STEPS.step / 1000}, ["learned by heart"]),
    ({"preference": 0.69}, ["stuck at the start"]),
    ({"preference": [0.69] * 9 + [0.5, 0.4]}, []),
    ({"reward_accuracy": 0.45}, ["below chance"]),
    ({"reward_accuracy": [0.4] * 5 + [0.6] * 6}, []),
    ({"preference": 0.692, "reward_accuracy": 0.3, "chosen_shift": -9.0},
     ["chosen answers collapse", "stuck at the start", "below chance"]),
])
def test_planted_curves_raise_their_alarms(changes, raised):
    found = alarms(STEPS.assign(**changes), DPOConfig())
    assert ([one["alarm"] for one in found] == raised
            and all(one["detail"] and 0 <= one["step"] <= 100 for one in found))
    json.dumps(found, allow_nan=False)


def test_stuck_means_the_start_of_the_loss_at_hand():
    ipo = DPOConfig(loss="ipo", beta=0.5)  # starts at 1
    assert ([one["alarm"] for one in alarms(STEPS.assign(preference=0.999), ipo)]
            == ["stuck at the start"])
    assert not alarms(STEPS.assign(preference=math.log(2)), ipo)


def test_alarms_of_a_run_without_validation_and_of_an_empty_one():
    assert (alarms(STEPS[["step", "preference", "reward_accuracy", "chosen_shift"]], DPOConfig())
            == [])
    assert alarms(STEPS.iloc[:0], DPOConfig()) == []


def test_a_batch_is_padded_to_its_longest_pair(examples):
    batch = pair_batch(examples[:4], pad_id=7, multiple=16)
    assert (batch["chosen_input_ids"].shape == batch["rejected_labels"].shape
            and batch["chosen_input_ids"].shape[1] % 16 == 0)
    assert batch["chosen_input_ids"].shape[1] - max(example.length for example in examples[:4]) < 16


def test_words_alone_tell_built_in_pairs_apart():
    """`scripts/pair_words.py`, what a preference loss has to beat, on pairs that words do tell."""
    script = runpy.run_path(str(CHECKOUT / "scripts" / "pair_words.py"))
    (_, features), (_, other) = (script["read"]("synthetic", split, 300)
                                 for split in ("train", "validation"))
    model = script["fitted"](features, 0.01)
    assert script["right"](model, features).mean() > 0.95
    assert 0.7 < script["right"](model, other).mean()
    assert not script["right"](model, -features).mean() > 0.05  # the other way round
