"""GRPO: what a round is made of, that a resumed run goes on exactly, what is refused."""

import dataclasses
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modern_llm.config import (
    ConfigError, ModelConfig, PipelineConfig, get_pipeline_preset, override,
)
from modern_llm.data.chat import encode_prompt, end_id
from modern_llm.data.sources import DataError
from modern_llm.data.tasks import word_problems
from modern_llm.data.tokens import load_tokenizer, train_tokenizer
from modern_llm.models.counts import adapter_parameters, flops_per_token, forward_flops
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model
from modern_llm.runs.pipeline import Plan
from modern_llm.runs.record import StageRun
from modern_llm.training import grpo
from modern_llm.training.distributed import on_ranks
from modern_llm.training.grpo import RewardTraining, exact_reward, grpo_loss, reward_of
from modern_llm.training.sft import save_chat_model
from modern_llm.training.train_step import micro_batches

SHAPE = ModelConfig(vocab_size=400, context_length=128, width=32, num_layers=2, num_heads=2,
                    num_kv_heads=1, ffn_width=64)
TRAIN = {"levels": [1], "train_problems": 12, "validation_problems": 4, "batch_size": 8,
         "group_size": 4, "steps_per_round": 3, "max_new_tokens": 12, "max_steps": 7,
         "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 1, "log_every": 1,
         "eval_every": 7, "checkpoint_every": 2, "keep_checkpoints": 0, "precision": "fp32"}


def paid_for_length(problems, answers):
    """A reward that a model of random weights can earn."""
    return (answers.text.str.len() % 3).to_numpy(float)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    texts = [f"{problem.question} {problem.answer}"
             for problem in word_problems("synthetic", "train", 300)]
    torch.manual_seed(0)
    model = ModernDecoderLM(SHAPE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = train_tokenizer(texts, 400)
    with torch.no_grad():  # so that answers end
        model.embed_tokens.weight[end_id(tokenizer)] *= 8
    folder = tmp_path_factory.mktemp("start")
    save_chat_model(folder, model, tokenizer)
    return folder


def recipe(start, folder, resume=False, world=None, **changes):
    config = override(get_pipeline_preset("lesson"), {
        "data": {"tokenizer_vocab_size": 400}, "grpo": {**TRAIN, "control": False, **changes}})
    config = dataclasses.replace(config, model=SHAPE)
    run = StageRun("grpo", "small", config, "cpu", folder, resume, 0.0, {"checkpoint": start},
                   world=world)
    return RewardTraining(run)


@pytest.fixture
def paid(monkeypatch):
    monkeypatch.setattr(grpo, "exact_reward", paid_for_length)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- a round -------------------------------------------------------------------------------------


def test_a_round_holds_what_the_policy_wrote(start, tmp_path, paid):
    made = recipe(start, tmp_path)
    batches, tokenizer = made.rollouts(), load_tokenizer(start)
    found = [batches(step) for step in range(3)]
    assert [len(batch["reward"]) for batch in found] == [8, 8, 8]
    asked = batches.asked(0)
    assert len(asked) == len(set(asked)) == 6  # two problems a step, none twice
    ids, answer = (torch.cat([batch[name] for batch in found]) for name in ("input_ids", "answer"))
    for row, number in enumerate(np.repeat(asked, 4)):
        prompt = encode_prompt(tokenizer, made.problems[number].question)
        assert ids[row, :len(prompt)].tolist() == prompt and not answer[row, :len(prompt)].any()
        length = int(answer[row].sum())
        assert answer[row, len(prompt):len(prompt) + length].all() and 1 <= length <= 13
        last = ids[row, len(prompt) + length - 1] == end_id(tokenizer)
        assert bool(last) == bool(torch.cat([batch["ended"] for batch in found])[row])
    logits = made.model(ids).log_softmax(-1)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * answer[:, 1:]
    old = torch.cat([batch["old_log_p"] for batch in found])
    assert torch.allclose(old[:, 1:], expected, atol=1e-4) and not old[:, 0].any()
    rewards = torch.cat([batch["reward"] for batch in found]).view(-1, 4)
    spread = torch.cat([batch["spread"] for batch in found]).view(-1, 4)
    assert torch.equal(spread[:, 0] > 0, rewards.amax(1) > rewards.amin(1)) and spread.any()


def test_rounds_differ_and_repeat_with_their_seed(start, tmp_path):
    made = recipe(start, tmp_path)
    one, again = made.rollouts(), made.rollouts()
    assert all(torch.equal(one(0)[name], again(0)[name]) for name in one(0))
    size = len(one.asked(0))
    epoch = np.concatenate([one.asked(number) for number in range(2)])
    assert sorted(epoch) == list(range(2 * size)) == list(range(len(made.problems)))
    assert one.asked(2).tolist() != one.asked(0).tolist()


def test_the_loss_does_not_hang_on_how_a_batch_is_cut(start, tmp_path, paid):
    made = recipe(start, tmp_path, kl_weight=0.1, per_token=True)
    batch, model = made.rollouts()(0), load_model(start)
    with torch.no_grad():
        model.embed_tokens.weight += 0.01
    cfg = dataclasses.replace(made.train, clip=0.05)
    with torch.no_grad():
        whole = grpo_loss(model, batch, cfg)
        parts = [grpo_loss(model, part, cfg) for part in micro_batches(batch, 3)]
    assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), abs=1e-5)
    assert whole.count == sum(part.count for part in parts) == 8
    assert 0 < float(whole.metrics["clipped"]) and float(whole.metrics["distance"]) > 0
    tokens = batch["answer"].sum(1)
    # every token of the step counts the same: the weights of all tokens add up to the answers
    assert float((batch["weight"] * tokens).sum()) == pytest.approx(8)
    assert batch["weight"].unique().numel() == 1


def test_a_right_answer_is_paid_only_where_it_ends():
    answers = pd.DataFrame({"right": [True, True, False], "ended": [True, False, True]})
    assert exact_reward([], answers).tolist() == [1.0, 0.0, 0.0]


# ---- training ------------------------------------------------------------------------------------


def test_what_is_paid_for_becomes_likelier(start, tmp_path, paid, monkeypatch):
    monkeypatch.setattr(grpo, "exact_reward",
                        lambda problems, answers: (answers.tokens < 4).to_numpy(float))
    made = recipe(start, tmp_path, max_steps=24, batch_size=32, group_size=8, steps_per_round=2)
    made.fit()
    rewards = [row["reward"] for row in rows_of(tmp_path)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


def test_paid_by_the_reward_alone_it_is_sft_on_right_answers(start, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "exact_reward",
                        lambda problems, answers: (answers.text.str.len() % 2).to_numpy(float))
    made = recipe(start, tmp_path, advantage="reward")
    batch = made.rollouts()(0)
    assert 0 < batch["reward"].sum() < len(batch["reward"])

    def gradient(loss):
        made.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in made.model.parameters()])

    found = gradient(grpo_loss(made.model, batch, made.train).total)
    ids, answer, right = (batch[name] for name in ("input_ids", "answer", "reward"))
    nats = F.cross_entropy(made.model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    per_answer = (nats * answer[:, 1:]).sum(1) / answer.sum(1)
    torch.testing.assert_close(found, gradient(per_answer[right > 0].sum()))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "kl_weight": 0.1}], ids=["plain", "lora"])
@pytest.mark.parametrize("stop", [3, 5])  # between two rounds, and in the middle of one
def test_a_resumed_run_goes_on_exactly(start, tmp_path, paid, changes, stop):
    recipe(start, tmp_path / "straight", **changes).fit()
    cut = recipe(start, tmp_path / "cut", **changes)
    original, calls = cut.run.trainer, iter(range(1, 100))
    cut.run.trainer = lambda *args, **others: original(
        *args, **{"should_stop": lambda: next(calls) == stop, **others})
    assert cut.fit().stopped == "stopped"
    assert recipe(start, tmp_path / "cut", resume=True, **changes).fit().step == 7
    one, other = (load_model(tmp_path / name / "checkpoint").state_dict()
                  for name in ("straight", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not all(torch.equal(value, load_model(start).state_dict()[name])
                   for name, value in one.items())
    rows = [[(row["step"], row["loss"], row["reward"]) for row in rows_of(tmp_path / name)]
            for name in ("straight", "cut")]
    assert rows[0] == rows[1]


def test_two_ranks_learn_as_one(start, tmp_path, paid):
    def train(folder, world=None):
        made = recipe(start, folder, world=world)
        made.fit()
        return rows_of(tmp_path / "together") if world else rows_of(folder)

    alone = train(tmp_path / "alone")
    together = on_ranks(partial(train, tmp_path / "together"))[0]
    for name in ("loss", "reward", "answer_tokens"):
        assert [row[name] for row in together] == pytest.approx(
            [row[name] for row in alone], abs=1e-4)


def test_a_round_that_is_gone_is_named(start, tmp_path):
    batches = recipe(start, tmp_path).rollouts()
    with pytest.raises(DataError, match=r"round-00001.safetensors is gone.*force=True"):
        batches(4)


def test_rounds_are_whole_files_and_the_control_reads_gold_answers(start, tmp_path, paid):
    made = recipe(start, tmp_path, control=True, max_steps=3, checkpoint_every=3)
    made.fit()
    files = sorted(path.name for path in (tmp_path / "rounds").iterdir())
    assert files == ["round-00000.safetensors"]
    assert len(load_file(tmp_path / "rounds" / files[0])["reward"]) == 24
    assert len(rows_of(tmp_path / "control")) == 5  # 10/6 of three steps
    batch = made.gold_batch(0)
    text = made.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0].tolist())
    assert any(problem.answer == text for problem in made.problems)


@pytest.mark.parametrize("changes, steps", [
    ({}, 10), ({"kl_weight": 0.1}, 12), ({"lora_rank": 2}, 12),
    ({"lora_rank": 2, "kl_weight": 0.1}, 15)])
def test_the_control_costs_as_much(start, tmp_path, changes, steps):
    made = recipe(start, tmp_path, max_steps=6, **changes)
    assert made.control(made.train, tmp_path / "control").cfg.max_steps == steps
    whole, cfg = forward_flops(SHAPE), made.train
    # attention and adapters cost something too, which the rule leaves out
    read = sum(whole.values()) - whole["attention"]
    trained = (flops_per_token(SHAPE, lora_rank=cfg.lora_rank) - 3 * whole["attention"]
               - 6 * adapter_parameters(SHAPE, cfg.lora_rank))
    own = 6 * (trained + (2 + bool(cfg.kl_weight)) * read)
    assert own == steps * trained


def test_the_control_reads_every_gold_answer_once_an_epoch(start, tmp_path):
    made = recipe(start, tmp_path)
    asked, gold = [], made.gold
    made.gold = lambda problem: asked.append(problem.question) or gold(problem)
    for step in range(6):  # eight a step: an epoch of twelve ends within every second one
        made.gold_batch(step)
    epochs = [asked[i:i + 12] for i in range(0, 48, 12)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and epochs[0] != epochs[1]


# ---- what is refused, and what "all" means -------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"group_size": 1}, "grpo.group_size=1 must be at least 2"),
    ({"batch_size": 12, "group_size": 8}, "grpo.group_size=8 does not divide grpo.batch_size=12"),
    ({"problems": "gsm8"}, "grpo.problems='gsm8' is unknown.*gsm8k"),
    ({"advantage": "reward s"}, "grpo.advantage='reward s' is unknown.*did you mean 'reward'"),
    ({"temperature": 0.0}, "grpo.temperature=0.0 must be greater than 0"),
    ({"kl_weight": -1.0}, "grpo.kl_weight=-1.0 must be 0 or greater"),
    ({"levels": [6]}, "grpo.levels"),
    ({"reward": ""}, "grpo.reward is empty"),
    ({"compile": True}, "grpo.compile=True must be false"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(PipelineConfig(), {"grpo": changes})


def test_a_reward_that_is_no_verifier_names_what_was_tried(start):
    with pytest.raises(DataError, match=r"(?s)neither \"exact\" nor the folder.*--stage verifier"):
        reward_of(str(start), "cpu")


def test_sharded_weights_are_refused(start, tmp_path):
    config = override(get_pipeline_preset("lesson"), {
        "hardware": {"ranks": 2, "strategy": "fsdp"}})
    run = StageRun("grpo", "small", config, "cpu", tmp_path, False, 0.0, {"checkpoint": start})
    with pytest.raises(ConfigError, match="grpo: hardware.strategy='fsdp'.*strategy=ddp"):
        RewardTraining(run)


def test_all_stages_mean_it_only_where_that_is_asked(tmp_path):
    stages = lambda *more: Plan("all", preset="lesson", run="it", output_dir=str(tmp_path),
                                overrides=" ".join(more)).stages
    assert "grpo" not in stages() and stages("grpo.with_all=true")[3] == "grpo"
    assert Plan("grpo", preset="lesson", run="it", output_dir=str(tmp_path)).stages == ["grpo"]
