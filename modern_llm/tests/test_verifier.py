"""The verifier: what it reads, how it is trained and saved, and that scores depend on nothing but
problem and answer.
"""

import math
import random
import re
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import (
    ConfigError, ModelConfig, VerifierConfig, get_pipeline_preset, override,
)
from modern_llm.data import synth
from modern_llm.data.answer_pairs import AnswerBatches, encode_candidate, fork_of, perturb
from modern_llm.data.tasks import solve, word_problems
from modern_llm.data.tokens import train_tokenizer
from modern_llm.evaluation.judging import TrainedOn
from modern_llm.files import atomic_folder
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model
from modern_llm.models.verifier import (
    VerifierModel, load_verifier, running_surprise, small_encoder, token_log_probs,
)
from modern_llm.runs.record import StageRun
from modern_llm.training.optim import LossOutput
from modern_llm.training.sft import save_chat_model
from modern_llm.training.train_step import micro_batches
from modern_llm.training.trainer import Trainer
from modern_llm.evaluation.reranking import (
    calibration_error, judgements, reliability, rerank_differences, trained_on_rows,
)
from modern_llm.training.verifier import VerifierTraining, sampling_plan, verifier_loss
from modern_llm.training.verifier_scores import start_from_surprise
from modern_llm.training.verifier_scores import (
    calibrate, read_answers, save_verifier, score, score_answers, token_scores,
)

CONTEXT = 160
CFG = VerifierConfig(batch_size=6, head_dropout=0.0, precision="fp32", max_steps=4,
                     checkpoint_every=2, log_every=1, warmup_steps=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in islice(synth.documents(), 300)], 400)


@pytest.fixture(scope="module")
def problems():
    return word_problems("synthetic", "train", 12, (1, 2))


@pytest.fixture(scope="module")
def samples(problems):
    "Problem 0 has right answers only, problem 1 wrong ones only, the others both."
    draw, rows = random.Random(0), []
    for number, problem in enumerate(problems):
        for sample, right in enumerate(
            [True, True] if number == 0 else [False, False] if number == 1 else [True, False]):
            text = (problem.answer if right
                    else re.sub(r"#### \d+", f"#### {problem.value + 1 + sample}", problem.answer))
            rows.append({"problem": number, "sample": sample, "level": problem.level, "text": text,
                         "right": right, "value": float(synth.extract_answer(text)),
                         "log_prob": -draw.random(), "consistent": right})
    return pd.DataFrame(rows)


def body(seed=0, **changes):
    torch.manual_seed(seed)
    settings = dict(vocab_size=400, context_length=CONTEXT, width=32, num_layers=2, num_heads=2,
                    num_kv_heads=1, ffn_width=64)
    model = ModernDecoderLM(ModelConfig(**settings | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def made(kind="generator", surprise=True, **changes):
    "A verifier whose every weight matters."
    cfg = replace(CFG, kind=kind, surprise=surprise)
    verifier = VerifierModel(
        small_encoder(body().cfg) if kind == "encoder" else body(**changes), cfg)
    torch.nn.init.normal_(verifier.head.weight, std=0.2)
    if verifier.surprise is not None:
        torch.nn.init.constant_(verifier.surprise, 0.02)
    return verifier


@pytest.fixture(params=["generator", "no surprise", "encoder"])
def verifier(request):
    return made("encoder" if request.param == "encoder" else "generator",
                request.param == "generator")


def batches(tokenizer, problems, samples, cfg=CFG, gold=(), context=CONTEXT, seed=0):
    return AnswerBatches(tokenizer, problems, samples, gold, cfg, context, seed)


# ---- what it reads -------------------------------------------------------------------------------


def test_running_surprise_equals_loops():
    random_state = torch.Generator().manual_seed(0)
    log_p = -torch.rand(3, 20, generator=random_state)
    runs = torch.tensor([[0] * 3 + [1] * 5 + [0] * 4 + [2] * 8, [1] * 20, [0] * 20])
    expected = torch.zeros(3, 20, 2)
    for b in range(3):
        for t in range(20):
            if runs[b, t]:
                seen = [log_p[b, i].item() for i in range(t + 1) if runs[b, i] == runs[b, t]]
                expected[b, t] = torch.tensor([sum(seen), min(seen)])
    assert torch.allclose(running_surprise(log_p, runs), expected, atol=1e-6)


def test_token_log_probs_are_those_of_the_model(tokenizer, problems):
    verifier = made().eval()
    ids, start = encode_candidate(tokenizer, problems[0], problems[0].answer)
    row = torch.tensor([ids])
    answer = torch.arange(len(ids))[None] >= start
    _, _, log_p, _ = verifier(row, answer)
    expected = (verifier.model(row).log_softmax(-1)[0, start - 1 : -1]
                    .gather(1, row[0, start:, None])[:, 0])
    assert torch.allclose(log_p[0, start:], expected, atol=1e-5) and (log_p[0, :start] == 0).all()
    hidden = verifier.model.hidden(row)[0]
    small_chunks = token_log_probs(verifier.model, hidden, row, answer, chunk_tokens=5)
    assert torch.allclose(small_chunks, log_p, atol=1e-6)
    one, other = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (
        small_chunks, token_log_probs(verifier.model, hidden, row, answer)))
    assert torch.allclose(one, other, atol=1e-5)


def test_score_depends_on_problem_and_answer_alone(verifier, tokenizer, problems, samples):
    asked = [problems[p] for p in samples.problem]
    alone = np.array([score(verifier, tokenizer, p, text) for p, text in zip(asked, samples.text)])
    assert len(set(alone.round(5))) > 10 and ((alone > 0) & (alone < 1)).all()
    for rows in (1, 5, 64):
        assert np.allclose(score_answers(verifier, tokenizer, asked, samples.text, batch_rows=rows),
                           alone, atol=1e-5)
    backwards = score_answers(verifier, tokenizer, asked[::-1], samples.text[::-1], batch_rows=7)
    assert np.allclose(backwards[::-1], alone, atol=1e-5)
    verifier.train()
    assert (score(verifier, tokenizer, asked[0], samples.text[0])
            == pytest.approx(alone[0], abs=1e-6) and verifier.training)


def test_packed_answers_do_not_see_each_other(verifier, tokenizer, problems, samples):
    batch = batches(tokenizer, problems, samples)(0)
    verifier.eval()
    packed = verifier.score_logits(batch["input_ids"], batch["answers"] > 0, batch["segment_ids"])
    for segment in (1, 2):
        inside = batch["segment_ids"][0] == segment
        if inside.any():
            alone = verifier.score_logits(batch["input_ids"][:1, inside],
                                          batch["answers"][:1, inside] > 0)
            answer = batch["answers"][0, inside] > 0
            assert torch.allclose(alone[0, answer], packed[0, inside][answer], atol=1e-4)


def test_score_is_causal_and_ends_where_score_answers_reads(verifier, tokenizer, problems):
    whole = problems[0].answer
    spoilt = whole[:-1] + ("1" if whole[-1] != "1" else "2")
    (tokens, one), (_, other) = (
        token_scores(verifier, tokenizer, problems[0], text) for text in (whole, spoilt))
    assert "".join(tokens) == whole + "<|end|>"
    assert np.allclose(one[:-2], other[:-2], atol=1e-6) and one[-1] != other[-1]
    assert score(verifier, tokenizer, problems[0], whole) == pytest.approx(one[-1], abs=1e-6)


def test_answers_that_do_not_fit_score_zero(tokenizer, problems):
    scores = score_answers(made(), tokenizer, problems[:2], ["7 " * CONTEXT, problems[1].answer])
    assert scores[0] == 0 and scores[1] > 0
    assert len(score_answers(made(), tokenizer, [], [])) == 0
    with pytest.raises(ValueError):
        score_answers(made(), tokenizer, problems[:2], ["one"])


# ---- training data -------------------------------------------------------------------------------


def test_perturb_changes_one_number_and_nothing_else():
    draw, text = random.Random(0), "0+12=<<0+12=12>>12 cups.\n#### 12"
    for _ in range(300):
        spoilt = perturb(text, draw)
        numbers = [list(map(int, re.findall(r"\d+", t))) for t in (text, spoilt)]
        assert sum(a != b for a, b in zip(*numbers)) == 1 and len(numbers[0]) == len(numbers[1])
        assert re.sub(r"\d+", "#", spoilt) == re.sub(r"\d+", "#", text)
    with pytest.raises(ValueError, match="no number"):
        perturb("nothing here", draw)


def test_batches_are_a_function_of_seed_and_step(tokenizer, problems, samples):
    one, other = (batches(tokenizer, problems, samples) for _ in range(2))
    other(0)
    for name, value in one(3).items():
        assert torch.equal(value, other(3)[name])
    assert not torch.equal(one(3)["input_ids"], one(4)["input_ids"])
    assert not torch.equal(one(3)["input_ids"],
                           batches(tokenizer, problems, samples, seed=1)(3)["input_ids"])


@pytest.mark.parametrize("kind", ["generator", "encoder"])
def test_batches_are_balanced_and_labelled(kind, tokenizer, problems, samples):
    source = batches(tokenizer, problems, samples, replace(CFG, kind=kind))
    batch = source(0)
    assert batch["input_ids"].shape == (6, CONTEXT)
    answers, weights, targets, segments = (
        batch[k] for k in ("answers", "weights", "targets", "segment_ids"))
    assert answers[targets == 1].sum().item() == pytest.approx(answers[targets == 0].sum().item())
    assert weights.sum().item() == pytest.approx(answers.sum().item())  # the number of answers
    assert ((weights > 0) <= (answers > 0)).all() and (segments[answers > 0] > 0).all()
    by_question = {p.question: p for p in problems}
    for row in range(6):
        for segment in range(1, int(segments[row].max()) + 1):
            inside = segments[row] == segment
            text = tokenizer.decode(batch["input_ids"][row, inside & (answers[row] > 0)].tolist())
            asked = tokenizer.decode(batch["input_ids"][row, inside & (answers[row] == 0)].tolist())
            right = targets[row, inside].max().item() == 1
            assert right == (text == by_question[asked].answer)
            assert (answers[row, inside].sum().item() == pytest.approx(1)
                    and weights[row, inside].sum().item() == pytest.approx(1))


def test_pairs_differ_from_the_fork_on_and_stand_ins_fill_one_sided_problems(
    tokenizer, problems, samples
):
    source = batches(tokenizer, problems, samples, replace(CFG, perturbed_fraction=0.0))
    draw, seen = random.Random(0), set()
    for _ in range(200):
        problem, right, wrong = source.pair(draw)
        seen.add(problems.index(problem))
        assert right == problem.answer != wrong
        a, b = (encode_candidate(tokenizer, problem, text)[0] for text in (right, wrong))
        fork = fork_of(a, b)
        assert a[:fork] == b[:fork] and a[fork] != b[fork]
    assert seen == set(range(12))


def test_only_gold_answers_if_nothing_was_sampled_and_an_error_if_nothing_fits(
    tokenizer, problems, samples
):
    source = batches(tokenizer, problems, samples[:0], gold=problems[:3])
    assert ({source.pair(random.Random(i))[0].question for i in range(50)}
            == {p.question for p in problems[:3]})
    with pytest.raises(ValueError, match="context of 20 tokens"):
        batches(tokenizer, problems, samples, context=20)


# ---- training ------------------------------------------------------------------------------------


def test_loss_is_a_sum_over_answers_however_the_batch_is_cut(verifier, tokenizer, problems,
                                                             samples):
    batch = batches(tokenizer, problems, samples)(0)
    verifier.eval()
    whole, parts = (verifier_loss(verifier, batch),
                    [verifier_loss(verifier, part) for part in micro_batches(batch, 2)])
    assert whole.count.item() == pytest.approx(sum(part.count.item() for part in parts), rel=1e-5)
    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-4)
    for name, value in whole.metrics.items():
        assert value.item() == pytest.approx(sum(part.metrics[name].item() for part in parts),
                                             rel=1e-4, abs=1e-5)


def test_an_untrained_head_costs_log_2_and_wrong_answers_teach_no_language(
    tokenizer, problems, samples
):
    batch = batches(tokenizer, problems, samples)(0)
    verifier = VerifierModel(body(), CFG)
    out = verifier_loss(verifier, batch, lm_weight=1.0)
    assert (out.metrics["judgement"] / out.count).item() == pytest.approx(math.log(2), rel=1e-4)
    wrong = {**batch, "targets": torch.zeros_like(batch["targets"])}
    assert verifier_loss(verifier, wrong).metrics["language"].item() == 0
    # the judgement reaches the language model through the hidden state alone, whose weights are
    # still zero
    torch.nn.init.constant_(verifier.surprise, 0.1)
    verifier_loss(verifier, batch, lm_weight=0.0).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in verifier.model.parameters())
    assert verifier.surprise.grad.any() and verifier.head.weight.grad.any()


def test_start_from_surprise_lowers_the_judgement(tokenizer, problems, samples):
    source = batches(tokenizer, problems, samples)
    verifier = VerifierModel(body(), CFG)
    start_from_surprise(verifier, map(source, range(3)))
    out = verifier_loss(verifier.eval(), source(0))
    assert ((out.metrics["judgement"] / out.count).item() < math.log(2)
            and verifier.surprise.abs().sum() > 0)
    assert not verifier.head.weight.any()


def test_training_learns_and_resumes_exactly(tokenizer, problems, samples, tmp_path):
    def train(folder, steps, resume=False, **options):
        verifier = VerifierModel(body(), CFG)
        cfg = replace(CFG, max_steps=steps, lr=2e-2, checkpoint_every=10)
        return Trainer(verifier, verifier_loss,
                       lambda step: batches(tokenizer, problems, samples)(0), cfg, folder,
                       resume=resume, save_model=lambda v, path: save_verifier(path, v, tokenizer),
                       progress_bar=False, **options)

    straight = train(tmp_path / "straight", 30)
    assert straight.fit().stopped == "finished"
    stopper = iter(range(100))
    train(tmp_path / "cut", 30, should_stop=lambda: next(stopper) == 6).fit()
    again = train(tmp_path / "cut", 30, resume=True)
    result = again.fit()
    one, other = (load_verifier(tmp_path / name / "checkpoint").state_dict()
                  for name in ("straight", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.history[-1]["judgement"] < 0.6 < result.history[0]["judgement"]


# ---- the control ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("start")
    save_chat_model(folder, body(), tokenizer)
    return folder


def training(start, folder, resume=False, **changes):
    """The stage's recipe, on a small model."""
    small = {"max_steps": 6, "levels": [1], "train_problems": 5, "validation_problems": 4,
             "samples_per_problem": 1, "validation_samples": 2, "max_new_tokens": 6,
             "eval_every": 6, "checkpoint_every": 2, "comparison_steps": 0}
    config = override(get_pipeline_preset("lesson"), {
        "data": {"tokenizer_vocab_size": 400}, "verifier": {**small, **changes}})
    return VerifierTraining(StageRun("verifier", "small", replace(config, model=body().cfg), "cpu",
                                     folder, resume, 0.0, {"checkpoint": start}))


def saved(folder):
    return load_model(folder / "checkpoint").state_dict()


def test_the_control_is_the_generator_trained_on_the_right_answers_of_the_same_batches(
    start, tmp_path
):
    recipe = training(start, tmp_path / "both", train_problems=8, gold_fraction=0.5)
    assert recipe.fit().stopped == "finished"
    cfg = recipe.train

    def language(model, batch):
        "The language-model term, by a model that has no other head."
        hidden, _ = model.hidden(batch["input_ids"], batch["segment_ids"])
        log_p = token_log_probs(model, hidden, batch["input_ids"], batch["answers"] > 0)
        nats = -(batch["answers"] * batch["targets"] * log_p).sum()
        return LossOutput(cfg.lm_weight * nats, batch["weights"].sum(), {})

    model = load_model(start)
    Trainer(model, language, recipe.batches(cfg), cfg, tmp_path / "alone", device="cpu",
            seed=recipe.run.config.seed, progress_bar=False).fit()
    control, before = saved(tmp_path / "both" / "control"), load_model(start).state_dict()
    for name, value in model.state_dict().items():
        moved = (control[name] - before[name]).abs().max()
        assert moved > 1e-3 and (control[name] - value).abs().max() < 1e-2 * moved, name
    training(start, tmp_path / "none", train_problems=8, gold_fraction=0.5, control=False).fit()
    one, other = (load_verifier(tmp_path / name / "checkpoint").state_dict()
                  for name in ("both", "none"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "none" / "control").exists()


def test_the_generator_alone_answers_what_is_calibrated_on(start, tmp_path, tokenizer):
    place = tmp_path / "sft"
    shutil.copytree(start, place / "checkpoint")
    (other := place / "checkpoints" / "step-000001").mkdir(parents=True)
    save_chat_model(other, body(seed=1), tokenizer)
    small = {"train_problems": 10, "samples_per_problem": 4}
    recipe = training(place / "checkpoint", tmp_path / "verifier", **small)
    alone = training(start, tmp_path / "alone", **small)
    kept = recipe.for_calibration
    assert kept.groupby("problem").size().to_dict() == {8: 2, 9: 2}
    of_generator = solve(load_model(start), tokenizer, recipe.own_problems, samples=2,
                         max_new_tokens=6, temperature=recipe.train.temperature, seed=0)
    assert kept.text.tolist() == of_generator.text[of_generator.problem >= 8].tolist()
    assert recipe.for_training.groupby("problem").size().tolist() == [4] * 8
    assert alone.for_calibration.groupby("problem").size().to_dict() == {8: 4, 9: 4}


@pytest.mark.parametrize("gold_problems", [0, 20])
def test_what_is_calibrated_on_is_not_trained_on(start, tmp_path, gold_problems):
    recipe = training(start, tmp_path, train_problems=20, gold_problems=gold_problems)
    assert recipe.for_calibration.problem.unique().tolist() == [16, 17, 18, 19]
    reserved = {problem.question for problem in recipe.own_problems[16:]}
    batches = recipe.batches(recipe.train)
    learned = {batches.pair(random.Random(i))[0].question for i in range(200)}
    assert len(learned) > 10 and not learned & reserved


def test_a_single_row_holds_a_pair_or_says_that_it_cannot(tokenizer, problems, samples):
    one = replace(CFG, batch_size=1)
    lengths = [len(encode_candidate(tokenizer, problem, problem.answer)[0])
               for problem in problems]
    # only the shorter half of the pairs fits
    tight = batches(tokenizer, problems, samples, one, context=max(2 * min(lengths) + 8,
                                                                  max(lengths) + 8))
    assert all(float(tight(step)["weights"].sum()) >= 1.99 for step in range(20))
    long = [problem for problem, length in zip(problems, lengths) if length > max(lengths) * 0.8]
    none = batches(tokenizer, long, samples.iloc[:0], one, context=max(lengths) + 4)
    with pytest.raises(ValueError, match="none of 100 pairs has room in 1 of 1 rows.*batch_size"):
        none(0)


def test_an_interrupted_control_goes_on_to_the_same_weights(start, tmp_path):
    training(start, tmp_path / "straight").fit()
    cut, asked = training(start, tmp_path / "cut"), []
    control = cut.control

    def stopping(cfg, folder):
        trainer = control(cfg, folder)
        trainer.should_stop = lambda: asked.append(0) or len(asked) == 3
        return trainer

    cut.control = stopping
    assert cut.fit().stopped == "stopped"
    assert training(start, tmp_path / "cut", resume=True).fit().stopped == "finished"
    one, other = (saved(tmp_path / name / "control") for name in ("straight", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_control_is_asked_as_the_generator_was_and_its_answers_are_kept(start, tmp_path):
    recipe = training(start, tmp_path)
    shutil.copytree(start, tmp_path / "control" / "checkpoint")
    greedy = recipe.answers("greedy", lambda: recipe.generator, recipe.held_problems)
    trained_on = TrainedOn(recipe)
    assert trained_on.greedy.tolist() == greedy.right.tolist()
    pd.testing.assert_frame_equal(trained_on.samples, recipe.held)
    held = recipe.held.assign(score=0.5)
    table = trained_on.curve(held, [1, 2]).set_index(["method", "size"]).value
    assert table["majority_trained_on"].tolist() == table["majority"].tolist()
    shutil.rmtree(tmp_path / "control")
    again = TrainedOn(recipe)
    assert again.rows(held, 2) == trained_on.rows(held, 2)
    none = TrainedOn(training(start, tmp_path, control=False))
    assert none.rows(held, 2) == [] and none.share is None
    assert set(none.curve(held, [1]).method) == set(table.index.levels[0]) - {"majority_trained_on"}


def test_differences_to_the_generator_trained_on_are_paired(samples):
    "The verifier chooses all that is right; the control's votes are right where its sample 0 is."
    held = samples.assign(score=samples.right * 0.8 + 0.1)
    own = samples.assign(right=samples.problem < 6, value=0.0)
    greedy = pd.Series(0.0, index=range(12))
    rows = {row["metric"]: row for row in trained_on_rows(held, greedy, own, 2)}
    assert list(rows) == ["greedy exact match, the generator trained on",
                          "majority@2, the generator trained on",
                          "weighted_vote@2 - greedy, the generator trained on",
                          "weighted_vote@2 - majority@2, the generator trained on"]
    assert [row["value"] for row in rows.values()] == pytest.approx([0, 1 / 2, 11 / 12, 5 / 12])
    assert all(row["n"] == 12 for row in rows.values())


def test_where_nothing_is_left_to_train_on_there_is_no_control():
    assert VerifierConfig().trains_control
    for changes in ({"control": False}, {"lm_weight": 0.0}, {"kind": "encoder"}):
        assert not replace(VerifierConfig(), **changes).trains_control
    with pytest.raises(ConfigError, match="control='maybe' is str, should be bool"):
        override(VerifierConfig(), {"control": "maybe"}, "verifier")


# ---- saving --------------------------------------------------------------------------------------


def test_saved_and_loaded_verifier_scores_alike(verifier, tokenizer, problems, samples, tmp_path):
    verifier.calibration.copy_(torch.tensor([0.7, 0.1, 0.2, -0.3]))
    with atomic_folder(tmp_path / "checkpoint") as folder:
        save_verifier(folder, verifier, tokenizer)
    other = load_verifier(tmp_path / "checkpoint")
    asked = [problems[p] for p in samples.problem]
    assert np.array_equal(*(score_answers(v, tokenizer, asked, samples.text)
                            for v in (verifier, other)))
    assert not other.training and other.is_encoder == verifier.is_encoder
    plain = load_model(tmp_path / "checkpoint")
    assert torch.equal(plain.embed_tokens.weight, verifier.model.embed_tokens.weight)


def test_calibration_given_when_saving_changes_the_file_alone(tokenizer, problems, tmp_path):
    verifier = made()
    save_verifier(tmp_path, verifier, tokenizer, calibration=(0.0, 2.0, 0.5, -1.0))
    assert not verifier.calibration.any()
    asked = [problems[0]], [problems[0].answer]
    (_, total, lowest), after = read_answers(verifier, tokenizer, *asked)[0], score(
        load_verifier(tmp_path), tokenizer, problems[0], problems[0].answer)
    assert math.log(after / (1 - after)) == pytest.approx(2 * total + 0.5 * lowest - 1, abs=1e-3)


def test_gold_rows_are_for_the_language_model_alone(tokenizer, problems, samples):
    cfg = replace(CFG, gold_fraction=0.5)
    batch = AnswerBatches(tokenizer, problems, samples, problems, cfg, CONTEXT)(3)
    rows = round(0.5 * cfg.batch_size)
    assert not batch["weights"][:rows].any() and batch["weights"][rows:].any()
    assert ((batch["targets"][:rows][batch["answers"][:rows] > 0] == 1).all()
            and (batch["answers"][:rows].sum(1) > 0).all())


@pytest.mark.fault("marking")
def test_an_answer_without_digits_is_never_spoilt(tokenizer):
    half, three = (synth.Problem("What is half of 1?", "#### ½", 1, 0.5),
                   synth.Problem("What is 1 plus 2?", "1+2=<<1+2=3>>3\n#### 3", 1, 3))
    samples = pd.DataFrame([(0, "#### ½", True), (1, "#### 3", True), (1, "I cannot say.", False)],
                           columns=["problem", "text", "right"])
    made_of = batches(tokenizer, [half, three], samples, gold=[half, three])
    assert made_of.gold == [three] and made_of.sampled == [1]
    assert (all(made_of.pair(random.Random(seed)) for seed in range(50))
            and made_of(0)["answers"].any())


def test_loading_something_else_is_refused(tokenizer, tmp_path):
    save_model(tmp_path, body())
    with pytest.raises(FileNotFoundError, match="no verifier.json"):
        load_verifier(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_verifier(tmp_path / "nothing")
    save_verifier(tmp_path, made(), tokenizer)
    (tmp_path / "verifier.json").write_text('{"kind": "generator", "surprise": false}')
    with pytest.raises(ValueError, match="does not fit"):
        load_verifier(tmp_path)


# ---- judging -------------------------------------------------------------------------------------


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("count", [0, 1, 5])
def test_without_an_answer_that_fits_nothing_is_calibrated(count):
    assert calibrate(np.full((count, 3), np.nan), np.ones(count, bool)) == [1.0, 0.0, 0.0, 0.0]


def test_calibrate_finds_the_weights_and_gives_none_a_negative_sign():
    draw = np.random.default_rng(0)
    parts = draw.normal(0, 1, (5000, 3))
    right = draw.random(5000) < 1 / (1 + np.exp(-(parts @ [0.5, 1.5, 0.0] - 1)))
    assert np.allclose(calibrate(parts, right), (0.5, 1.5, 0, -1), atol=0.2)
    assert min(calibrate(parts, ~right)[:3]) >= 0
    for kind in (np.zeros(5000, bool), np.ones(5000, bool)):
        weights = calibrate(parts, kind)
        assert weights[:3] == [1.0, 0.0, 0.0] and (weights[3] > 0) == kind[0]
    for one, labels in (([0.3, 0.4], [False, False]), ([1.0, 0.0], [True, False]),
                        ([0.5], [True]), ([np.nan, 1], [True, False])):
        assert np.isfinite(calibrate(np.array([one, one, one]).T, np.array(labels))).all()


def test_reliability_covers_every_answer_once():
    draw = np.random.default_rng(0)
    scores = draw.random(1003)
    right = draw.random(1003) < scores
    table = reliability(scores, right)
    assert table.n.sum() == 1003 and len(table) == 10 and table.score.is_monotonic_increasing
    assert (calibration_error(table) < 0.06
            < calibration_error(reliability(scores, draw.random(1003) < 0.5)))
    assert len(reliability(scores[:3], right[:3])) == 3


def test_judgements_and_differences(samples):
    perfect = samples.assign(score=samples.right * 0.8 + 0.1)
    rows = {row["metric"]: row for row in judgements(perfect, {"it": "score"})}
    assert rows["pooled AUC, it"]["value"] == rows["within-problem AUC, it"]["value"] == 1
    assert rows["within-problem AUC, it"]["n"] == 10
    one_sided = judgements(perfect[perfect.problem < 1], {"it": "score"})
    assert [row["value"] for row in one_sided] == [None, None]
    greedy = pd.Series(0.0, index=range(12))
    found = {row["metric"]: row for row in rerank_differences(perfect, greedy, 2)}
    level_2 = samples[samples.level == 2].problem.unique()
    assert (found["weighted_vote@2 - greedy"]["value"]
            == pytest.approx(np.mean([p != 1 for p in level_2])))
    assert found["best_of_n@2 - random@2"]["n"] == len(level_2)
    assert rerank_differences(perfect[perfect.level == 1], greedy, 2)[0]["n"] == 12 - len(level_2)


def test_sampling_plan_uses_kept_weights(tmp_path):
    start = tmp_path / "checkpoint"
    assert sampling_plan(start, 16) == [(start, 16)]
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    plan = sampling_plan(start, 16)
    assert [n for _, n in plan] == [10, 2, 2, 2] and plan[1][0].name == "step-000010"
    assert sampling_plan(start, 4) == [(start, 4)]


def test_settings():
    for name in ("lesson", "local-smoke", "local-cpu", "tacc-h100"):
        assert get_pipeline_preset(name).verifier.max_steps > 0
    assert get_pipeline_preset("tacc-h100").verifier.problems == "gsm8k"
    for values in ({"gold_problems": -1}, {"validation_samples": 0},
                   {"kind": "both"}, {"perturbed_fraction": 1.0}):
        with pytest.raises(ConfigError):
            override(VerifierConfig(), values)
