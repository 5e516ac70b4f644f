"""Comparisons with peers: fair ones, and a table of them that nothing overwrites. Tiny shapes."""

import csv
from dataclasses import replace

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import ModelConfig
from modern_llm.evaluation import growth, peer_lines
from modern_llm.evaluation.peer_lines import (
    PeerLine, bench_peers, draw, has_data, peer_lines as all_lines, spoken_table,
)
from modern_llm.evaluation.peer_training import (
    OURSELVES, Bench, compare_dpo, compare_sft, compare_steps, llama_of, our_step, plain_step,
    random_batch,
)
from modern_llm.evaluation.peer_programs import compare_generation
from modern_llm.messages import StageError
from modern_llm.models.decoder import ModernDecoderLM

TINY = ModelConfig(vocab_size=400, context_length=64, width=32, num_layers=2, num_heads=2,
                   num_kv_heads=1, ffn_width=64, use_qk_norm=False, zero_init_outputs=False)


class Short(Bench):
    """A bench of tiny shapes, measured as briefly as can be."""

    turns = {"pairs": 1}


@pytest.fixture
def bench():
    return Short(True, {"tiny": TINY}, {"fp32": 1e11, "bf16": 1e10})


def test_both_sides_train_the_same_thing():
    """The same weights and batch: the same loss before an update, and after."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = ModernDecoderLM(TINY), random_batch(TINY, 3)
    ours, theirs = our_step(TINY, 3, model=model), plain_step(llama_of(model), batch)
    first, second = ((ours(), theirs()) for _ in range(2))
    assert abs(first[0] - first[1]) < 1e-4 and abs(second[0] - second[1]) < 1e-4
    assert second[0] < first[0] - 1e-3


@pytest.mark.parametrize("peer", ["transformers", "nanoGPT's recipe", "litgpt", OURSELVES])
def test_a_step_is_compared(bench, peer):
    if peer in ("transformers", "litgpt"):
        pytest.importorskip(peer)
    row = compare_steps(bench, "tiny", 2, peer)
    assert row["ratio"] > 0 and row["pairs"] == 1 and 0 < row["ours_of_limit"] < 1
    assert row["ours_gb"] > 0 and row["peer_gb"] > 0 and "eager" in row["ours_settings"]
    assert peer != OURSELVES or row["ours_gb"] == row["peer_gb"]


def test_answers_are_the_same_on_both_sides(bench):
    pytest.importorskip("transformers")
    row = compare_generation(bench, "tiny", 2, 6)
    assert row["units"] == 12 and row["checked"] == "100% of the answers token for token"


@pytest.mark.parametrize("compare", [compare_sft, compare_dpo])
def test_an_epoch_is_compared(bench, compare):
    pytest.importorskip("trl")
    bench.shapes["tiny"] = replace(TINY, context_length=128)
    row = compare(bench, "tiny", 4, 8, "synthetic")
    assert row["ratio"] > 0 and 0 < row["units"] <= 8


def lines_of(**results):
    """A line for each of these rows or exceptions; calls are counted."""
    calls = []

    def compare(bench, name):
        calls.append(name)
        if isinstance(results[name], BaseException):
            raise results[name]
        return {"ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5, "pairs": 3, "units": 4,
                "ours_s": 1.0, "peer_s": 2.0, "unit": "tokens", "peer_settings": "plain",
                **results[name]}

    return [PeerLine(name, "peer", compare, {"name": name}) for name in results], calls


@pytest.fixture
def quick_limit(monkeypatch):
    monkeypatch.setattr(peer_lines, "matrix_speed", lambda *sizes: 1e11)


def read(folder):
    with open(folder / "benchmarks.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_stopped_table_goes_on_and_what_failed_is_tried_again(tmp_path, quick_limit):
    lines, calls = lines_of(one={}, bad=ValueError("no\nunits"), two=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench_peers(tmp_path, True, lambda text: None, lines)
    rows = read(tmp_path)
    assert [row["line"] for row in rows] == ["matrix fp32", "matrix bf16", "one", "bad"]
    assert rows[3]["status"] == "failed: ValueError: no units"
    with open(tmp_path / "benchmarks.csv", "a") as file:
        file.write("two,pee")  # torn
    lines, calls = lines_of(one={}, bad={}, two={})
    bench_peers(tmp_path, True, lambda text: None, lines)
    assert calls == ["bad", "two"] and (tmp_path / "benchmarks.png").is_file()
    assert [(row["line"], row["status"]) for row in read(tmp_path)[2:]] == [
        ("one", "ok"), ("bad", "ok"), ("two", "ok")]
    before = (tmp_path / "benchmarks.csv").read_bytes()
    bench_peers(tmp_path, True, lambda text: None, lines)
    assert calls == ["bad", "two"] and (tmp_path / "benchmarks.csv").read_bytes() == before


def test_another_kind_of_measurement_does_not_get_into_the_table(tmp_path, quick_limit):
    lines, calls = lines_of(one={})
    bench_peers(tmp_path, True, lambda text: None, lines)
    before = (tmp_path / "benchmarks.csv").read_bytes()
    with pytest.raises(StageError, match="begun with mode quick; here is mode full"):
        bench_peers(tmp_path, False, lambda text: None, lines)
    assert calls == ["one"] and (tmp_path / "benchmarks.csv").read_bytes() == before
    (tmp_path / "benchmarks.csv").write_text("my,own\n1,2\n")
    with pytest.raises(StageError, match="no table of this command"):
        bench_peers(tmp_path, True, lambda text: None, lines)


def test_a_peer_that_is_not_there_is_a_row_that_says_so(tmp_path, quick_limit):
    lines, calls = lines_of(one={})
    lines = [replace(lines[0], package="no-such-peer")]
    bench_peers(tmp_path, True, lambda text: None, lines)
    table = pd.read_csv(tmp_path / "benchmarks.csv")
    assert calls == [] and table.status[2] == "not installed: pip install no-such-peer"
    assert "not installed" in spoken_table(table).ratio["one"]


def test_the_lines_are_told_apart_and_built_in_data_stands_in(monkeypatch, tmp_path):
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    assert not has_data("alpaca")
    for quick in (True, False):
        names = [(line.name, line.peer) for line in all_lines(quick)]
        assert len(set(names)) == len(names)
        assert ("SFT epoch, synthetic", "trl") in names
    (tmp_path / "alpaca").mkdir()
    assert "SFT epoch, alpaca" in [line.name for line in all_lines(True)]


def test_the_figure_leaves_out_what_was_not_measured(tmp_path):
    table = pd.DataFrame({"line": ["one", "two"], "peer": "p", "status": ["ok", "failed: x"],
                          "ratio": [2.0, None], "ratio_low": [1.5, None],
                          "ratio_high": [3.0, None]})
    ax, = draw(table).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one | p"]


def test_growth_goes_on_and_its_model_is_checked_where_it_did_not_look(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "matrix_speed", lambda *sizes: 1e11)
    calls = []

    def measure(point, *base, seconds):
        calls.append(point.value)
        return {"seconds_a_step": 0.01 + point.flops / 1e10, "flops": point.flops, "ratio": 1.0,
                "peak_gb": point.memory / 1e9, "expected_gb": point.memory / 1e9}

    monkeypatch.setattr(growth, "measure_point", measure)
    base = growth.Point("base", 0, TINY, 2)
    points = [point for point in growth.growth_points(True, base) if point.axis != "parameters"]
    growth.bench_growth(tmp_path, True, lambda text: None, points[:4], ranks=False)
    growth.bench_growth(tmp_path, True, lambda text: None, points, ranks=False)
    assert calls == [point.value for point in points]  # none twice
    found = growth.with_model(pd.read_csv(tmp_path / "growth.csv"))
    assert len(found) == len(points) and (found.time_error.abs() < 1e-3).all()
    assert (found.memory_error.abs() < 1e-3).all()


def test_the_command_takes_one_table_at_a_time():
    for words, said in ((["--peers", "--growth"], "one at a time"),
                        (["--quick"], "--quick is for --peers or --growth")):
        result = CliRunner().invoke(main, ["bench", *words])
        assert result.exit_code == 2 and said in result.output
