"""Settings on the command line: read as the setting wants them, refused by their name, whatever is
typed.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st

from modern_llm.cli import main
from modern_llm.cli.run_commands import _key_values
from modern_llm.config import (
    ConfigError, PipelineConfig, get_pipeline_preset, override, parse_overrides, to_dict,
)
from modern_llm.messages import StageError
from modern_llm.runs.parameters import choose_folder, resolve
from modern_llm.runs.spec import setting

NUMBERLIKE = ["a,b", "2024", "true", "null", "1e3", "[1]", "a b", "é ▸", "it's", 'a"b', "x=y",
              "-", "{a}"]


def asked(*words):
    """The config that `-p` words make of a preset, as the command reads them."""
    values = _key_values(words)
    return override(get_pipeline_preset("local-smoke"),
                    parse_overrides(values.get("overrides", "")), "overrides")


@pytest.mark.fault("messages")
class TestTyped:
    @pytest.mark.parametrize("text", NUMBERLIKE)
    @pytest.mark.parametrize("name", ["start_from", "name", "description"])
    def test_text_stays_text(self, name, text):
        assert getattr(asked(f"{name}={text}"), name) == text

    @pytest.mark.parametrize(
        "path, raw, value",
        [("data.sources", "synthetic", ("synthetic",)),
         ("data.sources", "1,2", ("1", "2")), ("data.sources", "null", ("null",)),
         ("data.sources", '["a, b.txt","c"]', ("a, b.txt", "c")),
         ("data.sources", '"a,b","c"', ("a,b", "c")), ("data.sources", '"a,b"', ("a,b",)),
         ("eval.baselines", "", ()), ("eval.baselines", "2024", ("2024",)),
         ("eval.protocol_sources", "true,1", ("true", "1")), ("sft.weights", "0.6,0.4", (0.6, 0.4)),
         ("sft.weights", "[0.6, 0.4]", (0.6, 0.4)), ("pretrain.betas", "0.8,0.9", (0.8, 0.9)),
         ("eval.shots", "0", (0,)), ("verifier.levels", "1,2", (1, 2)),
         ("model.sliding_window", "null", None), ("pretrain.max_minutes", "2", 2.0)])
    def test_a_list_is_one_of_what_the_setting_holds(self, path, raw, value):
        section, name = path.split(".")
        assert getattr(getattr(asked(f"{path}={raw}"), section), name) == value

    @pytest.mark.parametrize(
        "word, path, value",
        [("model.use_qk_norm=False", "model.use_qk_norm", False),
         ("model.sliding_window=None", "model.sliding_window", None),
         ("pretrain.lr=.5", "pretrain.lr", 0.5), ("pretrain.lr=5.", "pretrain.lr", 5.0),
         ("pretrain.lr=+1.e-3", "pretrain.lr", 0.001),
         ("pretrain.max_steps=+5", "pretrain.max_steps", 5),
         ("pretrain.max_steps=007", "pretrain.max_steps", 7),
         (" model.width = 64", "model.width", 64), ("name=True", "name", "True")])
    def test_values_are_written_as_in_json_or_as_in_a_notebook(self, word, path, value):
        found = setting(asked(word), path)
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        "word", ["resume=True", "force=False", "seed=None", "max_minutes=.5", " seed =1"])
    def test_parameters_are_written_as_in_a_notebook(self, word):
        result = CliRunner().invoke(main, ["run", "--preset", "lesson", "--stage", "pretrain", "-p",
                                           word, "--run", "none-yet", "--dry-run"])
        assert result.exit_code == 0, result.output

    def test_a_file_with_a_comma_in_its_name_is_one_source(self, tmp_path, monkeypatch):
        (tmp_path / "my, own.txt").write_text("text")
        monkeypatch.chdir(tmp_path)
        assert asked("data.sources=my, own.txt").data.sources == ("my, own.txt",)

    @pytest.mark.parametrize("word", ["run=2024.10", "run=1e3", "run=true", "run=0", "run=null"])
    def test_a_run_is_called_what_was_typed(self, word):
        result = CliRunner().invoke(main, ["run", "--preset", "lesson", "--stage", "pretrain", "-p",
                                           word, "--dry-run"])
        assert result.exit_code == 0 and f"/{word[4:]}/pretrain" in result.output

    @pytest.mark.parametrize("words, said, unsaid", [
        (["--stage", "report", "-p", "eval.baselines=gpt2"],
         "stage report has no settings: eval.baselines=gpt2", "'overrides'"),
        (["--stage", "report", "-p", "start_from=a,b"],
         "stage report has no settings: start_from=a,b", "'overrides'"),
        (["--stage", "eval", "-p", "start_from=a,b"], "'a,b'", "unknown parameter"),
        (["-p", "model=3"], "model=3 must be a JSON object of ModelConfig", "unknown parameter"),
        (["-p", "overrides=3"], "'3' must look like", "Traceback"),
        (["-p", "model.width=1" + "0" * 400], "must lie in -2**63..2**63", "Traceback"),
        (["-p", "pretrain.lr=1" + "0" * 400], "must be a finite number", "Traceback"),
        (["-p", "pretrain.weight_decay=NaN"], "must be a finite number", "Traceback"),
        (["--preset", "x" * 300], "unknown preset", "Traceback"),
    ])
    def test_what_is_refused_is_called_by_what_was_typed(self, words, said, unsaid):
        result = CliRunner().invoke(main, ["run", *words])
        assert result.exit_code == 2 and said in result.output and unsaid not in result.output, (
            result.output)

    @pytest.mark.parametrize("name",
                             ["x" * 300, "x" * 101, "a.", "a..", ".", "..", ".a", "-a", "_a", "nul",
                              "CON.txt", "com1", "é", "a b", "a/b", "a\n", "a\0b"])
    @pytest.mark.parametrize("command", ["run", "submit"])
    def test_an_impossible_run_name_is_refused_and_nothing_is_made(self, tmp_path, name, command,
                                                                   monkeypatch):
        monkeypatch.setenv("MODERN_LLM_RUNS", str(tmp_path))
        result = CliRunner().invoke(main, [command, "--preset", "lesson", "--run", name])
        assert (result.exit_code == 2 and "run=" in result.output
                and not isinstance(result.exception, OSError) and list(tmp_path.iterdir()) == [])

    @pytest.mark.parametrize("words, option", [
        (["run", "--run", ""], "--run"), (["run", "--checkpoint", ""], "--checkpoint"),
        (["run", "--output-dir", " "], "--output-dir"), (["run", "-p", "run="], "-p run"),
        (["submit", "--run", ""], "--run"), (["submit", "-p", "output_dir="], "-p output_dir"),
        (["submit", "-p", "checkpoint="], "-p checkpoint")])
    def test_a_variable_that_is_not_set_is_no_default(self, words, option):
        """With --force, `--run "$NAME"` would delete what another run has."""
        result = CliRunner().invoke(main, [*words, "--preset", "lesson", "--dry-run"])
        assert result.exit_code == 2 and f"{option} is empty" in result.output, result.output

    @pytest.mark.parametrize("name", ["a", "0", "x" * 100, "a..b", "2024.10", "a_", "nuls"])
    def test_a_possible_one_is_not(self, tmp_path, name):
        assert choose_folder("pretrain", {"preset": "lesson", "run": name,
                                          "output_dir": str(tmp_path)})[0] == name

    @pytest.mark.parametrize(
        "place, message", [("file", "is a file, where the folder of the runs"),
                           ("x" * 300, "cannot hold a run: File name too long"),
                           ("/".join(["d" * 200] * 20), "cannot hold a run|makes a path of over"),
                           ("~no-such-user/x", "cannot hold a run"), ("a\0b", "cannot hold a run")])
    def test_an_impossible_place_is_refused(self, tmp_path, place, message):
        (tmp_path / "file").write_text("")
        with pytest.raises((ConfigError, StageError), match=message):
            choose_folder("pretrain",
                          {"preset": "lesson", "run": "it",
                           "output_dir": place if place[0] == "~" else str(tmp_path / place)})

    def test_a_run_that_is_a_file_is_refused(self, tmp_path):
        (tmp_path / "it").write_text("")
        with pytest.raises(StageError,
                           match="it: it is a file, where the folder of the run should be"):
            choose_folder("pretrain",
                          {"preset": "lesson", "run": "it", "output_dir": str(tmp_path)})

    @pytest.mark.parametrize(
        "command", [["chat"], ["sample"], ["export", "--to", "x"], ["check-inference"], ["status"]])
    def test_other_commands_find_no_such_run(self, command):
        result = CliRunner().invoke(
            main, [command[0], *(["x" * 300] if command == ["status"] else ["--run", "x" * 300]),
                   *command[1:]])
        assert result.exit_code == 2 and not isinstance(result.exception, OSError)

    def test_numbers_of_any_size_are_answered_at_once(self):
        with pytest.raises(ConfigError, match="does not divide"):
            asked("model.width=1000000000001", "model.num_heads=3")


# ---- properties ----------------------------------------------------------------------------------

PATHS = [f"{section.name}.{field.name}" for section in fields(PipelineConfig)
         if is_dataclass(default := getattr(PipelineConfig(), section.name))
         for field in fields(default)] + ["name", "description", "start_from", "seed"]
WORDS = st.one_of(
    st.text(), st.builds("{}={}".format, st.sampled_from(PATHS), st.one_of(
        st.text(), st.integers().map(str), st.floats().map(str),
        st.lists(st.integers(), max_size=3).map(json.dumps),
        st.lists(st.text(max_size=5), max_size=3).map(json.dumps),
        st.lists(st.floats(), max_size=3).map(lambda found: ",".join(map(str, found))),
        st.sampled_from(["", "null", "true", "{}", "[", "1e999", "-0", "9" * 400]))))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(), st.lists(WORDS, max_size=3).map(shlex.join),
                      st.lists(WORDS, max_size=3).map(" ".join)))
def test_any_text_makes_a_config_or_a_config_error(text):
    try:
        config = override(get_pipeline_preset("local-smoke"), parse_overrides(text), "overrides")
    except ConfigError as error:
        assert str(error)
    else:
        assert json.loads(json.dumps(to_dict(config), allow_nan=False)) == to_dict(config)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lr=st.floats(1e-9, 1e3), steps=st.integers(1, 10**9),
       sources=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True), shots=st.lists(
           st.integers(0, 99), min_size=1, max_size=4), text=st.text(), compiled=st.booleans())
def test_what_is_written_as_words_is_read_back(lr, steps, sources, shots, text, compiled):
    words = [f"pretrain.lr={json.dumps(lr)}", f"pretrain.max_steps={steps}",
             f"data.sources={json.dumps(sources)}", f"description={json.dumps(text)}",
             f"eval.shots={','.join(map(str, shots))}", f"pretrain.compile={json.dumps(compiled)}"]
    config = asked(*words)
    assert ((config.pretrain.lr, config.pretrain.max_steps, config.pretrain.compile)
            == (lr, steps, compiled))
    assert ((config.data.sources, config.eval.shots, config.description)
            == (tuple(sources), tuple(shots), text))
    assert override(PipelineConfig(), to_dict(config)) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.fixed_dictionaries(
    {"preset": st.just("lesson")},
    optional={name: st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
              for name in ("seed", "max_steps", "max_minutes", "device", "overrides", "run",
                           "resume", "force")}))
def test_any_parameters_make_a_config_or_a_config_error(values):
    try:
        resolve("pretrain", values)
    except ConfigError as error:
        assert str(error)


# ---- what was promised ---------------------------------------------------------------------------


@pytest.mark.fault("promises")
@pytest.mark.parametrize("line, torch", [
    ("from modern_llm.config import get_pipeline_preset; assert "
     "get_pipeline_preset('local-smoke').name == 'local-smoke'", False),
    ("import modern_llm.config as c; assert c.get_pipeline_preset is "
     "__import__('modern_llm.config.choosing').config.choosing.get_pipeline_preset", False),
    ("from modern_llm.config import *; from modern_llm.config import PipelineConfig; assert not "
     "hasattr(__import__('modern_llm.config').config, 'nothing')", False),
    ("from modern_llm.config import *; from modern_llm.config import get_pipeline_preset", False),
    ("from modern_llm.models import ModernDecoderLM", True),
], ids=["config", "same", "star", "circle", "models"])
def test_the_names_of_the_front_page_can_be_imported(line, torch):
    code = f"import sys; {line}; assert ('torch' in sys.modules) == {torch}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault("promises")
@pytest.mark.parametrize("path", ["nbs/_quarto.yml", "nbs/nbdev.yml", "nbs/sidebar.yml",
                                  "nbs/sidebar.yml.bak", "_proc/x", "_docs/index.html"])
def test_what_nbdev_docs_writes_is_ignored(path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(["git", "-C", str(root), "check-ignore", "-q", "--no-index", path])
    assert done.returncode in (0, 128), path  # 128: no checkout


@pytest.mark.fault("messages")
@pytest.mark.parametrize(
    "text", ["model.num_layers=2 model={\"width\":64}", "model={\"width\":64} model.num_layers=2"])
def test_a_section_and_one_of_its_settings_are_both_kept(text):
    config = override(get_pipeline_preset("lesson"),
                      parse_overrides(f"'{text.split()[0]}' '{text.split()[1]}'"))
    assert (config.model.num_layers, config.model.width) == (2, 64)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("text", ["'model={\"width\":64}' model=2",
                                  "model=2 'model={\"width\":64}'", "model.width=64 model=2"])
def test_a_section_that_is_also_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="both as a value and as a section"):
        parse_overrides(text)
