"""The pipeline as it is really run: skipped, resumed, refused, warned, killed; and what can be
asked of a run afterwards.

A stage that is started costs ten seconds whatever it trains: what is disturbed here is compared
with one undisturbed run, and one that is disturbed in three ways ends only once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from modern_llm.cli import main
from modern_llm.cli.run_commands import _key_values
from modern_llm.config import ALWAYS, NOTEBOOKS, STAGES, TRAINED, ConfigError
from modern_llm.files import read_json, write_json
from modern_llm.interchange import hub
from modern_llm.messages import StageError
from modern_llm.runs import execution, pipeline
from modern_llm.runs.execution import EXIT_PREEMPTED
from modern_llm.runs.locks import STAGE_LOCK, owner_of
from modern_llm.runs.outcomes import runs_table
from modern_llm.runs.stage import train_stage
from modern_llm.tests.test_stage import begin
from modern_llm.training.checkpoints import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.max_train_tokens=20000 data.max_validation_tokens=2000 pretrain.max_steps=120 "
    "pretrain.eval_every=120 pretrain.batch_size=4 pretrain.checkpoint_every=100 "
    "pretrain.log_every=1 pretrain.keep_checkpoints=1 sft.max_steps=24 sft.checkpoint_every=2 "
    "sft.eval_every=24 sft.batch_size=2 sft.max_train_examples=60 sft.max_validation_examples=4 "
    "dpo.max_steps=20 dpo.batch_size=2 dpo.checkpoint_every=2 dpo.eval_every=20 "
    "dpo.max_train_pairs=20 dpo.max_validation_pairs=4 verifier.max_steps=20 verifier.batch_size=4 "
    "verifier.checkpoint_every=2 verifier.eval_every=20 verifier.train_problems=6 "
    "verifier.validation_problems=4 verifier.samples_per_problem=2 verifier.validation_samples=16 "
    "verifier.gold_problems=100 verifier.max_new_tokens=8")
# "lesson" by another name: its chapters expect more of it
PRESET = Path(os.environ["MODERN_LLM_CACHE"]).parent / "small.json"
PRESET.write_text('{"base": "lesson", "name": "small"}')
slow = pytest.mark.skipif(not os.environ.get("MODERN_LLM_SLOW_TESTS"),
                          reason="half a minute, and the same of another stage: "
                                 "set MODERN_LLM_SLOW_TESTS=1")


def words(stage: str, place: Path, *more: object, overrides: str = SMALL) -> list[str]:
    return ["run", "--preset", str(PRESET), "--stage", stage, "--run", "it", "--output-dir",
            str(place), "-p", f"overrides={overrides}", *map(str, more)]


def started(*command: object) -> subprocess.Popen:
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True)


def start(*command: str) -> subprocess.Popen:
    return started(Path(sys.executable).parent / "modern-llm", *command)


def finish(*command: str) -> str:
    process = start(*command)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    return text


def ask(*command: object, **options) -> tuple[int, str]:
    """The exit code and the output of a command that is answered in this process."""
    result = CliRunner().invoke(main, [str(word) for word in command], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder of runs with one run, `it`, pretrained and instruction-tuned without a break. Of two
    commands that begin it at the same moment, one makes it; the other has refused at once.
    """
    place = tmp_path_factory.mktemp("tuned")
    pair = [start(*words("pretrain", place)) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 2], texts
    assert "run 'it' is in use: modern-llm run, pretrain, by process" in texts[codes.index(2)]
    assert not list((place / "it").glob(".*lock"))
    finish(*words("sft", place))
    return place


@pytest.fixture
def runs(tuned, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    return tmp_path


def weights(folder: Path) -> dict:
    return {path.name + name: tensor
            for path in sorted((folder / "checkpoint").glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def test_a_stage_records_what_it_depends_on(tuned):
    record = read_json(tuned / "it" / "sft" / "params.json")
    pretrained = tuned / "it" / "pretrain" / "checkpoint"
    assert (set(record["config"]) == {"data", "sft", "seed"}
            and record["config"]["sft"]["max_steps"] == 24)
    assert record["inputs"] == {"pretrain": {"path": str(
        pretrained), "sha256": read_json(pretrained / "meta.json")["sha256"]["model.safetensors"]}}
    entries = read_json(tuned / "it" / "run.json")["stages"]
    assert ({name: entry["status"] for name, entry in entries.items()}
            == {"pretrain": "finished", "sft": "finished"})


def test_a_page_measures_what_its_stage_changed(tuned):
    pretrained, results = (read_json(tuned / "it" / stage / "results.json")
                           for stage in ("pretrain", "sft"))
    table = {row["metric"]: row for row in results["table"]}
    assert {"instruction exact match, base", "instruction exact match, SFT", "ends by itself",
            "parses", "perplexity tax, synthetic", "held-out loss, synthetic",
            "held-out loss, synthetic-problems", "word-problem exact match, SFT"} <= table.keys()
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] > 0 and row["protocol"]
               for row in results["table"])
    counts = {row["source"]: row for row in results["examples"]}
    assert counts["synthetic"]["read"] == counts["synthetic"]["kept"] == 60
    loss, = (row["value"] for row in pretrained["table"]
             if row["metric"] == "nats per token, synthetic")
    assert 0 < pretrained["floor"] < loss


def plan(place, stage="all", overrides=SMALL, **more):
    plan = pipeline.Plan(stage, preset=str(PRESET), run="it",
                         output_dir=str(place), overrides=overrides, **more)
    return lambda name, pending=False: plan.step(name, pending)


def test_settings_of_the_preset_are_parameters_too():
    several = _key_values(("seed=3", "overrides=sft.lr=1e-3", "sft.weights=0.6,0.4",
                           "data.tokenizer=my file"))
    assert several == {"seed": 3,
                       "overrides": "sft.lr=1e-3 sft.weights=0.6,0.4 'data.tokenizer=my file'"}
    code, text = ask("run", "--dry-run", "-p", "sft.lrr=1")
    assert code == 2 and "sft.lrr" in text and "did you mean 'lr'" in text


def test_unchanged_stages_are_skipped_and_others_follow(tuned):
    code, text = ask(*words("all", tuned, "--dry-run"))
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert code == 0 and list(lines) == [*ALWAYS, "report"]
    assert (lines["pretrain"].startswith("skip") and lines["sft"].startswith("skip")
            and lines["dpo"].startswith("run"))
    code, text = ask(*words("sft", tuned))
    assert code == 0 and "sft: skipped, finished before, nothing has changed" in text


def test_a_changed_setting_touches_its_own_stage_only(tuned):
    other = plan(tuned, overrides=SMALL + " sft.lr=1e-3")
    assert other("pretrain").action == "skip"
    with pytest.raises(
        StageError, match=r"sft is finished.*\n  - sft.lr: 0.00\d+ -> 0.001\n.*--force.*--run NAME"
    ):
        other("sft")
    forced = plan(tuned, overrides=SMALL + " sft.lr=1e-3", force=True)
    assert ([forced(name).action for name in ("pretrain", "sft")] == ["skip", "run"]
            and "sft.lr" in forced("sft").why)
    assert plan(tuned, "pretrain", force=True)("pretrain").action == "run"
    assert plan(tuned, overrides=SMALL + " sft.lr=1e-3", no_overwrite=True)("sft").action == "skip"
    assert plan(tuned, overrides=SMALL + " sft.max_steps=61", resume=True)("sft").action == "resume"


def test_a_stage_whose_start_was_made_anew_is_refused(runs):
    meta = runs / "it" / "pretrain" / "checkpoint" / "meta.json"
    sums = read_json(meta)
    sums["sha256"]["model.safetensors"] = "0" * 64
    write_json(meta, sums)
    with pytest.raises(StageError, match="weights of pretrain: .* -> \"000000000000\""):
        plan(runs)("sft")
    assert plan(runs, force=True)("sft").action == "run"
    code, text = ask(*words("all", runs))
    assert code == 2 and "--force" in text and (runs / "it" / "sft" / "results.json").exists()


def test_data_that_changed_is_named_before_a_stage_starts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Tom has 3 hats.\n" * 50)
    begin(tmp_path, run="it", overrides=f"data.sources={path}").finish({"table": []})
    ask_plan = lambda **more: pipeline.Plan("pretrain", preset="lesson", run="it", output_dir=str(
        tmp_path), overrides=f"data.sources={path}", **more).step("pretrain")
    assert ask_plan().action == "skip"
    path.write_text("Tom has 4 hats.\n" * 50)
    with pytest.raises(StageError,
                       match=f"since then this has changed:\n  - data file {path}: sha256 .* -> "):
        ask_plan()
    assert ask_plan(no_overwrite=True).action == "skip" and ask_plan(force=True).action == "run"


def test_parameters_go_to_the_stages_that_declare_them(tuned):
    everything = pipeline.Plan("all", preset="lesson", max_minutes=6, max_steps=9)
    assert all(everything.parameters[name]["max_minutes"] == 6
               for name in ("pretrain", "sft", "dpo", "verifier"))
    assert ("max_minutes" not in everything.parameters["eval"]
            and "max_steps" not in everything.parameters["attention"])
    assert everything.configs["dpo"].dpo.max_steps == 9
    for stage, name in (("all", "max_step"), ("eval", "max_minutes")):
        with pytest.raises(ConfigError, match=f"unknown parameter '{name}'"):
            pipeline.Plan(stage, preset="lesson", **{name: 3})
    given = pipeline.Plan("all", preset="lesson", checkpoint=str(tuned / "it"),
                          output_dir=str(tuned), run="from")
    assert (given.stages[0] == "sft"
            and given.parameters["sft"]["checkpoint"].endswith("it/sft/checkpoint"))
    assert "checkpoint" not in given.parameters["dpo"]
    with pytest.raises(ConfigError, match="does not start from a checkpoint"):
        pipeline.Plan("pretrain", preset="lesson", checkpoint=str(tuned / "it"))


def test_checkpoints_are_found_by_folder_stage_and_run(tuned, tmp_path):
    stage = tuned / "it" / "pretrain"
    assert (hub.find_checkpoint(stage / "checkpoint")
            == hub.find_checkpoint(stage) == stage / "checkpoint")
    assert hub.find_checkpoint(tuned / "it") == tuned / "it" / "sft" / "checkpoint"
    with pytest.raises(StageError,
                       match="Tried .*/nothing, .*/nothing/checkpoint, .*/nothing/dpo/checkpoint"):
        hub.find_checkpoint(tmp_path / "nothing")
    shutil.copytree(stage, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint.previous", ignore_errors=True)
    os.rename(tmp_path / "killed" / "checkpoint", tmp_path / "killed" / "checkpoint.previous")
    assert hub.find_checkpoint(tmp_path / "killed").name == "checkpoint.previous"


def test_nothing_to_start_from_names_the_remedies(tmp_path):
    code, text = ask("run", "--preset", "local-smoke", "--stage", "dpo", "--output-dir", tmp_path)
    assert (code == 2 and "--stage sft" in text and "--checkpoint PATH" in text
            and list(tmp_path.iterdir()) == [])


def test_missing_data_of_later_stages_stops_the_pipeline_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "none"))
    code, text = ask(*words("all", tmp_path, overrides="dpo.sources=hh-rlhf"))
    assert code == 2 and "hh-rlhf" in text and list(tmp_path.iterdir()) == []


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize(
    "row, said",
    [({"instruction": "Add.", "output": "3"}, "alpaca: too small to hold anything out"),
     ({"instruction": "Add.", "output": 3}, "train.jsonl: line 1: output is an integer")])
def test_unusable_data_of_later_stages_stop_the_pipeline_at_its_start(row, said, tmp_path,
                                                                      monkeypatch):
    (tmp_path / "mirror" / "alpaca").mkdir(parents=True)
    (tmp_path / "mirror" / "alpaca" / "train.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "mirror"))
    code, text = ask(*words("all", tmp_path / "runs", overrides="sft.sources=alpaca sft.weights=1"))
    assert code == 2 and said in text and not (tmp_path / "runs").exists()


# ---- warned and killed ---------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert condition(), process.communicate()[0] if process.poll() is not None else "not in time"


def steps(folder: Path) -> int:
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def status_of(place: Path, stage: str = "pretrain") -> str:
    return read_json(place / "it" / "run.json")["stages"][stage]["status"]


def kill(process: subprocess.Popen, place: Path, stage: str) -> None:
    """kill -9 of `modern-llm` alone: papermill and its kernel die with it."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "papermill and a kernel are expected"
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and not (place / "it" / stage / "results.json").exists()
    assert [row["status"] for row in runs_table(place) if row["stage"] == stage] == ["killed"]


def end_alike(stage: str, place: Path, undisturbed: Path) -> None:
    """The same command ends a disturbed stage as an undisturbed one ended, bit for bit."""
    assert f"{stage}: resume" in finish(*words(stage, place))
    one, other = (weights(where / "it" / stage) for where in (undisturbed, place))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    tables = [read_json(where / "it" / stage / "results.json")["table"]
              for where in (undisturbed, place)]
    assert tables[0] == tables[1] and status_of(place, stage) == "finished"


@pytest.mark.thorough
def test_warned_twice_and_killed_a_stage_ends_as_if_undisturbed(tuned, tmp_path):
    """A scheduler's warnings reach the stage in its kernel, which ends with what it has; a killed
    command leaves no orphan; each next start goes on.
    """
    folder = tmp_path / "it" / "pretrain"
    process = start(*words("pretrain", tmp_path))
    wait_for(lambda: steps(folder) >= 5, process)
    assert owner_of(tmp_path / "it")["what"] == "stage pretrain"
    os.killpg(process.pid, signal.SIGUSR1)  # the group of the command, as SLURM's --signal does
    text, _ = process.communicate(timeout=100)
    assert process.returncode == EXIT_PREEMPTED and "goes on with the same command" in text, text
    first = read_json(folder / "checkpoint" / "meta.json")["step"]
    assert status_of(tmp_path) == "preempted" and 5 <= first < 100
    assert not (folder / "results.json").exists() and not list((tmp_path / "it").glob(".*lock"))

    # the same stage without the command, as a batch script starts it, and not told to resume
    process = started(
        "bash", "-c", f"trap '' TERM USR1; exec {sys.executable} -m papermill "
        f"nbs/03_pretrain.ipynb {tmp_path / 'out.ipynb'} --no-progress-bar -p preset {PRESET} "
        f"-p run it -p output_dir {tmp_path} -p overrides '{SMALL}'")
    wait_for(lambda: steps(folder) >= first + 5, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # the whole step, kernel included, as `scancel` does
        member.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "was preempted and checkpointed" in text, text
    second = read_json(folder / "checkpoint" / "meta.json")["step"]
    assert status_of(tmp_path) == "preempted" and first < second < 100

    process = start(*words("pretrain", tmp_path))
    wait_for(lambda: steps(folder) >= second + 5, process)
    kill(process, tmp_path, "pretrain")

    end_alike("pretrain", tmp_path, tuned)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 121))


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["sft", *(pytest.param(stage, marks=slow)
                                           for stage in ("dpo", "verifier"))])
def test_a_killed_stage_ends_as_if_undisturbed(stage, tuned, tmp_path):
    finish(*words(stage, tuned))
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "it" / stage)
    process = start(*words(stage, tmp_path))
    wait_for((tmp_path / "it" / stage / "checkpoint" / "meta.json").exists, process)
    kill(process, tmp_path, stage)
    end_alike(stage, tmp_path, tuned)


def test_a_stage_that_does_not_train_ends_at_once_and_goes_on(runs):
    lock = runs / "it" / STAGE_LOCK
    process = start(*words("attention", runs))
    wait_for(lock.exists, process)
    wait_for(lambda: "attention" in read_json(runs / "it" / "run.json")["stages"], process)
    process.send_signal(signal.SIGTERM)
    began = time.time()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED and time.time() - began < 30, text
    assert status_of(runs, "attention") == "preempted" and not lock.exists()
    code, planned = ask(*words("attention", runs, "--dry-run"))
    assert code == 0 and "attention: resume" in planned, planned


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


SINKS = ("model.use_attention_sinks=true pretrain.max_steps=24 pretrain.eval_every=24 "
         "pretrain.checkpoint_every=2")  # guide 70's command for two ranks, with the other strategy
# in the verifier's head every rank draws its own dropout
SHARED = [("pretrain", "fsdp", SINKS), ("pretrain", "ddp", SINKS), ("sft", "ddp", ""),
          ("dpo", "ddp", ""), ("verifier", "ddp", "verifier.head_dropout=0")]


@pytest.mark.thorough
@pytest.mark.parametrize("stage, strategy, settings", [
    ("sft", "fsdp", ""), *(pytest.param(*case, marks=slow) for case in SHARED)])
def test_ranks_train_a_stage_like_one_process(stage, strategy, settings, tuned, tmp_path):
    """`-p hardware.ranks=2`; the second rank is killed on the way, which ends the first; the same
    command goes on and ends as one process, here this one.
    """
    overrides = f"{SMALL} {settings}"
    for place in ("alone", "both") if stage != "pretrain" else ():
        shutil.copytree(tuned, tmp_path / place)
        shutil.rmtree(tmp_path / place / "it" / stage, ignore_errors=True)
    train_stage(begin(tmp_path / "alone", stage=stage, preset=str(PRESET), run="it", seed=None,
                      overrides=overrides))
    folder = tmp_path / "both" / "it" / stage
    together = words(stage, tmp_path / "both", "-p", "hardware.ranks=2", "-p",
                     f"hardware.strategy={strategy}", overrides=overrides)
    process = start(*together)
    wait_for((folder / "checkpoint" / "meta.json").exists, process)
    family = psutil.Process(process.pid).children(recursive=True)
    second, = (p for p in family if p.environ().get("RANK") == "1")
    second.kill()
    text, _ = process.communicate(timeout=100)
    assert (process.returncode == 137 and "rank 1 ended first, with exit code -9" in text
            and "another rank is gone" in text), text
    assert not psutil.wait_procs(family, timeout=10)[1] and not (folder / "results.json").exists()

    text = finish(*together)
    assert f"{stage}: resume" in text and text.count(f"{stage}: finished") == 1
    alone, both = curve(tmp_path / "alone" / "it" / stage), curve(folder)
    assert (len(alone) == len(both) and both[:2] == pytest.approx(alone[:2], rel=1e-6)
            and both == pytest.approx(alone, rel=1e-4))
    assert ("shared by 2 ranks" in (folder / "notebook.ipynb").read_text()
            and not list(folder.glob("*rank*")))


# ---- afterwards ----------------------------------------------------------------------------------


def test_status_needs_no_torch_and_shows_the_figures(tuned):
    code, text = ask("status", "--output-dir", tuned)
    assert (code == 0
            and all(part in text for part in ("pretrain", "sft", "finished", "bits per byte")))
    code, text = ask("status", "ot", "--output-dir", tuned)
    assert code == 2 and "did you mean 'it'" in text
    check = ("import sys; from modern_llm.cli import main; main(['status'], "
             "standalone_mode=False); assert 'torch' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def test_chat_and_sample(tuned):
    where = ("--run", "it", "--output-dir", tuned, "--max-new-tokens", 8)
    code, text = ask("chat", *where,
                     input="What is 3 plus 4?\n\n/new\nAnd 5 plus 2?\n/quit\nnever read\n")
    assert code == 0 and len(text.splitlines()) >= 3
    assert ask("chat", *where, input="What is 3 plus 4?\n\n/new\nAnd 5 plus 2?\n")[1] == text, (
        "the seed decides")
    code, text = ask("chat", *where, "--stage", "pretrain", input="hello\n")
    assert code == 2 and "base model" in text
    code, text = ask("sample", *where, "--stage", "pretrain", "--prompt", "Mia has {}", "-n", 2)
    assert code == 0 and text.count("--- Mia has {}") == 2
    assert ask("sample", "--checkpoint", tuned / "it" / "sft", "-n", 1, "--max-new-tokens",
               4)[0] == 0
    for command, message in ((("sample", "--output-dir", tuned), "runs in .*: it"),
                             (("sample", *where, "--stage", "eval"), "no language model"),
                             (("chat", "--run", "nobody", "--output-dir", tuned), "Tried")):
        code, text = ask(*command)
        assert code == 2 and message.split(".*")[-1] in text


def test_a_long_conversation_forgets_its_beginning(tuned):
    from modern_llm.cli.talk import Chat, open_model

    model, tokenizer, _ = open_model("it", "sft", None, str(tuned))
    talk = Chat(model, tokenizer, max_new_tokens=8, temperature=0)
    for _ in range(12):
        assert isinstance(
            "".join(talk.reply("Tom has 3 hats. He buys 4 hats. How many hats does he have?")), str)
    assert 2 <= len(talk.history) < 24 and talk.history[0]["role"] == "user"
    with pytest.raises(ValueError, match="ask something shorter"):
        list(talk.reply("word " * 200))


@torch.no_grad()
def test_a_run_is_opened_by_transformers_as_it_stands_and_exported(tuned, tmp_path):
    transformers = pytest.importorskip(
        "transformers",
        reason="it has to open what the stages wrote: pip install 'modern_llm[baselines]'")
    from modern_llm.cli.talk import open_model
    from modern_llm.data.chat import encode_prompt, end_id
    from modern_llm.models.generation import generate

    code, text = ask("export", "--run", "it", "--output-dir", tuned, "--stage", "sft", "--to",
                     tmp_path / "it-sft", "--shard-gb", 4e-4)
    assert code == 0 and len(list((tmp_path / "it-sft").glob("model-*.safetensors"))) > 1, text
    card = (tmp_path / "it-sft" / "README.md").read_text()
    assert all(part in card for part in ("ends by itself", "| synthetic-problems | sft |",
                                         "--stage pretrain", "torch 2.", "one seed"))
    for stage, folder in (("pretrain", None), ("sft", None), ("sft", tmp_path / "it-sft")):
        model, tokenizer, checkpoint = open_model("it", stage, None, str(tuned))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder or checkpoint).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder or checkpoint)
        prompt = encode_prompt(tokenizer, "Tom has 3 hats and buys 4 hats. How many hats?")
        if stage == "sft":
            messages = [{"role": "user",
                         "content": "Tom has 3 hats and buys 4 hats. How many hats?"}]
            assert list(their_tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False)) == prompt
        ids = torch.tensor([prompt])
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5
        eos = theirs.generation_config.eos_token_id
        assert eos == (end_id(tokenizer) if stage == "sft"
                       else tokenizer.token_to_id("<|endoftext|>"))
        ours = generate(model, [prompt], max_new_tokens=24, temperature=0, eos_id=eos)[0]
        answer = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
        assert ours == answer[:answer.index(eos) if eos in answer else None] and len(ours) > 0
        assert tokenizer.decode(ours) == their_tokenizer.decode(ours, skip_special_tokens=True)


def test_help_teaches_by_example():
    for command in ((), ("run",), ("status",), ("chat",), ("sample",),
                    ("export",), ("check-inference",), ("bench",), ("datasets",)):
        code, text = ask(*command, "--help")
        assert code == 0 and "modern-llm" in text.split("Options:")[0].split("\n", 1)[1]
    check = ("import sys, modern_llm.cli; assert not {'torch', 'pandas', 'papermill', 'numpy'} & "
             "set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_stage_has_a_notebook_with_the_same_ten_parameters():
    common = {"preset", "run", "seed", "device", "overrides", "output_dir", "resume", "force"}
    for stage in NOTEBOOKS:
        declared = pipeline.declared_parameters(stage)
        assert (common <= declared.keys() and declared["preset"] == "lesson"
                and declared["run"] == "")
        assert ("checkpoint" in declared) == (stage != "pretrain")
        assert ({"max_steps", "max_minutes"} <= declared.keys()) == (stage in TRAINED)


def test_the_screen_shows_text_and_bars_but_not_papermill(capfd):
    lines = ["[IPKernelApp] WARNING | noise", "a table", "  with rows", "\r  0%|    | 0/2", "",
             "\r100%|####| 2/2", "", "after", "Traceback (most recent call last):",
             '  File "nbclient"', "papermill.exceptions.PapermillExecutionError: ",
             "the notebook's error"]
    execution.show([(line + "\n").encode() for line in lines])
    out, err = capfd.readouterr()
    assert out == "a table\n  with rows\nafter\nthe notebook's error\n"
    assert "100%" in err and "Traceback" not in out + err
