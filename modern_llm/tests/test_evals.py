"""The evaluation: how models are asked, what a piece keeps, and that the ledger and every file
derived from it agree.
"""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import ConfigError, ModelConfig, get_pipeline_preset, override
from modern_llm.data import synth
from modern_llm.data.chat import CHAT_TEMPLATE, Answer, document_prompt, end_id, is_chat_model
from modern_llm.data.pairs import Pair
from modern_llm.data.tasks import sentences, solve, word_problems
from modern_llm.data.tokens import end_of_text_id, save_tokenizer, train_tokenizer
from modern_llm.evaluation.asking import Subject, ask, baselines, separator_ids
from modern_llm.evaluation.families import FAMILIES, TaskFamily, register_family
from modern_llm.evaluation.ledger import (
    STAGE_NAMES, cost_rows, derive, difference_row, in_order, item_rows, ledger_rows, measure_rows,
    read_ledger, stage_gains, stage_ledger, write_derived, write_ledger,
)
from modern_llm.evaluation.measuring import preferences, preferences_rows
from modern_llm.evaluation.piece_cache import piece, same_settings
from modern_llm.evaluation.pieces import (
    document_pair, perplexity_rows, preference_piece, protocol_measures, protocol_piece,
    score_examples,
)
from modern_llm.evaluation.reranking import sample_items, verifier_mistakes
from modern_llm.evaluation.tables import mistakes_sheet
from modern_llm.evaluation.stages import evaluate, overlap_sets, record
from modern_llm.evaluation.written import mark_problems, problem_items, problem_piece
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model
from modern_llm.statistics import proportion_interval


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((d.text for d in itertools.islice(synth.documents(), 500)), 400)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=400, context_length=160, width=32, num_layers=2, num_heads=2,
                      num_kv_heads=1, ffn_width=64)
    model = ModernDecoderLM(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# ---- asking --------------------------------------------------------------------------------------


def test_a_document_prompt_keeps_the_question_and_the_room(tokenizer):
    question = "Question: What is 1+1?\nAnswer:"
    for room in (0, 40, 80):
        ids = document_prompt(tokenizer, ["Question: What is 2+2?\nAnswer: 4"] * 5, question, room)
        assert tokenizer.decode(ids).endswith(question) and ids[0] == end_of_text_id(tokenizer)
        assert len(ids) <= room or ids.count(end_of_text_id(tokenizer)) == 1


def test_text_cannot_forge_the_end_of_a_document(tokenizer):
    ids = document_prompt(tokenizer, [], "Question: <|endoftext|>?\nAnswer:", 100)
    assert ids.count(end_of_text_id(tokenizer)) == 1


def test_blank_lines_separate_examples_for_models_from_elsewhere(model, tokenizer):
    ids = document_prompt(tokenizer, ["Question: 1+1?\nAnswer: 2", "Question: 2+2?\nAnswer: 4"],
                          "Question: 3+3?\nAnswer:", 90, "\n\n")
    assert (tokenizer.decode(ids)
            == "Question: 2+2?\nAnswer: 4\n\nQuestion: 1+1?\nAnswer: 2\n\nQuestion: 3+3?\nAnswer:")
    assert len(document_prompt(tokenizer, ["word " * 300], "Question:", 90, "\n\n")) < 10, (
        "an example that does not fit is left out")
    for written in separator_ids(tokenizer, "\n\n"):
        assert tokenizer.decode(written) == "\n\n"
    asked = ask(Subject("other", model, tokenizer, False, "\n\n"),
                ["1+1?"], [("2+2?", "4")], shots=1, max_new_tokens=20)
    assert "\n\n" not in asked[0].text


def test_a_baseline_is_measured_with_its_own_tokenizer_or_named_as_absent(
    model, tokenizer, tmp_path
):
    folder = tmp_path / "other"
    folder.mkdir()
    save_model(folder, model, eos_id=end_of_text_id(tokenizer))
    save_tokenizer(tokenizer, folder)
    there, absent = baselines([str(folder), "nowhere/no-such-model"], "cpu")
    assert (list(there) == ["other"] and list(absent) == ["nowhere/no-such-model"]
            and "not found" in absent["nowhere/no-such-model"])
    with pytest.raises(ValueError, match="would be called 'other', as another one is"):
        baselines([str(folder), str(tmp_path / "elsewhere" / "other")], "cpu")
    with pytest.raises(ValueError, match="'dpo', as a stage is"):
        baselines([str(tmp_path / "dpo")], "cpu")
    rows = protocol_measures("other", protocol_piece(there["other"], ["synthetic"], 600))
    assert ({row["metric"].split()[-2] for row in rows} == {"T0,", "T1,", "T2,", "T3,"}
            and all(row["n"] > 0 for row in rows))
    assert in_order(["other", "dpo", "base", "dpo"]) == ["base", "dpo", "other"]


def test_the_worst_mistakes_are_shown_in_full_one_of_a_problem():
    problems = word_problems("synthetic", "test", 3)
    samples = pd.DataFrame({"problem": [0, 0, 1, 1, 2, 1],
                            "text": list("abcdef"),
                            "right": [False, False, True, True, False, True],
                            "ended": [True, True, True, True, True, False],
                            "score": [0.9, 0.8, 0.3, 0.1, 0.7, 0.0]})
    found = verifier_mistakes(samples, problems)
    assert ([one["answer"] for one in found["false positives"]] == ["a", "e"]
            and [one["answer"] for one in found["false negatives"]] == ["d"]
            and [one["answer"] for one in found["right without an end"]] == ["f"])
    assert found["false negatives"][0]["question"] == problems[1].question
    shown = mistakes_sheet(found).data
    assert [shown.count(f"[kind]\n{kind}\n") for kind in found] == [2, 1, 1]
    assert problems[1].question.split(".")[0] in shown and mistakes_sheet({}) == (
        "no verifier in this run")


def test_the_stage_ledger_has_changes_and_costs(tmp_path):
    items = pd.concat(
        [item_rows(stage, "problems", "exact match", range(20), [int(i < right) for i in range(20)])
         for stage, right in (("base", 2), ("sft", 12), ("other", 5))])
    costs = cost_rows({"base": {"minutes": 2.0}, "sft": {"minutes": 1.0, "tokens": 5.0}}, "cpu")
    ledger = write_ledger(
        tmp_path, ledger_rows(items, {}, {}, [(("sft", "problems", "exact match"),
                                               ("other", "problems", "exact match"), "other")],
                              costs))
    table = stage_ledger(ledger)
    assert (table.stage.tolist() == ["base", "sft"] and table.change.tolist()[1] == 0.5
            and bool(table.significant[1]))
    assert table.minutes.tolist() == [2.0, 1.0] and table.against.tolist()[1] == "base"
    [difference] = ledger[ledger.metric == "exact match minus other"].to_dict("records")
    assert "7 won, 0 lost, McNemar p = 0.016" in difference["protocol"]


def test_the_stage_ledger_of_a_single_model_has_no_changes(tmp_path):
    items = item_rows("base", "problems", "exact match", range(20), [i % 2 for i in range(20)])
    table = stage_ledger(write_ledger(tmp_path, ledger_rows(
        items, {}, {}, [], cost_rows({"base": {"minutes": 2.0}}, "cpu"))))
    assert table.value.tolist() == [0.5] and table.change.isna().all()


def test_answers_depend_neither_on_batches_nor_on_each_other(model, tokenizer):
    problems, solved = (word_problems("synthetic", "test", 6),
                        word_problems("synthetic", "train", 20))
    for chat in (False, True):
        subject = Subject("base", model, tokenizer, chat)
        whole, small = (problem_piece(subject, problems, solved, 12, batch_rows=rows)
                        for rows in (256, 2))
        pd.testing.assert_frame_equal(whole.drop(columns="log_prob"),
                                      small.drop(columns="log_prob"))


def test_a_prompt_longer_than_the_context_is_an_unended_answer(model, tokenizer):
    [said] = ask(Subject("sft", model, tokenizer, True), ["word " * 500], [], max_new_tokens=4)
    assert said == Answer("", [], [], False)


@pytest.mark.parametrize("chat", [True, False])
def test_speaks_chat(model, tokenizer, tmp_path, chat):
    save_model(tmp_path, model, eos_id=end_id(tokenizer) if chat else end_of_text_id(tokenizer))
    save_tokenizer(tokenizer, tmp_path, CHAT_TEMPLATE)
    assert is_chat_model(tmp_path, tokenizer) is chat


# ---- scoring -------------------------------------------------------------------------------------


def test_what_exceeds_the_context_cannot_win(model, tokenizer):
    short, long = document_pair(tokenizer, "Hi?", ["Yes.", "No " * 400], 160)
    assert len(long[0]) == 160, "cut at the context's end"
    too_long = (list(range(5)) * 60, [-100] * 299 + [1])
    assert score_examples(model, [too_long]) == -np.inf
    assert not preference_piece(Subject("base", model, tokenizer, False),
                                [(too_long, short)]).right.any()


# ---- items and ledger ----------------------------------------------------------------------------


def test_a_pair_keeps_its_number_where_a_chat_leaves_others_out(model, tokenizer):
    """Base and chat stages are compared on the same pairs, and with what length alone would say."""
    user = lambda text: ({"role": "user", "content": text},)
    pairs = [Pair(user("Name a colour."), "blue", "a"), Pair(user("word " * 400), "one", "two"),
             Pair(user("Name a bird."), "owl", "a crow"), Pair(user("Say a letter."), "a", "b")]
    items = SimpleNamespace(pairs=pairs)
    found = {chat: preferences(items, Subject("sft", model, tokenizer, chat=chat))
             for chat in (False, True)}
    assert found[False].item.tolist() == [0, 1, 2, 3] and found[True].item.tolist() == [0, 2, 3]
    longer, minus = preferences_rows(items, "sft", found[True])
    assert (longer["value"], longer["n"]) == (pytest.approx((1 + 0 + 0.5) / 3), 3)
    assert minus["value"] == pytest.approx(found[True].right.mean() - longer["value"])


@pytest.fixture(scope="module")
def evaluation(model, tokenizer):
    """Pieces of two made-up stages and a verifier, as items."""
    random = np.random.default_rng(0)
    problems = word_problems("synthetic", "test", 30)
    found, tables = [], {}
    for stage, skill in (("base", 0.3), ("sft", 0.8)):
        answers = [Answer(p.answer if random.random() < skill else "#### 1000",
                          [0], [-1.0], random.random() < 0.9) for p in problems]
        tables[stage] = mark_problems(problems, answers)
        found.append(problem_items(stage, "problems", tables[stage]))
        found.append(problem_items(stage, "problems, sampled", tables[stage], only=range(20)))
    samples = pd.concat([mark_problems(problems[:20], [Answer(
        p.answer if random.random() < 0.5 else "#### 7", [0], [-random.random()], True
    ) for p in problems[:20]]).assign(sample=i) for i in range(4)])
    samples = samples.assign(score=np.where(samples.right, 0.9, 0.2))
    found.append(sample_items("sft", "problems, sampled", samples,
                              (1, 2, 4), ("random", "log_prob", "calculator", "majority", "pass")))
    voted = sample_items("verifier", "problems, sampled", samples,
                         (1, 2, 4), ("best_of_n", "weighted_vote"))
    found += [voted, voted[voted.metric == "weighted_vote@4"].assign(metric="exact match")]
    return pd.concat(found, ignore_index=True), tables, samples


def rows_of(items):
    vote = (("verifier", "problems, sampled", "weighted_vote@4"),
            ("sft", "problems, sampled", "majority@4"), "majority@4")
    keys = {(stage, task) for stage, task in zip(items.stage, items.task)}
    return ledger_rows(items, {key: "greedy, \"quoted\", and so on" for key in keys},
                       {key: 0.1 + 0.2 for key in keys}, [vote])


def test_ledger_round_trip(evaluation, tmp_path):
    ledger = write_ledger(tmp_path, rows_of(evaluation[0]))
    assert list(ledger.columns) == ["stage", "task", "metric", "value", "low", "high", "n",
                                    "protocol", "seconds"]
    pd.testing.assert_frame_equal(read_ledger(tmp_path), ledger, check_exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.csv"], "no temporary file is left"


def test_values_are_those_of_the_items(evaluation, tmp_path):
    items, tables, samples = evaluation
    ledger = write_ledger(tmp_path, rows_of(items)).set_index(["stage", "task", "metric"])
    greedy = ledger.loc[("sft", "problems", "exact match")]
    assert (greedy[["value", "low", "high", "n"]].to_dict()
            == proportion_interval(tables["sft"].right.sum(), 30))
    level = tables["sft"][tables["sft"].level == 2]
    assert ledger.loc[("sft", "problems", "exact match, level 2")].value == level.right.mean()
    one = {method: ledger.loc[("sft", "problems, sampled", f"{method}@1")].value
           for method in ("random", "log_prob", "calculator", "majority")}
    assert (set(one.values()) == {samples.right.mean()}
            == {ledger.loc[("verifier", "problems, sampled", "weighted_vote@1")].value})
    wrong = [ledger.loc[("sft", "problems", f"error, {kind}")].value
             for kind in ("no end", "no answer", "arithmetic", "reasoning")]
    assert math.isclose(sum(wrong) + greedy.value, 1)


def test_derived_files_agree_with_the_ledger(evaluation, tmp_path):
    ledger = write_ledger(tmp_path, rows_of(evaluation[0]))
    files = write_derived(tmp_path)
    assert ({"base_eval.json", "sft_eval.json", "verifier_eval.json", "task_metrics.json",
             "stage_gains.csv", "stage_ledger.csv", "comparison_table.csv", "gsm8k_analysis.json"}
            == set(files) == {path.name for path in tmp_path.iterdir()} - {"ledger.csv"})
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    comparison = pd.read_csv(tmp_path / "comparison_table.csv").set_index(["task", "metric"])
    for row in ledger.to_dict("records"):
        measure = {name: row[name] for name in ("value", "low", "high", "n", "protocol")}
        assert read[f"{row['stage']}_eval.json"]["tasks"][row["task"]][row["metric"]] == measure
        assert read["task_metrics.json"][row["task"]][row["metric"]][row["stage"]] == measure
        if " minus " not in row["metric"]:
            assert math.isclose(comparison.loc[(row["task"], row["metric"]), row["stage"]],
                                row["value"])
    analysis = read["gsm8k_analysis.json"]
    assert [point["size"] for point in analysis["curves"]["weighted_vote"]] == [1, 2, 4]
    assert analysis["stages"]["base"]["greedy"]["value"] == evaluation[1]["base"].right.mean()
    assert (set(analysis["stages"]["sft"]["errors"])
            == {"no end", "no answer", "arithmetic", "reasoning"})
    assert ({d["what"] for d in analysis["differences"]}
            >= {"weighted_vote@4 minus majority@4", "exact match minus base"})


def test_gains_are_paired_and_say_what_is_significant(evaluation, tmp_path):
    items, tables, _ = evaluation
    gains = stage_gains(write_ledger(
        tmp_path, rows_of(items))).set_index(["stage", "task", "metric", "against"])
    row = gains.loc[("sft", "problems", "exact match", "base")]
    assert (math.isclose(row.change, tables["sft"].right.mean() - tables["base"].right.mean())
            and row.significant and row.low > 0)
    same = difference_row(items, ("sft", "problems", "exact match"),
                          ("sft", "problems", "flexible match"), "flexible")
    assert same["low"] <= same["value"] <= same["high"]
    verifier = gains.loc[("verifier", "problems, sampled", "exact match", "sft")]
    assert verifier.n == 20, "the vote against the greedy answer, on the sampled problems"


def test_an_interval_that_holds_zero_is_not_significant():
    toy = pd.concat([item_rows("base", "t", "m", range(4), [1, 0, 0, 0]),
                     item_rows("sft", "t", "m", range(4), [1, 1, 0, 0])])
    files = derive(pd.DataFrame(ledger_rows(toy, {}, {})))
    assert files["stage_gains.csv"].significant.tolist() == [False]


def test_differences_take_the_items_that_both_have():
    toy = pd.concat([item_rows("base", "t", "m", range(10), [0] * 10),
                     item_rows("sft", "t", "m", range(5, 15), [1] * 10)])
    row = difference_row(toy, ("sft", "t", "m"), ("base", "t", "m"), "base")
    assert (row["value"], row["n"]) == (1, 5)
    with pytest.raises(ValueError, match="share no items"):
        difference_row(toy[toy.item != toy.item.where(toy.stage == "sft")],
                       ("sft", "t", "m"), ("base", "t", "m"), "base")


def test_perplexity_tax_pairs_documents():
    base = pd.DataFrame({"source": "synthetic", "document": range(50),
                         "nats": np.linspace(10, 90, 50), "tokens": 20, "bytes": 40})
    rows = perplexity_rows({"base": base, "sft": base.assign(nats=base.nats + 20 * math.log(1.1))})
    [tax] = [row for row in rows if row["metric"].startswith("perplexity tax")]
    assert all(math.isclose(tax[name], 1.1) for name in ("value", "low", "high")), (
        "the same rise everywhere has no spread")
    assert [row["stage"] for row in rows] == ["base", "base", "sft", "sft", "sft"]


def test_weights_count_in_measures():
    [row] = measure_rows(item_rows("base", "perplexity", "nats per token",
                                   range(2), [10.0, 90.0], weight=[10.0, 30.0]))
    assert row["value"] == 2.5


def test_a_ledger_refuses_doubles(tmp_path):
    row = {"stage": "base", "task": "t", "metric": "m", "value": 0.5, "low": 0.1, "high": 0.9,
           "n": 4, "protocol": "", "seconds": 0.0}
    with pytest.raises(ValueError, match="twice"):
        write_ledger(tmp_path, [row, row])
    assert not (tmp_path / "ledger.csv").exists()


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_known_is_an_empty_cell_of_the_ledger(unknown, tmp_path):
    row = {"stage": "base", "task": "t", "metric": "m", "value": 0.5, "low": 0.1, "high": 0.9,
           "n": 4, "protocol": "", "seconds": 0.0}
    write_ledger(tmp_path, [{**row, "value": unknown, "high": unknown},
                            {**row, "metric": "m minus base", "low": unknown},
                            {**row, "metric": "exact match", "task": "problems"}])
    ledger = read_ledger(tmp_path)
    assert math.isnan(ledger.value[0]) and math.isnan(ledger.high[0]) and ledger.low[0] == 0.1
    files = write_derived(tmp_path)
    assert not files["stage_gains.csv"].significant[0]
    assert json.loads((tmp_path / "base_eval.json").read_text(),
                      parse_constant=pytest.fail)["tasks"]["t"]["m"]["value"] is None


def test_stages_come_in_the_order_of_the_pipeline(evaluation):
    order = [row["stage"] for row in rows_of(evaluation[0].sample(frac=1, random_state=0))]
    assert order == sorted(order, key=STAGE_NAMES.index)


def test_a_piece_is_made_once_and_survives_its_neighbours(tmp_path, model, tokenizer):
    problems, calls = word_problems("synthetic", "test", 3), []

    def make():
        calls.append(1)
        return solve(model, tokenizer, problems, samples=2, temperature=1.0, max_new_tokens=5)

    def killed():
        raise KeyboardInterrupt

    first = piece(tmp_path, "sft", "problems, sampled", make)
    with pytest.raises(KeyboardInterrupt):
        piece(tmp_path, "sft", "problems", killed)
    pd.testing.assert_frame_equal(first, piece(tmp_path, "sft", "problems, sampled", make))
    assert (len(calls) == 1 and [path.name for path in (tmp_path / "pieces").iterdir()]
                                == ["sft-problems-sampled.jsonl"])


def test_pieces_of_other_settings_are_refused(tmp_path):
    same_settings(tmp_path, {"temperature": 1.0, "levels": [1, 2]})
    same_settings(tmp_path, {"temperature": 1.0, "levels": [1, 2]})
    with pytest.raises(ValueError, match="temperature: 1.0 -> 0.7.*force=True"):
        same_settings(tmp_path, {"temperature": 0.7, "levels": [1, 2]})


def test_settings_are_checked():
    preset = get_pipeline_preset("local-smoke")
    for values, message in (({"levels": [7]}, "levels"), ({"shots": -1}, "shots"),
                            ({"problems": "gsm9k"}, "gsm8k"), ({"num_pairs": 0}, "num_pairs")):
        with pytest.raises(ConfigError, match=message):
            override(preset, {"eval": values})


@pytest.mark.parametrize("name, text, words", [
    ("sst2/dev.tsv", "", "dev.tsv: the file is empty"),
    ("sst2/dev.tsv", "sentence\tlabel\n", "the file is empty but for its header"),
    ("sst2/dev.tsv", "sentence\tlabel\ngood\t1\nodd\t7\n", "line 3: label '7' is not 0 or 1"),
    ("gsm8k/test.jsonl", "", "test.jsonl: the file is empty"),
    ("gsm8k/test.jsonl",
     "".join(f'{{"question": "How many, {i}?", "answer": "I do not know."}}\n' for i in range(99)),
     "line [0-9]+: the answer 'I do not know.' does not end"),
])
def test_bad_evaluation_files_are_named(name, text, words, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    read = sentences if name.startswith("sst2") else word_problems
    with pytest.raises(ValueError, match=words):
        read(name.split("/")[0], "test", 10)


def shouts(of, subject):
    """Whether a model writes a word in capitals, which is asked of it in small letters."""
    words = [problem.question.split()[0] for problem in of.problems]
    answers = ask(subject, words, [("a", "A")], max_new_tokens=2)
    return pd.DataFrame({"item": range(len(words)),
                         "right": [a.text == word.upper() for a, word in zip(answers, words)]})


def test_a_task_in_one_entry_is_measured_and_in_the_ledger(model, tokenizer, tmp_path):
    """One registered from outside, beside the others, through the whole evaluation of a model."""
    folder, run_folder = tmp_path / "model", tmp_path / "run"
    for needed in (folder, run_folder / "eval"):
        needed.mkdir(parents=True)
    save_model(folder, model)
    save_tokenizer(tokenizer, folder)
    (run_folder / "run.json").write_text('{"stages": {}}')
    config = override(get_pipeline_preset("lesson"), {"eval": {
        "num_problems": 4, "sampled_problems": 2, "samples_per_problem": 2, "num_sentences": 4,
        "num_instructions": 4, "num_pairs": 4, "max_new_tokens": 4, "shots": [0], "draws": 1,
        "max_perplexity_tokens": 500, "protocol_tokens": 500}})
    run = SimpleNamespace(config=config, device="cpu", folder=run_folder / "eval", start=folder,
                          inputs={"checkpoint": folder})
    family = register_family(TaskFamily(
        "problems, shouted", shouts, lambda of, stage, table: [
            item_rows(stage, "problems, shouted", "exact match", table.item, table.right)],
        lambda of, stage, asked, _: f"first words in capitals, {asked}",
        headline=("exact match",), texts=lambda of: [p.question for p in of.problems]))
    try:
        found = evaluate(run)
        written = read_ledger(run.folder)
        row, = written[written.task == "problems, shouted"].to_dict("records")
        assert (row["stage"], row["metric"], row["n"]) == ("checkpoint", "exact match", 4)
        assert row["protocol"].startswith("first words in capitals, document")
        metrics = {row["metric"] for row in record(found)["table"]}
        assert "checkpoint: problems, shouted, exact match" in metrics
        assert set(FAMILIES) <= set(written.task) and family.name in overlap_sets(found)
        told = pd.read_json(run.folder / "answers.jsonl", lines=True)
        assert set(told.task) == {name for name, one in FAMILIES.items() if one.answers}
        kept = pd.read_csv(run.folder / "items.csv", keep_default_na=False)
        pairs = lambda table: set(zip(table.task, table["item"]))
        assert pairs(told) == pairs(kept[kept.task.isin(told.task)])
        asked = told[told.task == "problems"].set_index("item")
        assert asked.prompt.tolist() == [p.question for p in found.items.problems]
        assert asked.answer.tolist() == found.pieces["checkpoint", "problems"].text.tolist()
    finally:
        del FAMILIES["problems, shouted"]
