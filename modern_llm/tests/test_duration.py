"""Times as SLURM writes them, there and back, and how long an evaluation is thought to take."""

import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.cli import main
from modern_llm.cluster.duration import (
    ASSUMED_START_MINUTES, clock, estimate, minutes_of, tokens_per_step,
)
from modern_llm.config import ConfigError, get_pipeline_preset, preset_with
from modern_llm.report.published import published

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
NUMBER = st.integers(0, 500)
WRITTEN = st.sampled_from(["{}", "{:02d}", "{:03d}"])
FORMS = {  # of sbatch(1), --time, with what each number counts, in seconds
    "{}": (60,), "{}:{}": (60, 1), "{}:{}:{}": (3600, 60, 1), "{}-{}": (86400, 3600),
    "{}-{}:{}": (86400, 3600, 60), "{}-{}:{}:{}": (86400, 3600, 60, 1),
}


@pytest.mark.fault("counts")
@pytest.mark.parametrize(
    "text, minutes",
    [("1-12", 2160), ("2-00", 2880), ("0-1", 60), ("7-0", 10080), ("1-12:30", 2190),
     ("0-00:30", 30), ("1-12:30:00", 2190), ("2-00:00:00", 2880), ("90", 90),
     ("30:00", 30), ("02:00:00", 120), ("100:00:00", 6000), ("0:30", 1), ("30:01", 31),
     ("0-0:0:59", 1), (" 2-00:00:00\n", 2880), ("UNLIMITED", None), ("infinite", None),
     ("INFINITE", None), ("n/a", None), ("N/A", None), ("0", None), ("00:00:00", None)])
def test_times_as_slurm_writes_them(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.fault("counts")
@pytest.mark.parametrize(
    "text", ["", " ", "-5", "1-", "-", "1--2", "1-2-3", "1:2:3:4", "1-2:3:4:5", ":30", "30:", "1.5",
             "1e3", "two", "1h", "1-12h", "+5", "0x10", "1 - 12", "1: 30", "\u0661\u0662",
             "infinite-", "-infinite", "INVALID", "none", "Partition_Limit"])
def test_what_is_no_time_is_named(text):
    with pytest.raises(ConfigError,
                       match=re.escape(repr(text))
                             + " is not a time as SLURM writes it: .*days-hours:minutes:seconds"):
        minutes_of(text)


@pytest.mark.fault("counts")
@EXAMPLES
@given(form=st.sampled_from(list(FORMS)), numbers=st.lists(NUMBER, min_size=4, max_size=4),
       written=WRITTEN)
def test_every_form_counts_what_the_manual_says(form, numbers, written):
    text = form.format(*(written.format(number) for number in numbers))
    seconds = sum(number * unit for number, unit in zip(numbers, FORMS[form]))
    assert minutes_of(text) == (math.ceil(seconds / 60) or None)


@EXAMPLES
@given(st.integers(1, 10**6))
def test_there_and_back(minutes):
    assert minutes_of(clock(minutes)) == minutes


@pytest.mark.fault("counts")
@EXAMPLES
@given(st.floats(0, 10**5))
def test_what_is_asked_for_is_never_less_nor_no_limit(minutes):
    assert (minutes <= minutes_of(clock(minutes)) < minutes + 1
            or minutes_of(clock(minutes)) == 1 >= minutes)


@EXAMPLES
@given(st.text(st.sampled_from("0123456789:-. x"), max_size=9))
def test_any_text_is_a_time_or_a_config_error(text):
    try:
        found = minutes_of(text)
    except ConfigError as error:
        assert repr(text) in str(error)
    else:
        assert found is None or found > 0


@pytest.mark.fault("counts")
@pytest.mark.parametrize(
    "limit, code", [("1-12", 0), ("90", 0), ("ten", 2), ("-1", 2), ("1h30", 2)])
def test_a_time_that_is_none_is_refused_before_sbatch(limit, code, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_RUNS", str(tmp_path))
    result = CliRunner().invoke(main, ["submit", "--preset", "local-smoke", "--dry-run",
                                       f"--time={limit}"])
    assert result.exit_code == code, result.output
    assert ((f"--time={limit} " if code == 0 else "is not a time as SLURM writes it")
            in result.output)


def minutes(words: str = "") -> float:
    """What the evaluation of local-cpu is thought to take."""
    return estimate(preset_with("local-cpu", words), "eval", Path("/nowhere"), None).minutes


# local-cpu was published from a processor several times as fast as is assumed
@pytest.mark.parametrize("run, most", [("local-smoke", 2), ("local-cpu", 6)])
def test_an_evaluation_takes_about_what_was_measured(run, most):
    thought = estimate(get_pipeline_preset(run), "eval", Path("/nowhere"), None).minutes
    measured = published("eval", run)["eval_seconds"] / 60
    assert 0.5 < (thought - ASSUMED_START_MINUTES["cpu"]) / measured < most


@pytest.mark.parametrize("more", [
    "num_problems=1000", "samples_per_problem=64", "num_sentences=1000", "shots=0,8",
    "max_perplexity_tokens=300000 data.max_validation_tokens=300000", "protocol_tokens=90000",
    "num_pairs=1000", "baselines=gpt2"])
def test_what_an_evaluation_does_more_takes_longer(more):
    assert minutes(f"eval.{more}") > minutes()


@pytest.mark.parametrize("stage", ["dpo", "verifier"])
def test_a_control_takes_the_steps_of_its_stage_once_more(stage):
    config, without = (preset_with("local-smoke", f"{stage}.control={control}")
                       for control in ("true", "false"))
    both, alone = (estimate(one, stage, Path("/nowhere"), None) for one in (config, without))
    steps = tokens_per_step(config, stage) * both.steps / both.tokens_per_second / 60
    assert steps < both.minutes - alone.minutes < 2 * steps
    assert "once more for a control" in both.why and "control" not in alone.why


def test_a_gpu_that_nobody_knows_is_said_to_be_one():
    config = get_pipeline_preset("tacc-a100")
    named, unknown = (estimate(config, "sft", Path("/nowhere"), gpu) for gpu in ("A100", ""))
    assert unknown.minutes == named.minutes and "(unknown GPU, assumed A100)" in unknown.why
    assert "assumed: 30% of 312 TFLOP/s (A100)" in named.why
