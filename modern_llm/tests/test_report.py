"""Reports from files: every section filled, or saying what fills it; the same files, the same text;
nothing overwritten.
"""

import json
import math
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from modern_llm.config import ALWAYS, TRAINED, get_pipeline_preset, to_dict
from modern_llm.evaluation.families import FAMILIES, TaskFamily, register_family
from modern_llm.report.evaluation import main_rows
from modern_llm.report.page import PUBLISHED, ReportError, Run, interval, markdown_table, number
from modern_llm.report.sections import few, texts_of
from modern_llm.report.seeds import summarise_seeds
from modern_llm.report.write import write_report
from modern_llm.runs.outcomes import headline, summary
from modern_llm.runs.pipeline import Step

MEASURE = {"low": 0.5, "high": 0.7, "n": 40, "protocol": "40 held-out | things"}
LEDGER = """stage,task,metric,value,low,high,n,protocol,seconds
base,perplexity,"bits per byte, synthetic",0.25,0.24,0.26,385,"each token, once",8.9
base,problems,exact match,0.18,0.13,0.23,250,documents,5.0
sft,problems,exact match,0.37,0.31,0.43,250,chat,5.0
sft,problems,"exact match, level 1",1.0,0.9,1.0,50,chat,5.0
sft,problems,"error, no end",0.1,0.05,0.2,250,chat,5.0
sft,problems,exact match minus base,0.19,0.13,0.25,250,paired,5.0
sft,"problems, sampled",majority@2,0.3,0.2,0.4,150,samples,5.0
sft,"problems, sampled",majority@16,0.4,0.3,0.5,150,samples,5.0
sft,protocols,"perplexity T1, synthetic",2.9,2.8,3.0,62,"T1, the text joined",3.0
sft,protocols,"perplexity T1, synthetic minus base",0.1,0.0,0.2,62,paired,3.0
sft,sentiment,majority class,0.52,0.43,0.61,120,always 'negative',2.0
sft,sentiment,"accuracy, 4-shot, direct",0.6,0.5,0.7,120,"label word; in 5 of 5 draws it says 'positive': a constant answer",2.0
sft,sentiment,"accuracy, 4-shot, direct, over draws",0.6,0.55,0.65,5,lowest and highest accuracy of a draw,2.0
sft,cost,minutes,1.5,1.5,1.5,1,wall clock,0.0
"""
GAINS = """stage,task,metric,against,value,change,low,high,n,significant,p
sft,problems,exact match,base,0.37,0.19,0.13,0.25,250,True,0.00012
sft,instructions,ended,base,1.0,0.015,0.0,0.035,200,False,
"""


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def metrics(**more):
    rows = [{"step": i, "tokens": i * 1000,
             "lr": 1e-3, "loss": 6 / i, "val_loss": 6 / i if i % 3 == 0 else None,
             **{name: value * i for name, value in more.items()}} for i in range(1, 10)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(runs, name="small", seed=0, shift=0.0, stages=ALWAYS, preset="lesson"):
    """The files of a run, with the keys that the stages write."""
    folder = runs / name
    row = lambda metric, value=0.6: {"metric": metric, "value": value + shift, **MEASURE}
    trained = {"steps": 9, "tokens": 9000, "train_seconds": 30.0, "tokens_per_s": 300.0,
               "ended_by": "finished"}
    found = {
        "pretrain": {**trained, "table": [row("bits per byte, synthetic")], "floor": 0.3,
                     "samples": ["One day ▸ Tom"],
                     "data": [{"source": "synthetic", "split": "train", "tokens": 299_977,
                               "fingerprint": "3331a6c8"}]},
        "sft": {**trained, "table": [row("ends by itself and parses")],
                "examples": [{"source": "synthetic", "kept": 2000}],
                "samples": [{"request": "Say ```x```", "base": "the the", "SFT": "x"}]},
        "dpo": {**trained, "table": [row("preference accuracy, after, synthetic")],
                "pairs": [{"pairs": "all, train", "kept": 9}],
                "alarms": [{"alarm": "stuck at log 2", "step": 7, "detail": "0.693"}],
                "samples": [{"prompt": "Hi", "before": "a", "after": "b"}]},
        "verifier":
            {**trained,
             "table": [row("within-problem AUC, verifier"),
                       {**row("pooled AUC, verifier"), "low": None, "high": None}],
             "rerank": [{"method": m, "size": n, "value": 0.4, "low": 0.3, "high": 0.5, "n": 100}
                        for m in ("random", "weighted_vote") for n in (1, 16)],
             "calibration": [{"score": s, "value": s, "low": s - 0.1, "high": s + 0.1, "n": 20}
                             for s in (0.2, 0.5, 0.8)],
             "data": [{"": "train", "answers": 4800}],
             "variants": [{"variant": "encoder", "within-problem AUC": 0.5}]},
        "eval": {"table": []},
        "attention": {"table": [row("induction, best head", 0.01)],
                      "observations": ["16 heads by role: 16 mixed."],
                      "roles": {"self": ["self", 0.4]},
                      "heads": [{"layer": 0, "head": 0, "self": 0.2, "role": "mixed"}],
                      "examples": {"sentiment, positive": {}}},
    }
    more = {"dpo": {"margin": 0.1, "val_margin": 0.1, "reward_accuracy": 0.1, "chosen": -1.0,
                    "rejected": -2.0}}
    for stage in stages:
        write(folder / stage / "results.json", found[stage])
        write(folder / stage / "params.json",
              {"stage": stage, "preset": preset, "run": name, "seed": seed or None,
               "checkpoint": "", "max_steps": None,
               "overrides": "sft.lr=1e-3 model.width=64" if stage == "sft" else ""})
        if stage in TRAINED:
            write(folder / stage / "metrics.jsonl", metrics(**more.get(stage, {})))
    if "eval" in stages:
        write(folder / "eval" / "ledger.csv", LEDGER)
        write(folder / "eval" / "stage_gains.csv", GAINS)
        curve = [{"stage": "sft", "size": n, "value": 0.3, "low": 0.2, "high": 0.4, "n": 150}
                 for n in (1, 4)]
        levels = {f"level {i}": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 50} for i in (1, 2)}
        analysis = {"stages": {"sft": {"greedy by level": levels}}, "curves": {"majority": curve}}
        write(folder / "eval" / "gsm8k_analysis.json", analysis)
        write(folder / "eval" / "contamination.csv",
              "source,set,items,too_short,hit,hit_share,ngrams,found,found_share,example\n"
              "built-in text,problems,250,0,9,0.036,4000,40,0.01,Mia has [8 keys] today\n")
        write(folder / "eval" / "clean_scores.csv",
              "stage,task,metric,subset,value,low,high,n,protocol\n"
              "sft,problems,exact match,all,0.5,0.4,0.6,250,x\n"
              'sft,problems,"exact match, clean",clean,0.4,0.3,0.5,241,x\n')
        write(folder / "eval" / "verifier_mistakes.json",
              {"false positives": [{"question": "How many?", "gold": "1+1=2\n#### 2",
                                    "answer": "#### 3", "score": 0.91}] * 4,
               "false negatives": [],
               "right without an end": [{"question": "How many?", "gold": "#### 2",
                                         "answer": "#### 2One day", "score": 0.01}]})
        write(folder / "eval" / "baseline_comparison.json",
              {"models": {"sft": {"problems": {"exact match": MEASURE | {"value": 0.37}}}},
               "not available here": {"gpt2": "no folder"}})
        for name in PUBLISHED:
            if not (folder / "eval" / name).exists() and name != "checkpoint_eval.json":
                write(folder / "eval" / name, {})
    if "attention" in stages:
        for file in ("heads", "keys_sentiment_positive", "maps_sentiment_positive"):
            write(folder / "attention" / "figures" / f"attention_{file}.png", "PNG")
    entry = {"status": "finished", "started": "2026-11-21T06:19:32+00:00", "seconds": 60.0 + seed}
    config = {**to_dict(get_pipeline_preset("lesson")), "seed": seed}
    write(folder / "run.json",
          {"run": name, "preset": "lesson", "config": config, "git_commit": "c0ffee+changes",
           "seed": seed, "versions": {"python": "3.11.7", "torch": "2.13.0"}, "device": "cpu",
           "device_name": "x86_64", "threads": 2, "platform": "Linux",
           "stages": {stage: entry for stage in stages}})
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Reports whose text alone is looked at: figures are laid out, but not painted."""
    monkeypatch.setattr("modern_llm.figures.small_png", lambda figure: b"a picture")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    make_run(place / "runs")
    return place, write_report("small", place / "runs", place / "out")


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_section_is_filled(written):
    place, path = written
    text = path.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, flags=re.M)
    assert titles == ["Results beside their controls", "What worked", "What did not",
                      "Cost and command", "Results", "Stage gains", "What the verifier is worth",
                      "Across seeds", "Perplexity in four protocols", "Sentiment by demonstrations",
                      "Was it in the training text?", "Beside third-party models",
                      "Training curves and what each stage measured", "Samples", "Attention",
                      "Architecture", "Data", "Hardware, versions, seed"]
    assert "not run" not in text.replace(section(text, "Across seeds"), "")
    assert "180,864 parameters" in text and "6.0 minutes in all, 36,000 training tokens" in text
    assert "begun 2026-11-21" in text
    assert "| problems | exact match | 0.180 [0.130, 0.230] | 0.370 [0.310, 0.430] | 250 |" in text
    assert "majority@2 |" not in section(text, "Results") and "majority@16" in section(text,
                                                                                       "Results")
    assert "stuck at log 2 at step 7" in text and "40 held-out \\| things" in text
    assert "Say '''x'''" in text and "16 heads by role: 16 mixed." in text
    assert ("| perplexity T1, synthetic | 2.900 [2.800, 3.000] |"
            in section(text, "Perplexity in four protocols"))
    assert ("a constant answer" in section(text, "Sentiment by demonstrations")
            and "0.550 … 0.650" in text)
    assert ("0.500 [0.400, 0.600] (n = 250) | 0.400 [0.300, 0.500] (n = 241) |"
            in section(text, "Was it in the training text?"))
    assert "gpt2 | not available here: no folder" in section(text, "Beside third-party models")
    assert "minutes" not in section(text, "Results")
    assert "+0.190 [0.130, 0.250], p = 0.00012 | better | 250 |" in text
    assert "No other change is significant." in section(text, "Stage gains")


def test_the_first_model_is_called_pretrained(written):
    text = written[1].read_text(encoding="utf-8")
    assert not re.search(r"\bbase\b", text) and "[pretrained] the the" in text
    assert "| task | metric | pretrained | SFT | n |" in text


def test_mistakes_of_the_verifier_are_of_three_kinds(written):
    shown = section(written[1].read_text(encoding="utf-8"), "What the verifier is worth")
    liked, _, rest = shown.partition("**Right answers it likes least:** none.")
    assert liked.count("score 0.91: `How many?` → `#### 3` (should be `#### 2`)") == 3
    assert "**Right answers that do not end:**\n* score 0.01: `How many?` → `#### 2One day`" in rest


def test_samples_kept_by_column_are_shown_one_by_one():
    both = {"problem": ["one?", "two?"], "sft": ["1", "2"]}
    assert texts_of(both) == [{"problem": "one?", "sft": "1"}, {"problem": "two?", "sft": "2"}]
    assert texts_of(["a"]) == ["a"] and texts_of({"before": "x"}) == [{"before": "x"}]
    cases = [[("problem", "x\n" * 9)], [("problem", "y")], [("problem", "z\n" * 9)]]
    assert few(cases) == cases[:1] and few(cases[1:2] * 9) == cases[1:2] * 2


MEASURED = {"value", "low", "high", "floor", "loss", "val_loss", "margin", "val_margin",
            "reward_accuracy", "chosen", "rejected", "score", "train_seconds", "tokens_per_s",
            "change"}


def unknown(value, names):
    """The value with null for every number that has one of the names."""
    if isinstance(value, list):
        return [unknown(part, names) for part in value]
    if isinstance(value, dict):
        return {name: None if name in names and isinstance(part, (int, float))
                      else unknown(part, names) for name, part in value.items()}
    return value


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("names", [MEASURED, {"high", "val_loss", "score"}],
                         ids=["everything", "some"])
def test_what_a_run_does_not_know_is_left_blank(names, tmp_path):
    folder = make_run(tmp_path)
    for path in [*folder.glob("*/results.json"), folder / "eval" / "gsm8k_analysis.json",
                 folder / "eval" / "baseline_comparison.json",
                 folder / "eval" / "verifier_mistakes.json"]:
        write(path, unknown(json.loads(path.read_text()), names))
    for path in folder.glob("*/metrics.jsonl"):
        write(path, "".join(json.dumps(unknown(json.loads(line), names)) + "\n"
                            for line in path.read_text().splitlines()))
    for name in ("ledger.csv", "stage_gains.csv", "clean_scores.csv"):
        table = pd.read_csv(folder / "eval" / name)
        table[[column for column in table if column in names]] = math.nan
        table.to_csv(folder / "eval" / name, index=False)
    text = write_report("small", tmp_path, tmp_path / "out").read_text()
    assert (len(re.findall("^## ", text, flags=re.M)) == 18
            and not re.search(r"\bnan\b|\bNone\b|\binf\b", text))
    for stage in ALWAYS:
        assert ("nan" not in summary(Step(stage, folder / stage, {}, "skip"))
                + headline(stage, json.loads((folder / stage / "results.json").read_text())))
    make_run(tmp_path, "small-seed1", seed=1)
    assert len(summarise_seeds([tmp_path / "small", tmp_path / "small-seed1"]))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.fault("counts")
def test_minutes_of_several_gpus_are_those_of_all(tmp_path):
    """Four ranks that train for a minute have cost four GPU minutes; a stage that does not train
    runs on one.
    """
    folder = make_run(tmp_path, stages=("pretrain", "attention"))
    record = json.loads((folder / "run.json").read_text())
    record |= {
        "device": "cuda:0",
        "config": {**record["config"], "hardware": {**record["config"]["hardware"], "ranks": 4}}}
    write(folder / "run.json", record)
    text = write_report(folder.name, tmp_path, tmp_path / "report").read_text()
    table = [line.split(" | ") for line in text.split("\n## ")[0].splitlines()
             if line.startswith("| ")]
    column, clock = table[0].index("GPU minutes"), table[0].index("minutes")
    share = {row[0].strip("| "): float(row[column]) / float(row[clock])
             for row in table[1:] if row[0].strip("| ") in ALWAYS and row[clock]}
    assert share == {"pretrain": 4, "attention": 1}


def test_pictures_are_there_and_shown(written):
    place, path = written
    shown = re.findall(r"\]\((figures/[^)]+)\)", path.read_text(encoding="utf-8"))
    assert all((place / "out" / name).is_file() for name in shown)
    names = {name.rpartition("/")[2] for name in shown}
    assert {"results.png", "gains.png", "rerank.png", "calibration.png", "rerank_eval_sft.png",
            "sentiment.png", "levels.png", "pretrain.png", "sft.png", "dpo.png",
            "dpo_preferences.png", "verifier.png", "parameters.png",
            "attention_heads.png", "attention_keys_sentiment_positive.png",
            "attention_maps_sentiment_positive.png"} == names


def test_the_numbers_are_published_beside_the_report(written):
    place, path = written
    folder = place / "out" / "results" / "small"
    assert ({p.name for p in folder.iterdir()}
            == {*PUBLISHED, *(f"{stage}.json" for stage in ALWAYS), "protocols.csv",
                "made_from.csv"} - {"checkpoint_eval.json"})
    assert {"comparison_table.csv", "stage_gains.csv", "gsm8k_analysis.json", "base_eval.json",
            "sft_eval.json", "dpo_eval.json", "verifier_eval.json"} <= set(PUBLISHED)
    linked = re.findall(r"\]\((results/[^)]+)\)", path.read_text(encoding="utf-8"))
    assert linked and all((place / "out" / name).is_file() for name in linked)
    protocols = pd.read_csv(folder / "protocols.csv")
    assert "chat" in set(protocols.protocol) and not protocols.metric.str.contains(" minus ").any()
    assert pd.read_csv(folder / "made_from.csv").file.str.contains("eval/ledger.csv").any()


def test_synthetic_data_are_called_so_beside_the_numbers(written):
    text = written[1].read_text(encoding="utf-8")
    for title in ("Results", "Stage gains", "What the verifier is worth", "Data"):
        assert "**Synthetic data:** `synthetic" in section(text, title), title


@pytest.mark.usefixtures("undrawn")
def test_real_data_are_not_called_synthetic(tmp_path):
    folder = make_run(tmp_path, stages=("pretrain",))
    record = json.loads((folder / "run.json").read_text())
    record["config"]["data"]["sources"] = ["tinystories"]
    write(folder / "run.json", record)
    assert "Synthetic data" not in write_report("small", tmp_path, tmp_path / "out").read_text()


def test_commands_are_exact(written):
    commands = section(written[1].read_text(encoding="utf-8"), "Cost and command")
    assert "git checkout c0ffee\n" in commands and "changes that were not committed" in commands
    assert ("modern-llm run --preset lesson --run small --stage sft -p 'overrides=sft.lr=1e-3 "
            "model.width=64'\n" in commands)
    assert "--stage pretrain\n" in commands


def test_a_checkpoint_beside_the_run_is_named_from_the_checkout(tmp_path):
    folder = make_run(tmp_path / "runs", stages=("pretrain", "sft"))
    params = json.loads((folder / "sft/params.json").read_text())
    for given, shown in ((tmp_path / "runs/other/pretrain", "runs/other/pretrain"),
                         ("/elsewhere/model", "/elsewhere/model")):
        write(folder / "sft/params.json", {**params, "checkpoint": str(given)})
        assert f"--checkpoint {shown} " in Run(folder).command("sft") + " "


@pytest.mark.usefixtures("undrawn")
def test_same_files_same_text(written, tmp_path):
    place, path = written
    shutil.copytree(place / "runs", tmp_path / "runs")
    record = json.loads((tmp_path / "runs/small/run.json").read_text())
    # the pipeline notes it there
    write(tmp_path / "runs/small/run.json", {**record, "report": {"path": "somewhere", "of": "x"}})
    assert (write_report("small", tmp_path / "runs", tmp_path / "elsewhere").read_bytes()
            == path.read_bytes())


def test_nothing_is_overwritten_without_force(tmp_path):
    folder = make_run(tmp_path / "runs", stages=("pretrain",))
    first = write_report("small", tmp_path / "runs", tmp_path / "out")
    before = first.read_text()
    # it would say the same
    assert write_report("small", tmp_path / "runs", tmp_path / "out") == first
    results = json.loads((folder / "pretrain/results.json").read_text())
    write(folder / "pretrain/results.json", {**results, "steps": 10})
    pictures = {p: p.read_bytes() for p in (tmp_path / "out/figures/small").iterdir()}
    second = write_report("small", tmp_path / "runs", tmp_path / "out")
    third = write_report("small", tmp_path / "runs", tmp_path / "out")
    assert len({first, second, third}) == 3 and first.read_text() == before
    assert (re.fullmatch(r"small_report-\d{8}-\d{6}\.md", second.name)
            and "(figures/small-2" in second.read_text())
    assert all(p.read_bytes() == content for p, content in pictures.items())
    assert (write_report("small", tmp_path / "runs", tmp_path / "out", force=True) == first
            and first.read_text() != before)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stages", [(), ("pretrain",), ("pretrain", "sft", "eval"), ("attention",)])
def test_a_stage_that_is_missing_says_what_fills_it(tmp_path, stages):
    make_run(tmp_path / "runs", stages=stages)
    text = write_report("small", tmp_path / "runs", tmp_path / "out").read_text()
    for stage in set(ALWAYS) - set(stages):
        assert (f"modern-llm run --preset lesson --run small --stage {stage}\n```" in text
                or stage in ("pretrain", "eval"))
        assert (f"`{stage}` was not run: `modern-llm run --preset lesson --run small --stage "
                f"{stage}`" in text)


def test_a_failed_stage_and_absent_keys(tmp_path):
    folder = make_run(tmp_path / "runs", stages=("pretrain", "sft", "verifier", "attention"))
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["dpo"] = {"status": "failed", "started": "2026-11-21T06:19:32+00:00",
                               "seconds": 3.0}
    write(folder / "run.json", record)
    for stage in ("pretrain", "sft", "verifier", "attention"):  # only what every stage promises
        write(folder / stage / "results.json", {"table": [{"metric": "m", "value": 0.5}]})
        (folder / stage / "metrics.jsonl").unlink(missing_ok=True)
    text = write_report("small", tmp_path / "runs", tmp_path / "out").read_text()
    assert "dpo: failed, no results" in text and "`dpo` is failed" in text


def test_errors_name_the_place_and_the_remedy(tmp_path):
    folder = make_run(tmp_path / "runs", stages=("pretrain",))
    with pytest.raises(ReportError, match="'smal'.*small"):
        write_report("smal", tmp_path / "runs", tmp_path / "out")
    (folder / "pretrain/results.json").write_text("{")
    with pytest.raises(ReportError, match="results.json is not JSON.*again"):
        write_report("small", tmp_path / "runs", tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_seeds_are_summarised(tmp_path):
    runs = tmp_path / "runs"
    each = (("small", 0, 0), ("small-seed1", 1, 0.1), ("small-seed2", 2, 0.3))
    folders = [make_run(runs, name, seed, shift, stages=("pretrain", "eval"))
               for name, seed, shift in each]
    table = summarise_seeds(folders).set_index(["stage", "metric"])
    found = table.loc[("pretrain", "bits per byte, synthetic")]
    assert found["runs"] == 3 and found["values"] == pytest.approx([0.6, 0.7, 0.9])
    assert (found["low"], found["median"], found["high"]) == pytest.approx((0.6, 0.7, 0.9))
    assert (table.loc[("sft", "exact match"), "runs"] == 3
            and table.loc[("eval", "minutes"), "median"] == pytest.approx(61 / 60))
    text = section(write_report("small", runs, tmp_path / "out").read_text(), "Across seeds")
    published = pd.read_csv(tmp_path / "out" / "results" / "small" / "seeds.csv")
    assert published.metric.tolist() == [metric for _, metric in table.index]
    assert ("Median and range of 3 runs: `small` (seed 0), `small-seed1` (seed 1), `small-seed2` "
            "(seed 2)." in text)
    assert "| own table | bits per byte, synthetic | 0.700 (0.600 … 0.900) |" in text
    chosen = write_report("small", runs, tmp_path / "two",
                          seeds=["small", "small-seed2"]).read_text()
    assert "Median and range of 2 runs" in chosen


@pytest.mark.usefixtures("undrawn")
@pytest.mark.fault("scheduler")
@pytest.mark.parametrize(
    "name, content",
    [("run.json", b"{"), ("run.json", b"[]"), ("eval/results.json", b"\xff"),
     ("run.json", b'{"stages": 5, "seed": 2}'), ("pretrain/results.json", b'{"table": [5]}'),
     ("eval/ledger.csv", b"a,b\n1,2\n")])
def test_a_damaged_sibling_is_left_out_of_the_seeds(tmp_path, capsys, name, content):
    runs = tmp_path / "runs"
    folders = [make_run(runs, f"small{end}", seed, stages=("pretrain", "eval"))
               for seed, end in enumerate(("", "-seed1", "-seed2"))]
    (folders[2] / name).write_bytes(content)
    text = section(write_report("small", runs, tmp_path / "out").read_text(), "Across seeds")
    assert "Median and range of 2 runs" in text and "small-seed2" not in text
    assert ("small-seed2 is left out of the report across seeds" in capsys.readouterr().err
            or name == "run.json")


@pytest.mark.usefixtures("undrawn")
def test_runs_that_are_not_seeds_of_one_recipe_are_refused(tmp_path):
    each = (("one", 0), ("one-seed7", 0), ("other", 1))
    one, twin, other = (make_run(tmp_path, name, seed, stages=("sft",)) for name, seed in each)
    with pytest.raises(ReportError, match="not all different"):
        summarise_seeds([one, twin])
    with pytest.raises(ReportError, match="at least two"):
        summarise_seeds([one])
    record = json.loads((other / "run.json").read_text())
    record["config"]["sft"]["lr"] = 0.5
    write(other / "run.json", record)
    with pytest.raises(ReportError, match="differ in sft"):
        summarise_seeds([one, other])
    # its twin is no other seed
    assert "one seed only" in write_report("one", tmp_path, tmp_path / "out").read_text()


def test_main_rows():
    import io

    import pandas as pd

    kept = main_rows(pd.read_csv(io.StringIO(LEDGER)))
    assert kept.metric.tolist() == ["bits per byte, synthetic", "exact match", "exact match",
                                    "majority@16"]


@pytest.mark.usefixtures("undrawn")
def test_a_task_in_one_entry_is_in_the_report(tmp_path, monkeypatch):
    from modern_llm.report import pictures

    family = TaskFamily("spelling", str, str, str, headline=("exact match",), aside="^letter, ")
    monkeypatch.setitem(FAMILIES, "spelling", family)
    make_run(tmp_path / "runs")
    with open(tmp_path / "runs" / "small" / "eval" / "ledger.csv", "a") as file:
        file.write('sft,spelling,exact match,0.8,0.7,0.9,50,"greedy, whole word",1.0\n'
                   'sft,spelling,"letter, a",0.1,0.0,0.2,50,greedy,1.0\n')
    drawn, draw = [], pictures.stage_results
    monkeypatch.setattr(pictures, "stage_results",
                        lambda table: drawn.extend(table.panel) or draw(table))
    text = write_report("small", tmp_path / "runs", tmp_path / "out").read_text()
    assert "| spelling | exact match |" in text and "\n| spelling | letter, a |" not in text
    protocols = tmp_path / "out" / "results" / "small" / "protocols.csv"
    assert "greedy, whole word" in protocols.read_text() and "spelling\nexact match" in drawn
    monkeypatch.delitem(FAMILIES, "spelling")
    assert register_family(family) is FAMILIES["spelling"] and family.leads("exact match")
    with pytest.raises(ValueError, match="'spelling' is taken"):
        register_family(family)


def test_numbers_and_tables():
    shown = {None: "", 3: "3", 1_843_200: "1,843,200", 0.39708: "0.397", 7285.1: "7,285.1",
             True: "True", float("nan"): "", "a": "a", 0.00002: "0.00002",
             1.5e12: "1,500,000,000,000"}
    assert {value: number(value) for value in shown} == shown
    alone = {"value": 0.143, "low": 0.143, "high": 0.143}
    assert (interval(alone | {"n": 1}) == "0.143 (n = 1)"
            and interval(alone | {"n": 9}) == "0.143 [0.143, 0.143]")
    assert (interval({"value": 0.5}) == "0.500"
            and interval({"value": 0.5, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]")
    lines = markdown_table([{"a": "x|y", "b": 1}, {"a": "two\nlines", "c": 2}]).splitlines()
    assert lines[2:] == ["| x\\|y | 1 |  |", "| two ⏎ lines |  | 2 |"]


def test_no_torch_is_loaded(tmp_path):
    make_run(tmp_path / "runs", stages=("pretrain",))
    code = (
        "import sys; from pathlib import Path; from modern_llm.report.write import write_report; "
        "write_report('small', Path('runs'), Path('out')); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_run_reads_only_what_is_there(tmp_path):
    run = Run(tmp_path / "nothing")
    assert (run.record == run.results == run.params == run.stages == {}
            and run.frame("eval/ledger.csv").empty)
