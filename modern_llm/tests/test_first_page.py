"""The first page of a report: each rule by which it says better, worse, no difference shown, or at
chance, with the case that breaks it.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from modern_llm.config import get_pipeline_preset, to_dict
from modern_llm.evaluation.ledger import COLUMNS, stage_gains, write_derived, write_ledger
from modern_llm.files import CHECKOUT
from modern_llm.report.first_page import commands, first_page
from modern_llm.report.page import Page, Run
from modern_llm.report.verdicts import (
    BETTER, FEW, SAME, WORSE, apart, at_chance, five_results, losses_by_kind, verdict,
)
from modern_llm.report.write import render
from modern_llm.statistics import proportion_interval


def row(stage, task, metric, value, low, high, n=200, protocol="x"):
    return dict(zip(COLUMNS, (stage, task, metric, value, low, high, n, protocol, 0.0)))


def share(stage, task, metric, right, n=100):
    found = proportion_interval(right, n)
    return row(stage, task, metric, found["value"], found["low"], found["high"], n)


def run_with(folder, rows, config=None, **results):
    """A run that has this ledger, what follows from it, and results of its stages."""
    stages = ("pretrain", "sft", "dpo", "verifier", "eval")
    results = {stage: {"table": []} for stage in stages} | results
    for stage, found in results.items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / "results.json").write_text(json.dumps(found))
        (folder / stage / "params.json").write_text(json.dumps(
            {"stage": stage, "preset": "lesson", "run": folder.name}))
    if rows:
        gains = stage_gains(write_ledger(folder / "eval", rows))
        gains.to_csv(folder / "eval" / "stage_gains.csv", index=False)
    entry = {"status": "finished", "seconds": 60.0}
    (folder / "run.json").write_text(json.dumps({
        "config": config or to_dict(get_pipeline_preset("lesson")), "device": "cpu",
        "stages": {stage: entry for stage in results}}))
    return Run(folder)


def parts(run):
    """The first page by its headings; what stands before them is under ""."""
    page = Page(run, Path("none"), "figures", "results")
    first_page(page)
    before, *rest = "\n\n".join(page.parts).split("\n\n## ")
    return {"": before, **dict(part.split("\n\n", 1) for part in rest)}


KINDS = [share("sft", "instructions", "exact match, fact", 13, 28),
         share("sft", "instructions", "exact match, copy", 16, 32),
         share("sft", "instructions", "exact match", 74, 200),
         share("dpo", "instructions", "exact match", 67, 200),
         share("dpo", "instructions", "exact match, copy", 14, 32),
         row("dpo", "instructions", "exact match minus sft", -0.035, -0.09, 0.02)]


def test_a_loss_of_one_kind_is_named_where_the_average_hides_it(tmp_path):
    lost = share("dpo", "instructions", "exact match, fact", 0, 28)
    page = parts(run_with(tmp_path / "lost", [*KINDS, lost]))
    assert ("DPO: instructions, exact match, fact: 0.464 [0.295, 0.642] (SFT) → 0.000 [0.000, "
            "0.121], -0.464 [-0.642, -0.257] not paired; over all kinds: no difference shown"
            in page["What did not"])
    assert "copy" not in page["What did not"]
    within = share("dpo", "instructions", "exact match, fact", 9, 28)
    assert not losses_by_kind(pd.DataFrame([*KINDS, within]))
    gained = share("dpo", "instructions", "exact match, fact", 28, 28)
    assert not losses_by_kind(pd.DataFrame([*KINDS, gained]))


def test_levels_are_kinds_and_draws_are_not():
    rows = [share(stage, task, metric, right)
            for stage, right in (("sft", 90), ("dpo", 10))
            for task, metric in (("problems", "exact match"), ("problems", "exact match, level 1"),
                                 ("sentiment", "accuracy, 4-shot, direct"),
                                 ("sentiment", "accuracy, 4-shot, direct, over draws"),
                                 ("problems, sampled", "exact match"),
                                 ("problems, sampled", "exact match, level 1"))]
    found = losses_by_kind(pd.DataFrame(rows))
    assert [(one["task"], one["metric"]) for one in found] == [("problems", "exact match, level 1")]


def test_a_tie_is_no_difference_shown(tmp_path):
    page = parts(run_with(tmp_path / "tie", KINDS))
    said = "DPO: instructions, exact match: -0.035 [-0.090, 0.020] against SFT, without DPO"
    assert f"**No difference shown:** {said}" in page["What did not"]
    assert page["What worked"] == "Nothing is shown to be better."
    assert page["What did not"].startswith("No loss is shown.")
    assert "| -0.035 [-0.090, 0.020] | no difference shown | 200 |" in page[
        "Results beside their controls"]


@pytest.mark.parametrize("change, less, said", [
    ({"low": 0.1, "high": 0.3}, False, BETTER), ({"low": 0.1, "high": 0.3}, True, WORSE),
    ({"low": -0.3, "high": -0.1}, False, WORSE), ({"low": -0.3, "high": -0.1}, True, BETTER),
    ({"low": 0.0, "high": 0.3}, False, SAME), ({"low": -0.1, "high": 0.3}, False, SAME),
    ({"low": 0.1, "high": 0.3, "p": 0.07}, False, SAME),
    ({"low": 0.1, "high": 0.3, "p": 0.04}, False, BETTER),
    ({"low": 0.1, "high": 0.3, "n": 5}, False, FEW), ({"low": 0.1, "high": None}, False, ""),
    ({"low": 0.1, "high": float("nan")}, False, "")])
def test_a_verdict_needs_interval_test_and_items(change, less, said):
    assert verdict({"value": 0.2, "n": 40, **change}, less) == said


def test_a_difference_that_was_not_paired_is_that_of_newcombe():
    one, other = proportion_interval(56, 70), proportion_interval(48, 80)
    found = apart(one, other)  # his table II, row a
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=5e-5)
    assert found["n"] == 70


def test_losses_that_are_not_among_the_results_are_named(tmp_path):
    rows = [share("sft", "problems", "ended", 97), share("dpo", "problems", "ended", 68),
            row("dpo", "problems", "ended minus sft", -0.29, -0.4, -0.17),
            share("sft", "problems", "flexible match", 50),
            share("dpo", "problems", "flexible match", 52),
            row("dpo", "problems", "flexible match minus sft", 0.02, -0.1, 0.14)]
    lost = parts(run_with(tmp_path / "ended", rows))["What did not"]
    assert "DPO: problems, ended, -0.290 [-0.400, -0.170] against SFT" in lost
    assert "flexible" not in lost


def test_a_tax_above_one_is_worse_and_stands_for_the_text(tmp_path):
    rows = [row("sft", "perplexity", "perplexity tax, synthetic", 0.99, 0.98, 0.999),
            row("dpo", "perplexity", "perplexity tax, synthetic", 1.02, 1.01, 1.03),
            row("sft", "perplexity", "nats per token, synthetic", 0.47, 0.46, 0.48),
            row("dpo", "perplexity", "nats per token, synthetic", 0.49, 0.48, 0.5),
            row("dpo", "perplexity", "nats per token, synthetic minus sft", 0.02, 0.01, 0.03)]
    page = parts(run_with(tmp_path / "tax", rows))
    assert "SFT: perplexity tax, synthetic: -0.010 [-0.020, -0.001]" in page["What worked"]
    assert "DPO: perplexity tax, synthetic: +0.020 [0.010, 0.030]" in page["What did not"]
    assert "nats" not in page["What did not"]
    page = parts(run_with(tmp_path / "no-tax", rows[2:]))
    assert "DPO: perplexity, nats per token, synthetic, +0.020" in page["What did not"]


def test_what_is_at_chance_is_called_so(tmp_path):
    rows = [row("base", "preferences", "accuracy", 0.42, 0.354, 0.489),
            row("sft", "preferences", "accuracy", 0.545, 0.476, 0.613),
            row("dpo", "preferences", "accuracy", 0.985, 0.957, 0.995),
            row("sft", "sentiment", "majority class", 0.52, 0.43, 0.61),
            row("sft", "sentiment", "accuracy", 0.55, 0.46, 0.63)]
    auc = {"metric": "within-problem AUC, verifier", "value": 0.55, "low": 0.45, "high": 0.65}
    run = run_with(tmp_path / "chance", rows, verifier={"table": [{**auc, "n": 40}]})
    said = parts(run)["What did not"].split("**At chance:** ")[1]
    assert ("preferences, accuracy (chance: 0.5): pretrained 0.420 [0.354, 0.489] (below), SFT "
            "0.545 [0.476, 0.613];" in said)
    assert "sentiment, accuracy (chance: majority class): SFT 0.550 [0.460, 0.630]" in said
    assert "within-problem AUC, verifier (chance: 0.5): 0.550 [0.450, 0.650]" in said
    assert "DPO" not in said
    rows[-1] |= {"low": 0.53}
    assert "sentiment" not in {one["task"] for one in at_chance(pd.DataFrame(rows))}


def chosen(**differences):
    """The ledger of a verifier's choice among the samples of dpo."""
    ways = {"random@4": 47, "log_prob@4": 52, "majority@4": 51, "exact match": 49}
    rows = [share("dpo", "problems, sampled", way, right) for way, right in ways.items()]
    rows += [share("verifier", "problems, sampled", "weighted_vote@4", 60),
             share("verifier", "problems, sampled", "best_of_n@4", 64)]
    return rows + [
        row("verifier", "problems, sampled", f"{name.replace('__', '@4 minus ')}", *found)
        for name, found in differences.items()]


def table_of(*own):
    """A verifier stage's results with a control that answers so many of 120 right."""
    return {"kind": "decoder",
            "rerank": [{"method": "weighted_vote", "size": 4, **proportion_interval(76, 120)}],
            "table": [{"metric": "greedy exact match, the verifier's own language model",
                       **proportion_interval(right, 120)} for right in own]}


def test_the_verifier_stands_beside_its_controls(tmp_path):
    rows = chosen(**{"weighted_vote__majority@4": (0.09, 0.04, 0.14),
                     "weighted_vote__log_prob@4": (0.08, -0.02, 0.14),
                     "weighted_vote__greedy": (0.11, 0.06, 0.17),
                     "best_of_n__random@4": (0.17, 0.12, 0.22)})
    page = parts(run_with(tmp_path / "behind", rows, verifier=table_of(100)))
    table = page["Results beside their controls"]
    for line in ("verifier: weighted vote of 4 | 0.600 [0.502, 0.691] | majority of 4 | 0.510",
                 "weighted vote of 4 | 0.600 [0.502, 0.691] | the likeliest of 4 | 0.520",
                 "weighted vote of 4 | 0.600 [0.502, 0.691] | one greedy answer | 0.490",
                 "best of 4 by its score | 0.640 [0.542, 0.727] | a random one of 4 | 0.470",
                 "best of 4 by its score | 0.640 [0.542, 0.727] | majority of 4 | 0.510",
                 "best of 4 by its score | 0.640 [0.542, 0.727] | the likeliest of 4 | 0.520"):
        assert line in table, line
    assert "verifier: weighted vote of 4: +0.080 [-0.020, 0.140]" in page["What did not"]
    assert "+0.090 [0.040, 0.140] against majority of 4" in page["What worked"]
    control = "against the generator trained on the same further problems, one greedy answer"
    assert control in page["What did not"].split("**No difference")[0]
    assert "which learned to judge besides" in table
    page = parts(run_with(tmp_path / "ahead", rows, verifier=table_of(40)))
    assert control in page["What worked"]
    encoder = {**table_of(100), "kind": "encoder"}
    for name, found in (("encoder", encoder), ("none", table_of())):
        page = parts(run_with(tmp_path / name, rows, verifier=found))
        assert "further problems was not recorded" in page["Results beside their controls"]
        assert control not in page["What did not"]


def test_the_verifier_stands_beside_the_generator_trained_on(tmp_path):
    found, on = table_of(100), "the generator trained on"
    share_of = lambda name, right: {"metric": f"{name}, {on}", **proportion_interval(right, 120)}
    change = lambda other, value: {
        "metric": f"weighted_vote@4 - {other}, {on}", "value": value, "low": value - 0.05,
        "high": value + 0.05, "n": 120}
    found["table"] += [share_of("greedy exact match", 90), share_of("majority@4", 60),
                       change("greedy", -0.12), change("majority@4", 0.13)]
    page = parts(run_with(tmp_path / "on", [], verifier=found))
    table = page["Results beside their controls"]
    what = "verifier: weighted vote of 4, the stage's held-out problems"
    for line in (f"| {what} | 0.633 [0.544, 0.714] | {on}, one greedy answer | 0.750",
                 f"| {what} | 0.633 [0.544, 0.714] | {on}, majority of 4 | 0.500"):
        assert line in table, line
    assert "took the verifier's steps on its batches" in table and "own language" not in table
    lost = page["What did not"].split("**No difference")[0]
    assert f"-0.120 [-0.170, -0.070] against {on}, one greedy answer" in lost
    assert f"+0.130 [0.080, 0.180] against {on}, majority of 4" in page["What worked"]
    assert "not paired" not in table


def test_dpo_stands_beside_the_same_training_without_preferences(tmp_path):
    measured = lambda name, value: {"metric": name, "value": value, "low": value - 0.05,
                                    "high": value + 0.05, "n": 88}
    table = [measured("preference accuracy, after, synthetic", 0.9),
             measured("obeys all rules, after", 0.7),
             measured("preference accuracy, control, synthetic", 0.6),
             measured("preference accuracy, after - control, synthetic", 0.3),
             measured("obeys all rules, control", 0.68),
             measured("obeys all rules, after - control", 0.02)]
    rows = [share("dpo", "preferences", "accuracy", 90)]
    page = parts(run_with(tmp_path / "with", rows, dpo={"table": table}))
    shown, beside = page["Results beside their controls"], "the same training without preferences"
    assert ("| DPO: preference accuracy, synthetic, the stage's own held-out pairs | 0.900 [0.850, "
            f"0.950] | {beside} | 0.600 [0.550, 0.650] | +0.300 [0.250, 0.350] | better | 88 |"
            in shown)
    assert f"+0.300 [0.250, 0.350] against {beside}" in page["What worked"]
    assert "DPO: obeys all rules" in page["What did not"].split("**No difference shown:**")[1]
    assert "takes DPO's steps on its batches" in shown and "was not recorded" not in shown
    without = parts(run_with(tmp_path / "without", rows, dpo={"table": table[:2]}))
    shown = without["Results beside their controls"]
    assert beside not in shown and "without its preferences was not recorded" in shown


def test_without_an_evaluation_the_stage_speaks_for_itself(tmp_path):
    found = table_of()
    found["table"] = [{"metric": "weighted_vote@4 - majority@4", "value": 0.1, "low": 0.05,
                       "high": 0.17, "n": 120}]
    run = run_with(tmp_path / "own", [], verifier=found)
    shutil.rmtree(tmp_path / "own" / "eval")
    page = parts(Run(run.folder))
    assert "verifier: weighted vote of 4: +0.100 [0.050, 0.170]" in page["What worked"]
    assert ("| DPO: preferences, with and without | not measured (`eval` not run) |"
            in page["Results beside their controls"])


def test_text_stands_beside_its_entropy_floor_source_by_source(tmp_path):
    rows = [row("base", "perplexity", f"perplexity, {name}", 3.0, 2.9, 3.1, 40)
            for name in ("synthetic", "tinystories")]
    above = {"metric": "above the floor, synthetic", "value": 0.12, "low": 0.11, "high": 0.13}
    run = run_with(tmp_path / "floor", rows, pretrain={"table": [above], "floor": 0.0})
    known, unknown = five_results(run)["pretraining"]
    assert known["other"] is None and known["change"] == above  # a floor of 0 is none
    assert unknown["beside"] == "its floor is not known" and unknown["change"] is None
    run = run_with(tmp_path / "known", rows, pretrain={"table": [above], "floor": 0.3515})
    assert ("| the entropy floor of the text | 1.421 | +0.120 [0.110, 0.130] (nats per token) | "
            "above the floor | 40 |" in parts(run)["Results beside their controls"])


def test_a_single_model_stands_beside_chance(tmp_path):
    rows = [row("checkpoint", "preferences", "accuracy", 0.7, 0.6, 0.8),
            row("checkpoint", "problems", "exact match", 0.2, 0.1, 0.3)]
    page = parts(run_with(tmp_path / "one", rows))
    assert ("| checkpoint: preferences, accuracy | 0.700 [0.600, 0.800] | chance | 0.500 |"
            in page["Results of the one model"])
    assert "problems, exact match" in page["Results of the one model"]


def test_one_command_where_all_stages_were_run_alike(tmp_path):
    run = run_with(tmp_path / "all", [], attention={"table": []})
    assert commands(run) == ["modern-llm run --preset lesson --run all --stage all"]
    params = run.folder / "sft" / "params.json"
    params.write_text(json.dumps({"preset": "lesson", "overrides": "sft.lr=1e-3"}))
    found = commands(Run(run.folder))
    assert len(found) == 7 and found[1].endswith("--stage sft -p overrides=sft.lr=1e-3")


def test_a_failed_stage_and_an_alarm_are_on_the_page(tmp_path):
    run = run_with(tmp_path / "failed", [], dpo={"table": [], "alarms": [
        {"alarm": "stuck at log 2", "step": 7, "detail": "0.693"}]})
    record = json.loads((run.folder / "run.json").read_text())
    record["stages"]["attention"] = {"status": "failed", "seconds": 3.0}
    (run.folder / "run.json").write_text(json.dumps(record))
    lost = parts(Run(run.folder))["What did not"]
    assert "* stage `attention` is failed" in lost
    assert "* DPO raised an alarm: stuck at log 2 at step 7 (0.693)" in lost


def test_a_report_is_short(tmp_path, monkeypatch):
    """The published run of local-smoke with three seeds, whatever the pictures show."""
    source, folder = CHECKOUT / "report" / "results" / "local-smoke", tmp_path / "local-smoke"
    stages = ("pretrain", "sft", "dpo", "verifier", "eval", "attention")
    for stage in stages:
        (folder / stage).mkdir(parents=True)
        shutil.copyfile(source / f"{stage}.json", folder / stage / "results.json")
    for path in (*source.glob("*.csv"), source / "verifier_mistakes.json"):
        shutil.copyfile(path, folder / "eval" / path.name)
    write_derived(folder / "eval")
    runs = [Run(folder), Run(tmp_path / "seed1"), Run(tmp_path / "seed2")]
    for seed, run in enumerate(runs):
        if seed:
            shutil.copytree(folder, run.folder)
        (run.folder / "run.json").write_text(json.dumps({
            "seed": seed, "config": to_dict(get_pipeline_preset("local-smoke")),
            "stages": {stage: {"status": "finished", "seconds": 60} for stage in stages}}))
    monkeypatch.setattr(Page, "drawn", lambda page, name, *_, **more: f"![{name}]\n*caption*")
    text = render(runs[0], tmp_path, runs)
    assert len(text.splitlines()) <= 400
    assert len(text.split("\n## Results\n")[0].splitlines()) <= 80
    tables = [part for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == len(set(tables))
