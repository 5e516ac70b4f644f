"""Every statistic against an oracle: scipy, scikit-learn and statsmodels, or all cases counted one
by one.
"""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score
from statsmodels.stats import contingency_tables
from statsmodels.stats.proportion import proportion_confint

from modern_llm.data import synth
from modern_llm.data.tasks import RERANKERS, choice_weights, pass_at_k, rerank
from modern_llm.evaluation.attention import row_measures
from modern_llm.evaluation.fewshot import order_entropies
from modern_llm.evaluation.ledger import (
    difference_row, is_significant, item_rows, ledger_rows, measure_rows, problem_analysis,
    stage_gains, write_ledger,
)
from modern_llm.evaluation.overlap import SAME_MIX, clean_rows
from modern_llm.evaluation.reranking import sample_items
from modern_llm.evaluation.reranking import calibration_error, judgements, reliability
from modern_llm.evaluation.sentiment_tables import accuracy_rows, confusion_table
from modern_llm.statistics import (
    auc, held_out_measures, items_interval, mcnemar, mean_interval, paired_difference,
    perplexity_ratio, proportion_interval, ratio_interval, within_group_auc,
)
from modern_llm.training.verifier_scores import logistic_fit

quickly = settings(max_examples=25, deadline=None, derandomize=True)
INTERVAL = ("value", "low", "high")


def bootstrap(statistic, *columns, **options):
    """scipy's percentile interval of a statistic of whole rows."""
    found = stats.bootstrap(columns, statistic, paired=True, vectorized=True, n_resamples=4000,
                            method="percentile",
                            rng=np.random.default_rng(7), **options).confidence_interval
    return found.low, found.high


# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1319, 100_000])
def test_shares_have_wilsons_interval(n):
    for right in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        found = proportion_interval(right, n)
        assert found["value"] == right / n and found["n"] == n
        assert ((found["low"], found["high"])
                == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12))
        assert (found["low"], found["high"]) == pytest.approx(
            tuple(stats.binomtest(right, n).proportion_ci(method="wilson")), abs=1e-12)
        assert items_interval(np.arange(n) < right) == found


@pytest.mark.parametrize("seed", range(3))
def test_means_ratios_and_differences_have_the_bootstraps_interval(seed):
    draw = np.random.default_rng(seed)
    a, b, tokens = draw.gamma(2, 1, 80), draw.gamma(2, 1.2, 80), draw.integers(5, 100, 80)
    for found, oracle, value in (
        (mean_interval(a), bootstrap(np.mean, a), a.mean()),
        (paired_difference(a, b), bootstrap(np.mean, a - b), (a - b).mean()),
        (ratio_interval(a * tokens, tokens), bootstrap(
            lambda x, y, axis: x.sum(axis) / y.sum(axis), a * tokens, tokens
        ), np.average(a, weights=tokens))):
        assert found["value"] == pytest.approx(value, rel=1e-12) and found["n"] == 80
        assert ((found["low"], found["high"])
                == pytest.approx(oracle, abs=0.06 * (oracle[1] - oracle[0])))
    assert (items_interval(a) == mean_interval(a)
            and items_interval(a * tokens, tokens) == ratio_interval(a * tokens, tokens))


def test_an_interval_of_many_items_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    found = mean_interval(values)
    assert (found["low"], found["high"]) == pytest.approx(
        stats.norm.interval(0.95, values.mean(), stats.sem(values)), abs=0.15 * stats.sem(values))


@pytest.mark.parametrize("call", [lambda: mean_interval([]), lambda: paired_difference([], []),
                                  lambda: ratio_interval([], []), lambda: items_interval([]),
                                  lambda: proportion_interval(0, 0)])
@pytest.mark.fault("statistics")
def test_nothing_to_evaluate_is_said(call):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        call()


def test_perplexities_are_exponentials_of_one_ratio():
    draw = np.random.default_rng(1)
    base = pd.DataFrame({"nats": draw.gamma(9, 10, 60), "tokens": draw.integers(20, 40, 60)})
    tuned = base.assign(nats=base.nats * draw.normal(1.05, 0.05, 60))
    perplexity = lambda table: math.exp(table.nats.sum() / table.tokens.sum())
    ratio = perplexity_ratio(base, tuned)
    assert ratio["value"] == pytest.approx(perplexity(tuned) / perplexity(base))
    low, high = bootstrap(lambda x, y, t, axis: np.exp((x.sum(axis) - y.sum(axis)) / t.sum(axis)),
                          tuned.nats, base.nats, base.tokens)
    assert (ratio["low"], ratio["high"]) == pytest.approx((low, high), abs=0.05 * (high - low))
    nats, perplexities, bits = held_out_measures(base, 5000, "x")
    for name in INTERVAL:
        assert perplexities[name] == pytest.approx(math.exp(nats[name]))
        assert bits[name] == pytest.approx(nats[name] * base.tokens.sum() / 5000 / math.log(2))


# ---- tests ---------------------------------------------------------------------------------------


@quickly
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_exact_binomial_test(pairs):
    a, b = np.array(pairs).T
    found, table = mcnemar(a, b), pd.crosstab(pd.Categorical(
        a, [True, False]), pd.Categorical(b, [True, False]), dropna=False).to_numpy()
    assert found["p"] == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue,
                                       abs=1e-12)
    if split := found["only_a"] + found["only_b"]:
        assert found["p"] == pytest.approx(stats.binomtest(found["only_a"], split).pvalue,
                                           abs=1e-12), "the sign test of the items that differ"


def gains_of(a, b, tmp_path):
    items = pd.concat([item_rows("base", "problems", "exact match", range(len(a)), b),
                       item_rows("sft", "problems", "exact match", range(len(a)), a)])
    ledger = write_ledger(tmp_path, ledger_rows(items, {}, {}))
    return stage_gains(ledger).iloc[0], problem_analysis(ledger)["differences"][0]["significant"]


@pytest.mark.fault("statistics")
@pytest.mark.parametrize("won, lost, n, significant",
                         [(1, 0, 1, False), (3, 0, 3, False), (5, 0, 5, False), (5, 0, 100, False),
                          (6, 0, 6, True), (6, 0, 100, True), (12, 4, 30, False), (15, 4, 30, True),
                          (0, 5, 250, False), (0, 6, 250, True), (0, 0, 9, False)])
def test_a_verdict_needs_the_exact_test_too(won, lost, n, significant, tmp_path):
    a, b = np.zeros(n), np.zeros(n)
    a[:won], b[won : won + lost] = 1, 1
    row = difference_row(pd.concat([item_rows("base", "t", "m", range(n), b),
                                    item_rows("sft", "t", "m", range(n), a)]),
                         ("sft", "t", "m"), ("base", "t", "m"), "base")
    assert (row["value"] == pytest.approx((a - b).mean())
            and f"{won} won, {lost} lost, McNemar p = {mcnemar(a, b)['p']:.2g};" in row["note"])
    gain, analysed = gains_of(a, b, tmp_path)
    assert gain.significant == analysed == significant
    assert (gain.p == pytest.approx(1.0 if not won + lost
                                    else stats.binomtest(won, won + lost).pvalue, rel=0.06)
            and (gain.p < 0.05) >= significant)


@pytest.mark.fault("statistics")
def test_few_items_have_no_verdict(tmp_path):
    """Five documents that all change alike: the signs of five fall so by chance once in sixteen
    times.
    """
    for n in (1, 2, 5, 6):
        gain, _ = gains_of(np.linspace(0.2, 0.4, n), np.full(n, 0.1), tmp_path)
        assert (gain.low > 0 and gain.significant == (n >= 6)
                                 == (stats.wilcoxon(np.linspace(0.1, 0.3, n)).pvalue < 0.05))
    assert (not is_significant(-0.1, 0.2, 100) and is_significant(-0.2, -0.1, 100)
            and not is_significant(math.nan, math.nan, 100))


def test_verdicts_by_chance_are_rare():
    draw = np.random.default_rng(0)
    for n, chance in ((6, 0.5), (20, 0.3), (60, 0.9)):
        verdicts = []
        for _ in range(100):
            a, b = draw.random((2, n)) < chance
            found = paired_difference(a, b, draws=100)
            verdicts.append(is_significant(found["low"], found["high"], n, mcnemar(a, b)["p"]))
        assert np.mean(verdicts) <= 0.06


# ---- rankings ------------------------------------------------------------------------------------

scored = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 4)), min_size=2,
                  max_size=60)


@quickly
@given(scored)
def test_auc_is_scikit_learns_and_mann_whitneys(rows):
    scores, labels, groups = (np.array(column) for column in zip(*rows))
    if labels.all() or not labels.any():
        assert math.isnan(auc(scores, labels))
        return
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert (auc(scores, labels)
            == pytest.approx(stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
                             / labels.sum() / (~labels).sum()))
    values = [roc_auc_score(labels[groups == g], scores[groups == g])
              for g in set(groups.tolist()) if len(set(labels[groups == g].tolist())) == 2]
    if values:
        found = within_group_auc(scores, labels, groups)
        assert (found["value"] == pytest.approx(np.mean(values)) and found["n"] == len(values)
                and found["low"] <= found["value"] <= found["high"])
    else:
        with pytest.raises(ValueError, match="no group has right and wrong items"):
            within_group_auc(scores, labels, groups)


def test_judgements_are_those_aucs():
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"problem": np.repeat(range(20), 4), "right": draw.random(80) < 0.5,
                          "score": draw.random(80)})
    pooled, within = judgements(table, {"it": "score"})
    assert pooled["value"] == pytest.approx(roc_auc_score(table.right, table.score))
    assert within["value"] == within_group_auc(table.score, table.right, table.problem)["value"]


@pytest.mark.fault("statistics")
@pytest.mark.parametrize(
    "call", [lambda s, r: auc(s, r), lambda s, r: within_group_auc(s, r, [0, 0, 0])])
def test_a_score_that_is_no_number_has_no_rank(call):
    with pytest.raises(ValueError, match="1 of 3 scores are not numbers"):
        call([0.1, math.nan, 0.3], [True, True, False])
    assert (call([0.1, -math.inf, 0.3], [True, True, False])
            in (0.0, {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1}))


# ---- many answers to one problem -----------------------------------------------------------------


@quickly
@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_hypergeometric(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, right, k) == pytest.approx(stats.hypergeom.sf(0, n, right, k), abs=1e-9)
    # the code printed in 2107.03374
    chen = 1.0 if n - right < k else 1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1))
    assert pass_at_k(n, right, k) == pytest.approx(chen, abs=1e-9)


def one_by_one(method: str, rows: list[dict]) -> Fraction:
    """Chance that the chosen one of some answers is right, ties shared: from the method's
    description alone.
    """
    # NaN equals nothing
    votes = lambda row, weight: sum(
        weight(other) for other in rows if other["value"] == row["value"])
    keys = {"random": lambda row: 0, "log_prob": lambda row: row["log_prob"],
            "best_of_n": lambda row: row["score"],
            "calculator": lambda row: row["consistent"] and row["value"] == row["value"],
            "majority": lambda row: votes(row, lambda other: 1), "weighted_vote": lambda row: round(
                votes(row, lambda other: other["score"] / (1 - other["score"])), 9)}
    best = max(map(keys[method], rows))
    return Fraction(sum(row["right"] for row in rows if keys[method](row) == best),
                    sum(keys[method](row) == best for row in rows))


@quickly
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 12.5, math.nan]), st.integers(-3, -1),
                          st.booleans(), st.sampled_from([0.1, 0.5, 0.8])),
                min_size=4, max_size=4))
def test_choices_equal_all_cases_counted(drawn):
    table = pd.DataFrame([{"problem": 0, "sample": i, "value": value, "log_prob": float(log_prob),
                           "consistent": consistent, "score": score, "right": value == 12.5}
                          for i, (value, log_prob, consistent, score) in enumerate(drawn)])
    rows = table.to_dict("records")
    for method in RERANKERS:
        assert rerank(table, 4, method)[0] == pytest.approx(float(one_by_one(method, rows)))
        weights = choice_weights(method, {name: table[name].to_numpy()
                                          for name in ("value", "log_prob", "consistent", "score")})
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    pairs = [one_by_one("majority", list(pair)) for pair in itertools.combinations(rows, 2)]
    assert (rerank(table, 2, "majority", draws=600)[0]
            == pytest.approx(float(sum(pairs)) / 6, abs=0.08))
    items = sample_items("dpo", "problems", table, [1, 2, 4],
                         ["majority", "pass"]).set_index("metric").value
    assert items["pass@2"] == pytest.approx(np.mean(
        [any(row["right"] for row in pair) for pair in itertools.combinations(rows, 2)]))
    assert items["majority@1"] == items["pass@1"] == table.right.mean()


# ---- a verifier's scores -------------------------------------------------------------------------


def test_the_logistic_fit_is_scikit_learns():
    draw = np.random.default_rng(0)
    features = np.column_stack([draw.normal(size=(200, 2)), np.ones(200)])
    targets, weights = (draw.random(200) < 1 / (1 + np.exp(-features @ (1.0, -2.0, 0.5))),
                        draw.uniform(0.2, 2, 200))
    ours = logistic_fit(torch.tensor(features), torch.tensor(targets, dtype=torch.double),
                        torch.tensor(weights), prior=(0.0, 0.0, 0.0))
    theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-8, max_iter=200).fit(
        features, targets, sample_weight=weights)
    assert ours.numpy() == pytest.approx(theirs.coef_[0], abs=1e-4)


def test_reliability_is_the_calibration_curve():
    draw = np.random.default_rng(0)
    scores = draw.random(1000)
    right = draw.random(1000) < scores**2
    table = reliability(scores, right)
    share, mean = calibration_curve(right, scores, n_bins=10, strategy="quantile")
    assert (table.value.to_numpy() == pytest.approx(share, abs=0.011)
            and table.score.to_numpy() == pytest.approx(mean, abs=0.003))
    assert (table.n.sum() == 1000
            and calibration_error(table) == pytest.approx(np.mean(abs(share - mean)), abs=0.005))
    assert all((row.low, row.high) == pytest.approx(proportion_confint(
        round(row.value * row.n), row.n, method="wilson")) for row in table.itertuples())


# ---- sentiment, overlap, entropies ---------------------------------------------------------------


def test_accuracies_and_confusions_are_scikit_learns():
    draw, labels = np.random.default_rng(0), np.array(["negative", "positive"])
    truth = labels[draw.integers(0, 2, 40)]
    items = pd.concat([pd.DataFrame({
        "shots": 4, "draw": d, "method": "direct", "item": range(40), "label": truth, "shown": 4,
        "said": np.where(draw.random(40) < 0.7, truth, labels[draw.integers(0, 2, 40)])
    }) for d in range(3)], ignore_index=True)
    rows = {row["metric"]: row for row in accuracy_rows(items)}
    each = [accuracy_score(of.label, of.said) for _, of in items.groupby("draw")]
    found, over = rows["accuracy, 4-shot, direct"], rows["accuracy, 4-shot, direct, over draws"]
    assert (found["value"] == pytest.approx(np.mean(each))
            and (over["low"], over["high"]) == (min(each), max(each)))
    of_item = (items.said == items.label).groupby(items.item).mean().to_numpy()
    assert ((found["low"], found["high"])
            == pytest.approx(bootstrap(np.mean, of_item), abs=0.15 * stats.sem(of_item)))
    share = max(np.mean(truth == label) for label in labels)
    assert ((rows["majority class"]["low"], rows["majority class"]["high"])
            == pytest.approx(proportion_confint(round(share * 40), 40, method="wilson")))
    assert (confusion_table(items).to_numpy().tolist()
            == confusion_matrix(items.label, items.said, labels=labels).tolist())


def test_clean_scores_are_directly_standardised():
    draw = np.random.default_rng(0)
    group, overlapping = (np.repeat(["level 1", "level 2"], (60, 40)),
                          draw.random(100) < np.repeat([0.6, 0.2], (60, 40)))
    items = item_rows("sft", "problems", "exact match", range(100), draw.random(100) < 0.5, group)
    overlap = pd.DataFrame({"set": "problems", "item": range(100), "ngrams": 10,
                            "found": overlapping * 1, "share": overlapping * 0.1})
    rows = {row["subset"]: row for row in clean_rows(items, overlap)}
    clean = items[~overlapping]
    assert rows["clean"]["value"] == pytest.approx(clean.value.mean())
    assert (rows[SAME_MIX]["value"]
            == pytest.approx(0.6 * clean.value[clean.group == "level 1"].mean()
                             + 0.4 * clean.value[clean.group == "level 2"].mean()))


def test_measures_by_group_are_those_of_the_group():
    draw = np.random.default_rng(0)
    items = item_rows("sft", "t", "m", range(90), draw.random(90) < 0.4,
                      np.repeat(["level 1", "level 2", "level 3"], 30))
    rows = {row["metric"]: row for row in measure_rows(items)}
    for name, part in items.groupby("group"):
        low, high = proportion_confint(part.value.sum(), 30, method="wilson")
        assert ([rows[f"m, {name}"][key] for key in INTERVAL]
                == pytest.approx([part.value.mean(), low, high]))


def test_the_floors_standard_error_is_scipys():
    texts = list(itertools.islice(synth.documents("heldout"), 100))
    floor, nats = synth.entropy_floor(texts), [text.nats for text in texts]
    assert ((floor["nats_per_document"], floor["standard_error"])
            == pytest.approx((np.mean(nats), stats.sem(nats))))


def test_entropies_of_orders_are_scipys():
    scores = np.log(np.random.default_rng(0).dirichlet((1, 1), 30)) - 3.0
    scorer = SimpleNamespace(direct=lambda demonstrations, suffixes: (scores, None))
    row = order_entropies(scorer, [], ["text"] * 30, [()]).iloc[0]
    assert row.local_entropy == pytest.approx(stats.entropy(np.exp(scores), axis=1).mean())
    assert row.global_entropy == pytest.approx(stats.entropy(
        np.bincount(scores.argmax(1), minlength=2)))


def test_entropies_of_attention_are_scipys():
    # what is missing from 1 went to a sink
    weights = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(6), 6)).tril()[None, None]
    found, rows = (row_measures(weights),
                   torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)[0, 0, 2:])
    assert found["entropy"][0, 0].numpy() == pytest.approx(stats.entropy(rows.numpy(), axis=1))
    assert (found["evenness"][0, 0].numpy()
            == pytest.approx(stats.entropy(rows.numpy(), axis=1) / np.log([4, 5, 6, 7])))
