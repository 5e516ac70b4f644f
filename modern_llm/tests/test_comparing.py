"""Whether a run is better: on the same items, beside chance, and in words."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.evaluation.ledger import item_rows
from modern_llm.messages import StageError
from modern_llm.report.comparing import (
    Measured, compare_runs, differing, flat, items_to_tell, noise_of, sentence, values_of,
)

SETTINGS = {"name": "it", "seed": 0, "data": {"sources": ["synthetic"], "world_seed": 0},
            "sft": {"max_steps": 9}, "eval": {"num_problems": 40, "batch_rows": 8}}
N = 40


def run(name="a", right=20, settings=None, stage="sft", nats=None, **changed) -> Measured:
    """A run whose first `right` of 40 problems are solved; `changed` are settings."""
    solved = np.arange(N) < right
    tables = [item_rows(stage, task, "exact match", range(N), solved)
              for task in ("instructions", "problems")]
    if nats is not None:
        tables.append(item_rows(stage, "perplexity", "nats per token, text", range(N), nats,
                                weight=np.full(N, 10)))
    return Measured(name, pd.concat(tables), {**flat(settings or SETTINGS), **changed})


def test_the_same_items_are_compared_one_by_one():
    """Twelve of forty more, none lost: McNemar's test is 2 / 2**12, and the interval is of the
    differences, item by item.
    """
    rows = compare_runs(run("a", 20), [run("b", 32)]).to_dict("records")
    assert [row["task"] for row in rows] == ["instructions", "problems"]
    for row in rows:
        assert row["paired"] and row["n"] == N and (row["before"], row["after"]) == (0.5, 0.8)
        assert row["value"] == pytest.approx(0.3) and 0.1 < row["low"] < 0.3 < row["high"] < 0.5
        assert row["p"] == pytest.approx(2 / 2**12, rel=0.02) and row["says"] == "better"
        assert sentence(row) == "better (the same 40 items)"


def test_other_items_are_not_paired():
    """The seed draws word problems, and nothing else; other settings of the evaluation draw all."""
    rows = compare_runs(run("a", 20), [run("b", 32, seed=1)]).set_index("task")
    assert rows.paired.to_dict() == {"instructions": True, "problems": False}
    assert rows.loc["problems", "low"] < rows.loc["instructions", "low"]
    assert "not paired" in sentence(rows.loc["problems"].to_dict())
    rows = compare_runs(run("a", 20), [run("b", 32, **{"eval.num_problems": 41})])
    assert not rows.paired.any()
    assert compare_runs(run("a", 20), [run("b", 32, **{"eval.batch_rows": 1})]).paired.all()


def test_a_win_that_two_seeds_have_as_well_is_none():
    pair = [run("a", 20), run("again", 33, seed=1)]
    rows = compare_runs(run("a", 20), [run("b", 32)], pair).set_index("task")
    assert set(rows.says) == {"within the noise"}
    assert rows.noise.tolist() == pytest.approx([0.325, 0.325])
    assert "of two seeds, 0.325" in sentence(rows.loc["problems"].to_dict())
    pair = [run("a", 20), run("again", 22, seed=1)]
    assert set(compare_runs(run("a", 20), [run("b", 32)], pair).says) == {"better"}


def test_between_stages_the_noise_is_that_of_their_difference():
    """Both seeds gain 0.1 from sft to dpo, from different heights."""
    key = lambda stage: (stage, "problems", "exact match")
    pair = []
    for seed, right in enumerate((10, 30)):
        sft, dpo = run("x", right, seed=seed), run("x", right + 4, stage="dpo", seed=seed)
        pair.append(replace(sft, items=pd.concat([sft.items, dpo.items])))
    values = values_of(pair)
    assert noise_of(values, key("dpo"), key("dpo")) == pytest.approx(0.5)
    assert noise_of(values, key("dpo"), key("sft")) == pytest.approx(0)
    assert noise_of(values, key("base"), key("base")) is None


@pytest.mark.fault("messages")
@pytest.mark.parametrize("changed, said", [
    ({"sft.max_steps": 10, "seed": 1}, "differ in seed, sft.max_steps"), ({}, "have one seed")])
def test_what_is_no_pair_is_refused(changed, said):
    with pytest.raises(StageError, match=said):
        values_of([run("a"), run("b", **changed)])


def test_items_to_tell_tell_in_four_of_five_repetitions():
    spread, difference = 0.5, 0.1
    n = items_to_tell(difference, spread)
    drawn = np.random.default_rng(0).normal(difference, spread, (4000, n))
    told = drawn.mean(1) - 1.96 * drawn.std(1, ddof=1) / math.sqrt(n) > 0
    assert told.mean() == pytest.approx(0.8, abs=0.02)
    assert items_to_tell(0.0, spread) == math.inf


def test_nats_of_other_tokens_are_left_out():
    nats = np.linspace(10, 20, N)
    rows = compare_runs(run("a", nats=nats), [run("b", nats=nats - 1)]).set_index("task")
    assert rows.loc["perplexity", "value"] == pytest.approx(-0.1)
    assert rows.loc["perplexity", "says"] == "better"
    other = run("b", nats=nats - 1)
    other.items.loc[other.items.task == "perplexity", "weight"] = 7.0
    assert "perplexity" not in set(compare_runs(run("a", nats=nats), [other]).task)


def test_settings_that_differ_are_named():
    assert differing(run("a"), run("b", seed=3, description="other")) == {"seed": (0, 3)}
    with pytest.raises(StageError, match="no measure in common"):
        both = run("b", stage="base").items, run("b", stage="dpo").items
        compare_runs(run("a"), [replace(run("b"), items=pd.concat(both))])


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Three runs in a folder, the last not evaluated."""
    for name, right, seed in (("a", 20, 0), ("b", 32, 0), ("again", 22, 1), ("bare", 0, 0)):
        place = tmp_path / name / "eval"
        place.mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(
            {"stages": {}, "config": {**SETTINGS, "seed": seed}}))
        if name != "bare":
            items = pd.concat([run(right=right).items, run(right=right - 9, stage="dpo").items])
            items.to_csv(place / "items.csv", index=False)
    return tmp_path


def typed(runs, *words):
    return CliRunner().invoke(main, ["compare", *map(str, words), "--output-dir", str(runs)])


def test_runs_are_compared_by_a_command(runs, tmp_path):
    done = typed(runs, "a", "b", "--noise", "a", "--noise", "again", "--to", tmp_path / "x.csv")
    assert done.exit_code == 0, done.output
    assert "b against a: the same settings" in done.output
    assert re.search(r"sft +instructions +exact match +0\.500 +0\.800 +\+0\.300 .*better",
                     done.output)
    assert set(pd.read_csv(tmp_path / "x.csv").says) == {"better"}
    assert "exists: --force" in typed(runs, "a", "b", "--to", tmp_path / "x.csv").output
    done = typed(runs, "a/sft", runs / "a" / "dpo")
    assert done.exit_code == 0 and "-0.225" in done.output and "no A/A pair" in done.output


def test_a_model_that_diverged_is_compared_all_the_same(runs):
    for name, nats in (("a", 20.0), ("b", math.nan)):
        items = run(right=20, nats=np.full(N, nats)).items
        items.to_csv(runs / name / "eval" / "items.csv", index=False)
    for pair in (("a", "b"), ("b", "a")):
        done = typed(runs, *pair)
        assert done.exit_code == 0, done.output
        line = next(line for line in done.output.splitlines() if "nats per token" in line)
        assert re.search(r"\bnan +nan +not known", line) or re.search(
            r"nan +2\.000 +nan +not known", line), line
        assert done.output.count("no difference shown") == 2


@pytest.mark.fault("messages")
@pytest.mark.parametrize("change, why", [
    (lambda text: "", "No columns to parse"),
    (lambda text: "\ufffe" + text, "it has no column stage"),
    (lambda text: text[:-6], "not every weight is a number"),
    (lambda text: text.replace(",value,", ",worth,", 1), "it has no column value")])
def test_damaged_items_are_named(runs, change, why):
    path = runs / "b" / "eval" / "items.csv"
    path.write_text(change(path.read_text()))
    done = typed(runs, "a", "b")
    assert (done.exit_code == 1 and f"{path} is damaged ({why}" in done.output
            and "--run b --stage eval --force" in done.output), done.output


@pytest.mark.fault("messages")
@pytest.mark.parametrize("words, said", [
    (["a"], "is compared with nothing"), (["a", "bb"], "did you mean 'b'?"),
    (["a", "bare"], "modern-llm run --run bare --stage eval"),
    (["a/sft", "b/pretrain"], "base was not evaluated; b has sft, dpo"),
    (["a", "b", "--noise", "a"], "name a second run"),
    (["a", "b", "--noise", "a", "--noise", "b"], "have one seed")])
def test_what_cannot_be_compared_is_refused_in_one_line(runs, words, said):
    done = typed(runs, *words)
    assert done.exit_code == 2 and said in done.output and len(done.output.splitlines()) == 1
