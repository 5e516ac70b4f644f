"""A stage's kept checkpoints side by side: each number is the stage's own, each sample greedy, and
nothing else is written over.
"""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.cli.talk import samples
from modern_llm.config import DataConfig, DPOConfig, PipelineConfig, SFTConfig, to_dict
from modern_llm.data.chat import end_id
from modern_llm.data.packing import bits_per_byte
from modern_llm.data.tokens import load_tokenizer
from modern_llm.evaluation import checkpoint_table
from modern_llm.evaluation.checkpoint_table import (
    REQUESTS, HeldOut, compare_checkpoints, kept_checkpoints,
)
from modern_llm.files import atomic_folder
from modern_llm.messages import StageError
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model
from modern_llm.report.checkpoint_sheet import write_checkpoint_sheet
from modern_llm.tests.test_inference import SMALL, saved
from modern_llm.training.pretrain import nats_per_token, text_nats
from modern_llm.training.sft import example_nats

CONFIG = PipelineConfig(
    name="it", model=SMALL,
    data=DataConfig(tokenizer_vocab_size=512, max_validation_tokens=900),
    sft=SFTConfig(max_validation_examples=4), dpo=DPOConfig(max_validation_pairs=4))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run `it` of three stages, pretrain with two kept checkpoints besides the last, of random
    weights.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    first = {chat: saved(root / "start" / str(chat), SMALL, chat) for chat in (False, True)}
    for stage, steps in (("pretrain", (3, 6, 12)), ("sft", (4, 8)), ("dpo", (5,)), ("eval", ())):
        chat, tokenizer = stage != "pretrain", load_tokenizer(first[stage != "pretrain"])
        (root / "it" / stage).mkdir(parents=True)
        (root / "it" / stage / "params.json").write_text(json.dumps(
            {"config": {name: to_dict(CONFIG)[name] for name in ("data", "seed")}}))
        for step in steps:
            name = "checkpoint" if step == steps[-1] else f"checkpoints/step-{step:06d}"
            torch.manual_seed(step)
            with atomic_folder(root / "it" / stage / name,
                               {"step": step, "tokens": 10 * step}) as folder:
                save_model(folder, ModernDecoderLM(SMALL), eos_id=end_id(tokenizer) if chat else 0)
                shutil.copyfile(first[chat] / "tokenizer.json", folder / "tokenizer.json")
                shutil.copyfile(first[chat] / "tokenizer_config.json",
                                folder / "tokenizer_config.json")
    (root / "it" / "run.json").write_text(json.dumps({"stages": {}, "config": to_dict(CONFIG)}))
    return root


def sheet(runs: Path, stage: str, to: Path, **options) -> tuple[pd.DataFrame, Path, bool]:
    return write_checkpoint_sheet(runs / "it" / stage, to, **{"max_new_tokens": 4} | options)


def compared(runs: Path, stage: str, prompts=(), max_tokens: int | None = None):
    """What the stage is measured on, the table and the texts, of four new tokens each."""
    found = kept_checkpoints(runs / "it" / stage)
    held_out = HeldOut.of(runs / "it" / stage, found[-1][1])
    return held_out, *compare_checkpoints(found, held_out, prompts, 4, max_tokens)


def command(runs: Path, *words: str) -> tuple[str, str, int]:
    """What `modern-llm checkpoints` prints, what it says beside it, and its exit code."""
    done = CliRunner().invoke(main, ["checkpoints", "--output-dir", str(runs), "--device", "cpu",
                                     "--max-new-tokens", "3", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stdout, done.stderr, done.exit_code


def test_every_kept_checkpoint_is_there_once_by_step(runs, tmp_path):
    assert [step for step, _ in kept_checkpoints(runs / "it" / "pretrain")] == [3, 6, 12]
    # stopped right after it kept one, and killed while it wrote another
    stage = tmp_path / "pretrain"
    shutil.copytree(runs / "it" / "pretrain" / "checkpoints", stage / "checkpoints")
    (stage / "checkpoints" / "step-000006").rename(stage / "checkpoint.previous")
    shutil.copytree(stage / "checkpoint.previous", stage / "checkpoints" / "step-000006")
    (stage / "checkpoints" / "step-000009").mkdir()
    assert [(step, path.name) for step, path in kept_checkpoints(stage)] == [
        (3, "step-000003"), (6, "checkpoint.previous")]
    with pytest.raises(StageError, match="has no checkpoint: tried .*keep_checkpoints=3"):
        kept_checkpoints(tmp_path / "sft")


def test_the_numbers_are_those_the_stage_measures(runs):
    held_out, table, _ = compared(runs, "pretrain")
    cache = held_out.texts["synthetic"]
    assert table.step.tolist() == [3, 6, 12] and table.tokens.tolist() == [30, 60, 120]
    for row, (_, folder) in zip(table.itertuples(), kept_checkpoints(runs / "it" / "pretrain")):
        scores = text_nats(load_model(folder), held_out.texts, held_out.config, 8)
        nats = nats_per_token(scores)
        assert row.text_nats == pytest.approx(nats, abs=1e-4)
        assert row.text_low < row.text_nats < row.text_high
        assert row.bits_per_byte == pytest.approx(
            bits_per_byte(nats * cache.num_tokens, cache.num_bytes), abs=1e-4)
    assert table.text_nats.nunique() == 3 and "answers_nats" not in table
    assert 0 < held_out.floor() < math.log(512)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_tuned_stage_is_measured_on_answers_too(runs, stage):
    held_out, table, texts = compared(runs, stage, ["Hello?"], max_tokens=300)
    place = runs / "it" / stage / "checkpoint"
    model = load_model(place)
    nats = nats_per_token({"": example_nats(model, held_out.answers)})
    assert table.answers_nats.iloc[-1] == pytest.approx(nats, abs=1e-4)
    assert len(held_out.answers) == (8 if stage == "sft" else 4)  # two sources, and one
    assert held_out.prompts() == list(REQUESTS) and texts["request"] == ["Hello?"]
    assert texts[f"step {table.step.iloc[-1]}"] == list(samples(
        model, held_out.tokenizer, place, "Hello?", 1, max_new_tokens=4, temperature=0))


def test_samples_of_a_base_model_are_greedy(runs):
    held_out, _, texts = compared(runs, "pretrain", ["Mia has", ""], max_tokens=100)
    found = kept_checkpoints(runs / "it" / "pretrain")
    assert list(texts) == [f"step {step}" for step, _ in found]
    for (_, place), written in zip(found, texts.values()):
        greedy = [next(samples(load_model(place), held_out.tokenizer, place, prompt, 1,
                               max_new_tokens=4, temperature=0)) for prompt in ("Mia has", "")]
        assert written == [greedy[0].replace("Mia has", "Mia has ▸", 1), " ▸" + greedy[1]]


def test_a_base_model_goes_on_with_what_was_held_out(runs):
    held_out = HeldOut.of(runs / "it" / "pretrain", runs / "it" / "pretrain" / "checkpoint")
    cache = held_out.texts["synthetic"]
    openings = held_out.prompts()
    assert len(openings) == 3 and all(len(text.split()) == 6 for text in openings)
    assert all(held_out.tokenizer.decode(cache[i].tolist()).startswith(text)
               for i, text in enumerate(openings))


def test_only_what_changed_is_measured_again(runs, tmp_path, monkeypatch):
    to = tmp_path / "to"
    table, _, _ = sheet(runs, "pretrain", to, max_tokens=200)
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert before.keys() == {"checkpoints.csv", "checkpoints.md", "checkpoints.png", "meta.json"}
    assert before["checkpoints.png"].startswith(b"\x89PNG")
    text = before["checkpoints.md"].decode()
    assert "the first 200 tokens of each;" in text and "\n[step 12]\n" in text
    monkeypatch.setattr(checkpoint_table, "load_model", None)
    again, _, fresh = sheet(runs, "pretrain", to, max_tokens=200)
    assert not fresh and again.equals(table)
    with pytest.raises(ValueError, match="is of other checkpoints, text or prompts; --force"):
        sheet(runs, "pretrain", to, max_tokens=200, prompts=["x"])
    (to / "checkpoints.md").write_text("my notes")
    with pytest.raises(ValueError, match="was changed by hand: .*checkpoints.md"):
        sheet(runs, "pretrain", to, max_tokens=200)
    monkeypatch.undo()
    sheet(runs, "pretrain", to, max_tokens=200, force=True)
    assert before == {path.name: path.read_bytes() for path in to.iterdir()}


def test_a_folder_of_something_else_is_never_written_over(runs, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds something else: choose another place"):
            sheet(runs, "pretrain", place, force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["all of it"]


def test_what_fails_half_way_leaves_nothing(runs, tmp_path, monkeypatch):
    def broken(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_table, "continuations", broken)
    with pytest.raises(KeyboardInterrupt):
        sheet(runs, "pretrain", tmp_path / "to", max_tokens=100)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_table_and_writes_beside_the_stage(runs):
    for fresh in ("written", "unchanged"):
        printed, beside, code = command(runs, "it/pretrain", "--max-tokens", "200")
        rows = [line.split() for line in printed.splitlines()]
        assert code == 0 and [row[0] for row in rows[1:4]] == ["3", "6", "12"]
        assert rows[-1][0] == f"{fresh}:" and "kept no other" not in beside
        assert (runs / "it" / "pretrain-checkpoints" / "checkpoints.csv").is_file()
    assert "kept no other" in command(runs, str(runs / "it" / "dpo"), "--max-tokens", "100")[1]


@pytest.mark.parametrize("words, says", [
    (["it"], "'it' is a run: say which stage's checkpoints, it/pretrain or it/sft or it/dpo"),
    (["it/pretrian"], "did you mean 'it/pretrain'"), (["/nowhere"], "Tried /nowhere"),
    (["it/eval"], "the stages whose checkpoints write text are pretrain, sft, dpo"),
    (["it/sft", "--prompt", " "], "the prompt ' ' has no text"),
    (["it/pretrain", "--prompt", "word " * 300], "the context of this model 256: use a shorter"),
    (["it/pretrain", "--device", "cudaa"], "device='cudaa' is unknown"),
    (["it/pretrain", "--to", "/"], "/ holds something else")])
def test_what_cannot_be_compared_is_one_line(runs, tmp_path, words, says):
    to = [] if "--to" in words else ["--to", str(tmp_path / "to")]
    printed, beside, code = command(runs, *words, *to)
    lines = [line for line in beside.splitlines() if "checkpoint/s]" not in line]
    assert code == 2 and not printed and says in lines[-1] and len(lines) == 1
    assert not (tmp_path / "to").exists()


def test_a_damaged_checkpoint_is_named(runs, tmp_path):
    shutil.copytree(runs / "it" / "pretrain", tmp_path / "it" / "pretrain")
    shutil.copyfile(runs / "it" / "run.json", tmp_path / "it" / "run.json")
    broken = tmp_path / "it" / "pretrain" / "checkpoints" / "step-000006" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    _, beside, code = command(tmp_path, "it/pretrain", "--max-tokens", "100")
    assert code == 1 and str(broken) in beside
    assert not (tmp_path / "it" / "pretrain-checkpoints").exists()
