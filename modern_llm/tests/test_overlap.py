"""The overlap report: against brute force, at planted contamination, on the built-in world and on
real data.
"""

import math
import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pandas as pd
import pytest

from modern_llm.config import get_pipeline_preset
from modern_llm.config.stages import trained_on
from modern_llm.data import synth
from modern_llm.data.reading import documents, rows
from modern_llm.data.sources import DatasetNotFound, find_source
from modern_llm.evaluation.contamination import run_overlap, training_sources, training_texts
from modern_llm.evaluation.overlap import (
    SAME_MIX, NgramIndex, clean_rows, find_overlap, item_subsets, ngram_hashes, overlap_summary,
    word_batches, word_hashes, words,
)
from modern_llm.statistics import (
    items_interval, mcnemar, mean_interval, paired_difference, proportion_interval, ratio_interval,
)


def slow_overlap(texts, training, n, shortest):
    """ngrams and found of each text by comparing tuples of words with all those of every training
    document.
    """
    found, read = [], [words(text) for text in training]
    for item in map(words, texts):
        length = min(n, len(item))
        if length < shortest:
            found.append((0, 0))
            continue
        seen = {tuple(t[i:i + length]) for t in read for i in range(len(t) - length + 1)}
        grams = [tuple(item[i:i + length]) for i in range(len(item) - length + 1)]
        found.append((len(grams), sum(gram in seen for gram in grams)))
    return found


@pytest.mark.parametrize(("n", "shortest"), [(1, 1), (3, 2), (5, 5), (13, 8)])
def test_equals_brute_force(n, shortest):
    draw = random.Random(n)
    babble = lambda most: " ".join(draw.choices("abcdefg", k=draw.randint(0, most)))
    training = [babble(60) for _ in range(60)] + ["", " – "]
    texts = [babble(20) for _ in range(60)] + [training[0][7:], training[1] * 2]
    found = find_overlap({"one": texts[:30], "two": texts[30:]},
                         iter(training), n=n, shortest=shortest)
    assert (list(found[["ngrams", "found"]].itertuples(index=False, name=None))
            == slow_overlap(texts, training, n, shortest))
    assert ((found.item.to_numpy() == [*range(30), *range(len(texts) - 30)]).all()
            and 0 < found.found.sum() < found.ngrams.sum())
    assert ((found.example.ne("") == (found.found > 0)).all()
            and found.share.isna().equals(found.ngrams == 0))


def test_examples_are_in_item_and_training_text():
    draw = random.Random(0)
    training = [" ".join(draw.choices("abcde", k=80)) for _ in range(20)]
    items = [" ".join(draw.choices("abcde", k=20)) for _ in range(40)]
    found = find_overlap({"x": items}, training, n=5, shortest=5)
    for item, example in zip(items, found.example):
        if example:
            run = example.partition("«")[2].partition("»")[0]
            assert len(run.split()) == 5 and run in item
            assert any(example.replace("«", "").replace("»", "") in text for text in training)


def test_planted_items_and_no_other():
    draw = random.Random(3)
    babble = lambda count: " ".join(draw.choices([f"w{i}" for i in range(3000)], k=count))
    items, planted = ([babble(25) for _ in range(300)],
                      sorted(random.Random(1).sample(range(300), 11)))
    training = [babble(300) for _ in range(300)]
    for k, i in enumerate(planted):
        training[k * 20] = (babble(10) + " — " + "\n".join(items[i].title().split()) + "! "
                            + babble(50))
    found = find_overlap({"items": items}, training)
    assert (found.item[found.found > 0].tolist() == planted
            and (found.share[found.found > 0] == 1).all())


@pytest.mark.parametrize("length", [13, 20, 25, 40])
def test_one_changed_word(length):
    item = [f"w{i}" for i in range(length)]
    for place in range(length):
        copy = [*item[:place], "other", *item[place + 1:]]
        left = sum(not start <= place < start + 13 for start in range(length - 12))
        assert find_overlap({"x": [" ".join(item)]}, [" ".join(copy)]).found[0] == left


def test_batches_and_pieces_lose_nothing():
    text = " ".join(f"w{i}" for i in range(500))
    for size, characters in ((1, 1), (7, 40), (100, 333), (10**6, 10**6)):
        runs = {tuple(held[i:i + 13])
                for held, ends in word_batches([text, text], 12, size, characters)
                for begin, end in zip([0, *ends], ends) for i in range(begin, end - 12)}
        assert runs == {tuple(text.split()[i:i + 13]) for i in range(488)}


def test_a_run_across_the_cut_of_a_huge_document_is_found():
    parts = [f"w{i}" for i in range(200_000)]
    text = " ".join(parts)
    middle = text[:2**20].count(" ")  # where the first piece of 2**20 characters ends
    found = find_overlap({"cut": [" ".join(parts[middle - 20:middle + 20])]}, [text])
    assert len(text) > 2**20 and found.ngrams[0] == found.found[0] == 28


def test_memory_is_bounded():
    """Documents are read one by one, a batch holds little more than its size, and a huge document
    comes in pieces.
    """
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "word " * 100

    for number, (held, ends) in enumerate(islice(word_batches(endless(), 12, size=1000), 5), 1):
        assert len(held) == 1000 and ends[-1] == 1000 and read == 10 * number
    sizes = [
        len(held) for held, _ in word_batches(["word " * 10**5], 12, size=1000, characters=5000)]
    assert max(sizes) <= 1000 + 1000 + 12 and sum(sizes) >= 10**5


def test_hashes_are_the_same_in_every_process():
    code = ("from modern_llm.evaluation.overlap import ngram_hashes; print(ngram_hashes(['a', "
            "'naïve', '\\ud800', 'case'], 2).tolist())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": "7"}).stdout
    assert other.strip() == str(ngram_hashes(["a", "naïve", "\ud800", "case"], 2).tolist())


def test_hashes_do_not_collide():
    """On 13-grams of two words, the hardest case: all 8,192 differ, and their first 24 bits are as
    random as they should be.
    """
    grams = np.array([ngram_hashes([("tick", "tock")[i >> k & 1] for k in range(13)])[0]
                      for i in range(2**13)])
    pairs = lambda values: float(
        sum(c * (c - 1) / 2 for c in np.unique(values, return_counts=True)[1]))
    expected = 2**13 * (2**13 - 1) / 2 / 2**24
    assert (pairs(grams) == 0
            and abs(pairs(grams >> np.uint64(40)) - expected) < 10 * math.sqrt(expected) + 1)


def test_equal_hashes_of_other_words_are_no_hit():
    index = NgramIndex(3, [0], [["a", "b", "c"]])
    index.look(["x", "y", "z"], word_hashes(["a", "b", "c"]), np.array([3]))
    assert not index.found.any()
    index.look(["a", "b", "c"], word_hashes(["a", "b", "c"]), np.array([3]))
    assert index.found.all() and index.context == {0: "«a b c»"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(({}, ["a"]), "no evaluation set"), (({"x": []}, ["a"]), "set 'x' has no items"),
     (({"x": ["a"]}, []), "no words"), (({"x": ["a"]}, ["…"]), "no words"),
     (({"x": ["a"]}, ["a"], 5, 8), "shortest=8"), (({"x": ["a"]}, ["a"], 5, 0), "shortest=0")])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_overlap(*arguments)
    with pytest.raises(ValueError, match="n=0"):
        ngram_hashes(["a"], 0)


# ---- the sources of a run ------------------------------------------------------------------------


def test_training_sources_of_every_preset():
    for preset in ("local-smoke", "local-cpu"):
        config = get_pipeline_preset(preset)
        sources = training_sources(config)
        assert (not sources.duplicated(["name", "kind"]).any()
                and not sources.source.duplicated().any())
        named = ({*config.data.sources, *config.sft.sources, *config.dpo.sources}
                 - {"synthetic-problems"})
        assert named <= set(sources.name)
    assert training_sources(config, ["pretrain"]).name.tolist() == list(config.data.sources)


def test_what_is_replayed_is_trained_on():
    def read(stage, **values):
        settings = {name: {} for name in ("data", "sft", "dpo")}
        settings["data"]["sources"] = ["poems"]
        settings[stage] |= {"sources": ["own"], **values}
        return trained_on(stage, settings)

    chats, pairs, text = ("own", "chats"), ("own", "pairs"), ("poems", "text")
    assert read("sft", replay_fraction=0.0) == [chats]
    assert read("sft", replay_fraction=0.1) == [chats, text]
    replayed = {"replay_sources": ("text", "talks")}
    assert read("dpo", replay_weight=0.0, **replayed) == [pairs]
    assert read("dpo", replay_weight=0.5, **replayed) == [pairs, text, ("talks", "chats")]


def test_built_in_texts_are_those_the_stages_read():
    from modern_llm.data.pairs import preference_pairs
    from modern_llm.data.tasks import word_problems
    from modern_llm.training.sft import instructions

    take = lambda kind, limit, seed=0: list(training_texts("synthetic", kind, limit, seed=seed))
    assert take("text", 30) == list(islice(documents("synthetic", "train"), 30))
    assert take("chats", 30) == ["\n".join(message["content"] for message in e.messages)
                                 for e in instructions("synthetic", "train", 30)]
    for seed in (0, 1):  # of the run
        pairs = preference_pairs("synthetic", "train", 10, seed)[0]
        assert take("pairs", 20, seed) == [f"{p.request}\n{text}" for p in pairs
                                           for text in (p.chosen, p.rejected)]
    assert ({f"{p.question}\n{p.answer}" for p in word_problems("synthetic", "train", 60)}
            <= set(take("problems", 80)))
    with pytest.raises(ValueError, match="no kind 'storys'"):
        training_texts("synthetic", "storys")
    with pytest.raises(DatasetNotFound, match="wikitext"):
        training_texts("wikitext-3")


def test_the_built_in_world_overlaps_in_runs_but_not_in_wholes():
    """Templates share runs of 13 words with training text; no held-out question is in it from end
    to end.
    """
    config = get_pipeline_preset("local-smoke")
    sets = {"problems": [p.question for p in islice(synth.problems("heldout"), 60)],
            "stories": [d.text for d in islice(synth.documents("heldout", kinds=["story"]), 60)]}
    found = run_overlap(sets, training_sources(config, ["pretrain", "sft"]), limit=1500)
    summary = overlap_summary(found)
    assert (len(summary) == 2 * found.source.nunique()
            and (summary["items"] == 60).all() and summary.hit_share.max() > 0.3)
    assert found.share.max() < 1 and item_subsets(found, above=0.7).eq("clean").all()
    assert (item_subsets(found).eq("overlapping").sum()
            == found[found.found > 0].drop_duplicates(["set", "item"]).shape[0])


# ---- scores on the clean items -------------------------------------------------------------------


def scored(values, task="problems", weight=1.0):
    return pd.DataFrame({"stage": "sft", "task": task, "metric": "exact match",
                         "item": range(len(values)), "value": values, "weight": weight})


def test_clean_rows():
    overlap = pd.DataFrame({"set": "problems", "item": range(4),
                            "ngrams": [10, 10, 10, 0], "share": [0.0, 0.2, 0.9, np.nan]})
    other = overlap.assign(share=[0.0, 0.8, 0.0, np.nan])
    items = pd.concat([scored([1.0, 0.0, 1.0, 1.0]),
                       scored([0.5, 0.25, 0.0, 1.0], "problems, sampled"),
                       scored([1.0], "sentiment")])
    rows = pd.DataFrame(clean_rows(items, overlap))
    assert rows.task.unique().tolist() == ["problems", "problems, sampled"]
    plain = rows[rows.task == "problems"].set_index("subset")
    assert plain.n.to_dict() == {"all": 4, "clean": 1, "overlapping": 2, "too short": 1}
    assert plain.metric.tolist() == ["exact match", "exact match, clean",
                                     "exact match, overlapping", "exact match, too short"]
    assert plain.loc["all", ["value", "low", "high", "n"]].to_dict() == proportion_interval(3, 4)
    assert plain.protocol.unique().tolist() == ["of 4 items 1 clean, 2 overlapping, 1 too short"]
    by_share = {above: pd.DataFrame(clean_rows(
        items, pd.concat([overlap, other]), above=above
    )).set_index(["task", "subset"]) for above in (0.0, 0.7, 0.85)}
    assert [t.n[("problems", "overlapping")] for t in by_share.values()] == [2, 2, 1]
    assert by_share[0.85].value[("problems, sampled", "clean")] == pytest.approx(0.375)


def test_clean_rows_weigh_documents_by_tokens():
    overlap = pd.DataFrame({"set": "text", "item": [0, 1, 2], "ngrams": 5,
                            "share": [0.0, 0.0, 1.0]})
    rows = {r["subset"]: r
            for r in clean_rows(scored([20.0, 300.0, 1.0], "text", [10.0, 100.0, 50.0]), overlap)}
    assert (rows["clean"]["value"] == pytest.approx(320 / 110)
            and rows["all"]["value"] == pytest.approx(321 / 160))
    assert ({k: rows["clean"][k] for k in ("value", "low", "high", "n")}
            == ratio_interval([20.0, 300.0], [10.0, 100.0]))


def test_clean_rows_with_the_groups_of_all_items():
    """Two groups, 8 easy items of which 6 overlap and 2 hard clean ones: the clean ones count 8 to
    2, as in the whole.
    """
    overlap = pd.DataFrame({"set": "problems", "item": range(10), "ngrams": 5,
                            "share": [1.0] * 6 + [0.0] * 4})
    items = scored([1.0] * 8 + [0.0, 0.0]).assign(group=["level 1"] * 8 + ["level 2"] * 2)
    rows = {r["subset"]: r for r in clean_rows(items, overlap)}
    assert list(rows) == ["all", "clean", "overlapping", SAME_MIX] and rows["clean"]["value"] == 0.5
    assert rows[SAME_MIX]["value"] == pytest.approx(0.8) and rows[SAME_MIX]["n"] == 4
    assert ([r["subset"] for r in clean_rows(items.assign(group=""), overlap)]
            == ["all", "clean", "overlapping"])


def test_clean_rows_need_the_same_items():
    overlap = pd.DataFrame({"set": "problems", "item": range(3), "ngrams": 5, "share": 0.0})
    with pytest.raises(ValueError, match="item 3 is not in set 'problems' of 3"):
        clean_rows(scored([1.0] * 4), overlap)
    for key in ("word problems", ("word problems", "exact match")):
        assert clean_rows(scored([1.0] * 3, "word problems"), overlap,
                          {key: "problems"})[1]["n"] == 3


def test_items_interval():
    assert (items_interval([True, False]) == proportion_interval(1, 2)
            and items_interval([0.5, 1]) == mean_interval([0.5, 1]))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        items_interval([])


# ---- McNemar's test ------------------------------------------------------------------------------


def test_mcnemar_equals_brute_force():
    for n in range(0, 13):
        heads = np.array([bin(outcome).count("1") for outcome in range(2**n)])
        for only_a in range(n + 1):
            a = np.r_[np.arange(n) < only_a, [True, False]]
            b = np.r_[np.arange(n) >= only_a, [True, False]]
            found = mcnemar(a, b)
            assert (found["only_a"], found["only_b"]) == (only_a, n - only_a)
            assert found["p"] == pytest.approx((abs(heads - n / 2) >= abs(only_a - n / 2)).mean(),
                                               abs=1e-12)
            assert mcnemar(b, a)["p"] == found["p"]


def test_mcnemar_many_items_and_bad_input():
    n = 20_000
    answers = np.arange(n) < n // 2 + 200
    assert (mcnemar(answers, ~answers)["p"]
            == pytest.approx(math.erfc(399 / math.sqrt(n) / math.sqrt(2)), rel=1e-3))
    assert (mcnemar(np.ones(5000), np.zeros(5000))["p"] == 0.0
            and mcnemar([1, 0], [1, 0])["p"] == 1.0)
    for a, b, message in (([1, 0], [1], "2 and 1 items"), ([0.5], [1], "0.5 is neither"),
                          ([math.nan], [1], "nan is neither")):
        with pytest.raises(ValueError, match=message):
            mcnemar(a, b)


def test_mcnemar_false_alarms():
    """Between equal models at most 5% of many experiments are significant, and the bootstrap nearly
    always agrees.
    """
    random_ = np.random.default_rng(1)
    a, b = (random_.random((2, 4000, 60)) < 0.6)
    pvalues = np.array([mcnemar(x, y)["p"] for x, y in zip(a, b)])
    assert 0.005 < (pvalues <= 0.05).mean() <= 0.05
    gaps = [paired_difference(x, y, draws=200) for x, y in zip(a[:150], b[:150])]
    assert np.mean([
        (g["low"] > 0 or g["high"] < 0) == (p <= 0.05) for g, p in zip(gaps, pvalues)]) > 0.9


# ---- real data -----------------------------------------------------------------------------------


def test_gsm8k_test_questions_are_nearly_all_new():
    try:
        find_source("gsm8k")
    except DatasetNotFound:
        pytest.skip("GSM8K is not here: set MODERN_LLM_DATA")
    found = find_overlap({"problems": [row["question"] for row in rows("gsm8k", "test")]},
                         training_texts("gsm8k"))
    assert 0 < (found.found > 0).mean() < 0.02
