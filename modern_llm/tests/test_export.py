"""What we write is what transformers reads: a checkpoint as it stands, an export in one file or
many, and its model card.
"""

import errno
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from modern_llm.cli import main
from modern_llm.config import ModelConfig, get_pipeline_preset
from modern_llm.data import synth
from modern_llm.data.chat import CHAT_TEMPLATE, encode_chat, end_id, is_chat_model
from modern_llm.data.tokens import end_of_text_id, load_tokenizer, save_tokenizer, train_tokenizer
from modern_llm.files import DamagedFolder, atomic_folder, check_folder, read_json, write_json
from modern_llm.interchange import hub
from modern_llm.interchange.export import ExportError, shards
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.saving import save_model
from modern_llm.report import card
from modern_llm.report.card import export_with_card
from modern_llm.runs.spec import sections
from modern_llm.tests.test_report import make_run

transformers = pytest.importorskip(
    "transformers", reason="it has to open what we write: pip install 'modern_llm[hub]'")
CFG = ModelConfig(vocab_size=320, context_length=96, width=32, num_layers=2, num_heads=4,
                  num_kv_heads=2, ffn_width=64, use_qk_norm=False)
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
LAYOUTS = {"LlamaForCausalLM": {}, "MistralForCausalLM": {"sliding_window": 7},
           "Qwen3ForCausalLM": {"use_qk_norm": True, "tie_embeddings": False},
           "MixtralForCausalLM": EXPERTS,
           "LlamaForCausalLM, wide heads": {"head_dim": 14},
           "Qwen3ForCausalLM, window": {"use_qk_norm": True, "sliding_window": 7},
           "MixtralForCausalLM, window": {**EXPERTS, "sliding_window": 7}}
SINKS = {"use_attention_sinks": True}
WITH_SINKS = {"GraniteSWAForCausalLM": SINKS,
              "GraniteSWAForCausalLM, window": {**SINKS, "sliding_window": 7, "head_dim": 14},
              "GraniteSWAForCausalLM, longer": {**SINKS, "rope_factor": 4.0, "rope_scaling": "yarn",
                                                "rope_trained_context": 24},
              "FlintForCausalLM": {**SINKS, "use_qk_norm": True, "tie_embeddings": False},
              "GraniteMoeSWAForCausalLM": {**SINKS, **EXPERTS},
              "GraniteMoeSWAForCausalLM, many": {**SINKS, "num_experts": 11, "sliding_window": 7},
              "GraniteMoeSWAForCausalLM, one": {**SINKS, "num_experts": 1, "experts_per_token": 1}}
TALK = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where does Anna live? <|end|>"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((item.text for item, _ in zip(synth.documents(), range(60))), 318)


def saved(folder, tokenizer, cfg=CFG, meta=None):
    """A random model with loud weights as the stages save one, in `folder`; returned too."""
    torch.manual_seed(1)
    model = ModernDecoderLM(cfg).eval()
    for name, parameter in model.named_parameters():
        (torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name
         else torch.nn.init.normal_(parameter, std=0.2))
    with atomic_folder(folder, meta) as temporary:
        save_model(temporary, model, eos_id=end_id(tokenizer))
        save_tokenizer(tokenizer, temporary, chat_template=CHAT_TEMPLATE)
    return model


def opened(folder):
    """Model and tokenizer as transformers' own classes open a folder."""
    return (transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
            transformers.AutoTokenizer.from_pretrained(folder))


@torch.no_grad()
def assert_same(model, tokenizer, folder, tolerance=1e-5):
    """Logits, greedy text and the template's ids of a folder in transformers are those of our
    model.
    """
    theirs, their_tokenizer = opened(folder)
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (model(ids) - theirs(ids).logits).abs().max() < tolerance
    talk = [{**message, "content": message["content"].replace("<|end|>", "")} for message in TALK]
    prompt = encode_chat(tokenizer, talk, generation_prompt=True)
    assert list(their_tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False)) == prompt
    ours = generate(model, [prompt], max_new_tokens=20, temperature=0, eos_id=end_id(tokenizer))[0]
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=20,
                             do_sample=False)[0, len(prompt):].tolist()
    assert (their_tokenizer.decode(answer, skip_special_tokens=True) == tokenizer.decode(ours)
            and len(ours) > 3)


@pytest.mark.parametrize("name, changes", LAYOUTS.items(), ids=LAYOUTS)
def test_a_checkpoint_folder_is_a_hugging_face_folder(name, changes, tokenizer, tmp_path):
    model = saved(tmp_path / "checkpoint", tokenizer, replace(CFG, **changes))
    theirs, _ = opened(tmp_path / "checkpoint")
    assert type(theirs).__name__ == name.split(",")[0]
    assert_same(model, tokenizer, tmp_path / "checkpoint")
    export_with_card(tmp_path / "checkpoint", tmp_path / "exported", shard_gb=3e-5)
    index = read_json(tmp_path / "exported" / "model.safetensors.index.json")
    files = sorted(path.name for path in (tmp_path / "exported").glob("*.safetensors"))
    assert (len(files) > 3 and sorted(set(index["weight_map"].values())) == files
            and files[0] == f"model-00001-of-{len(files):05}.safetensors")
    assert_same(model, tokenizer, tmp_path / "exported")
    assert ("modern_llm" not in read_json(tmp_path / "exported" / "config.json")
            and check_folder(tmp_path / "exported"))


def test_half_precision_and_what_transformers_takes_from_the_files(tokenizer, tmp_path):
    model = saved(tmp_path / "checkpoint", tokenizer)
    export_with_card(tmp_path / "checkpoint", tmp_path / "half", dtype="bf16")
    theirs, their_tokenizer = opened(tmp_path / "half")
    assert (theirs.dtype == torch.bfloat16
            and torch.equal(theirs.model.norm.weight, model.norm.weight.bfloat16()))
    assert ([path.name for path in (tmp_path / "half").glob("*.safetensors*")]
            == ["model.safetensors"])
    assert ((theirs.config.bos_token_id, theirs.generation_config.eos_token_id)
            == (end_of_text_id(tokenizer), end_id(tokenizer)))
    # not the first token of every prompt, which would be masked
    assert theirs.generation_config.pad_token_id == end_id(tokenizer)
    assert (their_tokenizer.model_max_length == CFG.context_length
            and their_tokenizer.pad_token_id == end_of_text_id(tokenizer))
    assert their_tokenizer.chat_template == CHAT_TEMPLATE
    again, _ = hub.load(tmp_path / "half")  # and back again
    assert torch.equal(again.norm.weight, model.norm.weight.bfloat16().float())


def louder_sinks(model, folder, tokenizer):
    """The same model with logits that take a good part of every softmax, saved again."""
    for number, block in enumerate(model.layers):
        block.self_attn.sinks.data = torch.linspace(-1.0, 3.0, CFG.num_heads) + number
    with atomic_folder(folder) as temporary:
        save_model(temporary, model, eos_id=end_id(tokenizer))
        save_tokenizer(tokenizer, temporary, chat_template=CHAT_TEMPLATE)


@torch.no_grad()
@pytest.mark.parametrize("name, options", WITH_SINKS.items(), ids=WITH_SINKS)
def test_learned_sinks_have_the_same_logits_in_transformers(name, options, tokenizer, tmp_path):
    name = name.split(",")[0]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers, {transformers.__version__}, has no {name}")
    model = saved(tmp_path / "first", tokenizer, replace(CFG, **options))
    louder_sinks(model, tmp_path / "checkpoint", tokenizer)
    export_with_card(tmp_path / "checkpoint", tmp_path / "exported", shard_gb=3e-5)
    theirs, _ = opened(tmp_path / "exported")
    assert type(theirs).__name__ == name
    ids = torch.randint(0, 318, (2, 90))
    ours = model(ids)
    assert (theirs(ids).logits - ours).abs().max() < 1e-4
    told = theirs.generate(ids[:, :20], attention_mask=torch.ones(2, 20, dtype=torch.long),
                           max_new_tokens=12, do_sample=False, eos_token_id=[])
    for at in range(20, 32):  # from their cache, token by token
        scores = model(told[:, :at])[:, -1]
        assert (scores.max(-1).values - scores.gather(1, told[:, at:at + 1])[:, 0]).max() < 1e-3
    for block in model.layers:
        block.self_attn.sinks.fill_(-30)
    assert (model(ids) - ours).abs().max() > 0.1  # they count


@torch.no_grad()
def test_a_checkpoint_from_before_sinks_had_a_class_elsewhere_is_exported(tokenizer, tmp_path):
    pytest.importorskip("transformers.models.granite_swa", reason="a newer transformers has it")
    model = saved(tmp_path / "checkpoint", tokenizer, replace(CFG, **SINKS))
    config = read_json(tmp_path / "checkpoint" / "config.json")
    (tmp_path / "checkpoint" / "meta.json").unlink(missing_ok=True)
    for word in ("layer_types", "attention_multiplier", "sliding_window"):
        config.pop(word)
    write_json(tmp_path / "checkpoint" / "config.json",
               config | {"architectures": ["ModernDecoderLM"], "model_type": "modern_llm"})
    export_with_card(tmp_path / "checkpoint", tmp_path / "exported")
    ids = torch.randint(0, 318, (2, 90))
    assert (opened(tmp_path / "exported")[0](ids).logits - model(ids)).abs().max() < 1e-4


def test_why_experts_with_qk_norm_and_sinks_stay_here():
    """The reasons that the refusal gives, as this transformers has them."""
    for module in ("flint", "gpt_oss", "granitemoe_swa"):
        pytest.importorskip(f"transformers.models.{module}", reason="a newer transformers has it")
    from transformers.models.flint import modeling_flint
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.granitemoe_swa import modeling_granitemoe_swa

    config = transformers.FlintConfig(hidden_size=8, num_experts=4, num_experts_per_tok=2)
    router = modeling_flint.FlintTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    logits, weights, chosen = router(torch.randn(5, 8))
    kept = logits.gather(1, chosen)
    assert torch.allclose(weights, kept.sigmoid() / kept.sigmoid().sum(-1, keepdim=True))
    assert (weights - kept.softmax(-1)).abs().max() > 0.01
    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=3, num_local_experts=2,
                                       swiglu_alpha=1.0, swiglu_limit=1e9)
    gate, up = torch.randn(2, 5, 3)
    found = modeling_gpt_oss.GptOssExperts(config)._apply_gate(
        torch.stack([gate, up], dim=-1).flatten(1))
    swish = torch.nn.functional.silu(gate)
    assert torch.allclose(found, swish * (up + 1)) and not torch.allclose(found, swish * up)
    for attention, config in ((modeling_gpt_oss.GptOssAttention, config),
                              (modeling_granitemoe_swa.GraniteMoeSWAAttention,
                               transformers.GraniteMoeSWAConfig(num_hidden_layers=1))):
        made = attention(config, 0)
        assert hasattr(made, "sinks") and not hasattr(made, "q_norm")


def test_what_has_no_counterpart_is_refused_by_its_flag(tokenizer, tmp_path):
    saved(tmp_path / "sinks", tokenizer, replace(CFG, **SINKS, **EXPERTS, use_qk_norm=True))
    with pytest.raises(ExportError, match="model.use_attention_sinks=true has no counterpart: "
                                          "beside experts and QK-norm .*Flint weighs its experts "
                                          "by sigmoids.*GptOss multiplies by up . 1"):
        export_with_card(tmp_path / "sinks", tmp_path / "out")
    assert read_json(tmp_path / "sinks" / "config.json")["model_type"] == "modern_llm"
    with pytest.raises(ValueError, match="modern_llm"):  # it does not pass for a Llama either
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sinks")
    saved(tmp_path / "verifier", tokenizer)
    (tmp_path / "verifier" / "verifier.json").write_text("{}")
    with pytest.raises(ExportError, match="is a verifier: its score comes from a head"):
        export_with_card(tmp_path / "verifier", tmp_path / "out")
    for options, message in (({"dtype": "bf61"}, "dtype='bf61' is unknown; did you mean 'bf16'"),
                             ({"shard_gb": 0.0}, "shard_gb=0.0")):
        with pytest.raises(ExportError, match=message):
            export_with_card(tmp_path / "verifier", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written(tokenizer, tmp_path, monkeypatch):
    saved(tmp_path / "checkpoint", tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ExportError, match="mine' is there already and is never overwritten"):
        export_with_card(tmp_path / "checkpoint", tmp_path / "mine")
    monkeypatch.setattr(card, "model_card",
                        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="No space left on device"):
        export_with_card(tmp_path / "checkpoint", tmp_path / "out")
    monkeypatch.undo()
    assert (sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "mine"]
            and len(list((tmp_path / "mine").iterdir())) == 1)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFolder, match="model.safetensors is truncated or changed"):
        export_with_card(tmp_path / "checkpoint", tmp_path / "out")


def with_weight(folder, value, name="model.norm.weight", everywhere=False):
    """The first weight of a tensor of a saved checkpoint becomes `value`, or all of them do; its
    sums fit.
    """
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[slice(None) if everywhere else slice(1)] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "meta.json").unlink()


VALUES = {  # dtype, weight, everywhere -> what is said, or None where it is written
    ("fp16", 65_520.0, False): r"tensor 'model.norm.weight' holds a value of size "
                               r"65,520, and float16 ends at 65,504: .*Use bf16 or fp32",
    ("fp16", -1e6, False): "float16 ends at 65,504", ("fp16", 3e38, True): "float16 ends",
    ("bf16", 3.4e38, False): "bfloat16 ends at 3.38953e.38.*Use fp32",
    ("fp16", 1e-9, True): "no value of tensor 'model.norm.weight' is larger than 1e-09, and "
                          "float16 would make 0",
    ("fp16", math.nan, False): "1 of 32 values of tensor 'model.norm.weight' are NaN",
    ("fp32", math.nan, True): "32 of 32 values", (None, math.inf, False): "NaN or infinite",
    ("bf16", -math.inf, False): "NaN or infinite", ("fp16", 65_504.0, False): None,
    ("fp16", 65_519.0, False): None, ("bf16", 1e38, False): None, ("fp32", 3.4e38, False): None,
    ("fp16", 0.0, True): None, ("bf16", 1e-30, True): None,
}


@pytest.mark.fault("export-values")
@pytest.mark.parametrize("dtype, value, everywhere", VALUES)
def test_a_weight_that_the_dtype_cannot_hold_is_refused_before_anything_is_written(
    dtype, value, everywhere, tokenizer, tmp_path
):
    saved(tmp_path / "checkpoint", tokenizer)
    with_weight(tmp_path / "checkpoint", value, everywhere=everywhere)
    words = ["export", "--checkpoint", str(tmp_path / "checkpoint"), "--to",
             str(tmp_path / "out" / "half"), *["--dtype", dtype] * bool(dtype)]
    result = CliRunner().invoke(main, words)
    if (said := VALUES[dtype, value, everywhere]) is None:
        assert result.exit_code == 0, result.output
        assert all(
            tensor.isfinite().all()
            for tensor in load_file(tmp_path / "out" / "half" / "model.safetensors").values())
    else:
        assert (result.exit_code == 2 and re.search(said, result.output)
                and str(tmp_path) in result.output and not (tmp_path / "out").exists())


@pytest.mark.fault("export-values")
def test_weights_that_become_0_are_counted(tokenizer, tmp_path, capsys):
    saved(tmp_path / "checkpoint", tokenizer)
    with_weight(tmp_path / "checkpoint", 1e-9)
    export_with_card(tmp_path / "checkpoint", tmp_path / "out", dtype="fp16")
    assert re.search(r"1 of [\d,]+ weights are smaller than float16 can hold and become 0",
                     capsys.readouterr().err)


@pytest.mark.fault("export-values")
@pytest.mark.parametrize("value, dtype, said",
                         [(1e6, "fp16", "float16 ends at 65,504"),
                          (math.nan, "bf16", "NaN or infinite"), (1e6, "bf16", "")])
def test_a_model_is_not_loaded_in_a_dtype_that_loses_it(value, dtype, said, tokenizer, tmp_path):
    saved(tmp_path / "checkpoint", tokenizer)
    with_weight(tmp_path / "checkpoint", value)
    words = ["check-inference", "--checkpoint", str(tmp_path / "checkpoint"), "--dtype", dtype,
             "--count", "1", "--max-new-tokens", "2", "--to",
             str(tmp_path / "ok.json"), "--device", "cpu"]
    result = CliRunner().invoke(main, words)
    assert ((result.exit_code == 2 and said in result.output) if said
            else result.exit_code in (0, 1)), result.output
    assert (tmp_path / "ok.json").exists() is not bool(said)


TARGETS = {  # what --to says -> what is said about it; {} is the test's folder
    "{}/file": "is there already", "{}/file/below": "Not a directory|File exists",
    "{}/checkpoint": "is there already", "{}/checkpoint/out": "lies in the checkpoint",
    "{}/checkpoint/../checkpoint/a/b": "lies in the checkpoint", "{}/mine": "is there already",
    "{}/mine/": "is there already", "": "names no folder", "  ": "names no folder",
    "{}/a\0b": "names no folder", "{}/" + "n" * 260: "File name too long",
    "{}/broken": "is there already", "{}/loop/out": "cannot be written", ".": "is there already",
    "/proc/out": "cannot be written", "/dev/null/out": "cannot be written",
    "~/taken": "is there already", "{}/inside/out": "lies in the checkpoint",
}


@pytest.mark.fault("messages")
@pytest.mark.parametrize("target", TARGETS)
def test_a_place_that_cannot_be_written_is_named_with_a_way_out(target, tokenizer, tmp_path,
                                                                monkeypatch):
    saved(tmp_path / "checkpoint", tokenizer)
    for name in ("mine", "taken", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("keep")
    (tmp_path / "home" / "taken").mkdir()
    (tmp_path / "home" / "taken" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "inside").symlink_to("checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, ["export", "--checkpoint", "checkpoint", "--to",
                                       target.replace("{}", str(tmp_path))])
    assert (result.exit_code == 2 and re.search(TARGETS[target], result.output)
            and "--to" in result.output), result.output
    assert ("MODERN_LLM" not in result.output and len(result.output.splitlines()) == 1
            and sorted(tmp_path.rglob("*")) == before)


@pytest.mark.fault("messages")
@pytest.mark.parametrize(
    "step", ["write_weights", "model_card", "write_json", "shutil.copyfile", "write_text"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_leaves_nothing_and_is_not_blamed_on_the_cache(step, number, tokenizer,
                                                                         tmp_path, monkeypatch):
    saved(tmp_path / "checkpoint", tokenizer)

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    place = "report.card" if step == "model_card" else "interchange.export"
    monkeypatch.setattr(f"modern_llm.{place}.{step}", fails)
    result = CliRunner().invoke(main, ["export", "--checkpoint", str(tmp_path / "checkpoint"),
                                       "--to", str(tmp_path / "out")])
    assert (result.exit_code == 2 and os.strerror(number) in result.output
            and f"--to '{tmp_path}/out'" in result.output)
    assert ("MODERN_LLM_CACHE" not in result.output
            and [path.name for path in tmp_path.iterdir()] == ["checkpoint"])


@pytest.mark.fault("messages")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux",
                    reason="mounts a disk of 300 KB")
def test_a_full_disk(tokenizer, tmp_path):
    saved(tmp_path / "checkpoint", tokenizer)
    (tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path / "small")],
                      capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        result = CliRunner().invoke(main, ["export", "--checkpoint", str(tmp_path / "checkpoint"),
                                           "--to", str(tmp_path / "small" / "out")])
        assert (result.exit_code == 2 and "small/out' cannot be written: " in result.output
                and list((tmp_path / "small").iterdir()) == [])
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("target", ["no/such/ok.json", ".", "file/ok.json", ""])
def test_where_the_figures_of_a_check_go_is_known_before_it_runs(target, tokenizer, tmp_path,
                                                                 monkeypatch):
    saved(tmp_path / "checkpoint", tokenizer)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modern_llm.evaluation.inference.check_inference",
                        lambda *_, **__: pytest.fail("the work was done first"))
    result = CliRunner().invoke(main,
                                ["check-inference", "--checkpoint", "checkpoint", "--to", target])
    assert (result.exit_code == 2 and "cannot be written" in result.output
            and "--to" in result.output)


def test_shards_keep_the_order_and_the_limit():
    sizes = {"a": 3, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9}
    assert (shards(sizes, 7) == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
            and shards(sizes, 100) == [list(sizes)])


def sections_of(text):
    return {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}


@pytest.fixture
def run(tokenizer, tmp_path):
    """A run whose stages left what they leave, with a model that can be opened; it began with a
    third-party model.
    """
    folder = make_run(tmp_path / "runs", "it")
    preset = get_pipeline_preset("lesson")
    chain = {"sft": {"checkpoint": {"path": str(tmp_path / "base"), "sha256": "a" * 64}},
             "dpo": {"sft": {"path": "x", "sha256": "b" * 64}}}
    for stage in ("pretrain", "sft", "dpo"):
        params = read_json(folder / stage / "params.json")
        write_json(folder / stage / "params.json",
                   {**params, "config": sections(preset, stage), "inputs": chain.get(stage, {})})
        saved(folder / stage / "checkpoint", tokenizer, meta={"step": 9})
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / "meta.json",
               {"imported": {"source": "someone/tiny"}, "sha256": {}})
    return folder


def test_the_model_card_is_written_from_the_files_of_the_run(run, tmp_path):
    export_with_card(run / "sft" / "checkpoint", tmp_path / "out" / "tiny-chat")
    text = (tmp_path / "out" / "tiny-chat" / "README.md").read_text()
    parts = sections_of(text)
    assert (text.startswith("---\nlibrary_name: transformers")
            and "base_model: someone/tiny" in text.split("\n---\n")[0])
    assert ("layout of `LlamaForCausalLM` (float32" in text
            and 'from_pretrained("tiny-chat")' in parts["Use"] and "chat template" in parts["Use"])
    made = parts["How it was made"]
    assert ("started from someone/tiny" in made and "c0ffee+changes" in made
            and "--stage sft" in made and "--stage dpo" not in made)
    assert ("| synthetic | sft | built in | MIT |" in parts["Data and licences"]
            and "synthetic-problems" in parts["Data and licences"])
    assert ("| problems | exact match | 0.370 [0.310, 0.430] | 250 | chat |" in parts["Results"]
            and "minus" not in parts["Results"])
    assert ("9,000 tokens of training here, one seed" in parts["Limits"]
            and "written by a program" in parts["Limits"])
    assert ("3.6% of the items of problems share" in parts["Limits"]
            and "stuck at log 2" not in parts["Limits"])
    assert read_json(tmp_path / "out" / "tiny-chat" / "meta.json")["exported"]["step"] == 9


def test_a_card_names_alarms_and_real_data_and_admits_what_it_does_not_know(
    run, tokenizer, tmp_path
):
    params = read_json(run / "dpo" / "params.json")
    params["config"]["dpo"] |= {"sources": ["hh-rlhf", "my-own.jsonl"], "replay_weight": 0.0}
    write_json(run / "dpo" / "params.json", params)
    (run / "eval" / "ledger.csv").unlink()
    export_with_card(run / "dpo" / "checkpoint", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("datasets:\n- Anthropic/hh-rlhf\n" in text
            and "| hh-rlhf | dpo | Anthropic/hh-rlhf | MIT |" in text)
    assert ("| my-own.jsonl | dpo |  | unknown |" in text
            and "alarm: stuck at log 2 at step 7 (0.693)" in text)
    assert ("| held out in the dpo stage | preference accuracy, after, synthetic | 0.600 [0.500, "
            "0.700] | 40 | 40 held-out \\| things |" in text)
    saved(tmp_path / "alone", tokenizer)
    export_with_card(tmp_path / "alone", tmp_path / "alone-out")
    text = (tmp_path / "alone-out" / "README.md").read_text()
    assert ("None were measured." in text and "knows no results" in text
            and "Not known to this card." in text)


def test_the_command(run, tmp_path):
    ask = lambda *words: CliRunner().invoke(main, ["export", "--run", "it", "--output-dir",
                                                   str(run.parent), *map(str, words)])
    result = ask("--stage", "sft", "--to", tmp_path / "out", "--dtype", "bf16", "--shard-gb", 1e-5)
    assert (result.exit_code == 0 and "sft/checkpoint -> " in result.output
            and (tmp_path / "out" / "model.safetensors.index.json").is_file())
    again = ask("--to", tmp_path / "out")
    assert (again.exit_code == 2 and "never overwritten" in again.output
            and len(again.output.splitlines()) == 1)
    assert "no language model" in ask("--stage", "eval", "--to", tmp_path / "other").output
    code = ("import sys, modern_llm.interchange.export; print([m for m in ('torch', "
            "'transformers', 'pandas') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                          text=True).stdout.strip() == "[]"


def test_an_export_still_speaks_chat_when_it_comes_back(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    export_with_card(run / "sft" / "checkpoint", tmp_path / "out", shard_gb=1e-4)
    folder = hub.imported(tmp_path / "out")
    assert (is_chat_model(folder, load_tokenizer(folder))
            and json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])


@pytest.mark.fault("promises")
@pytest.mark.parametrize("name, text, said",
                         [("sft/params.json", None, "sft/params.json is absent or has no config"),
                          ("sft/params.json", "{", "sft/params.json is not JSON"),
                          ("sft/params.json", "{}", "is absent or has no config"),
                          ("sft/params.json", "[1]", "holds [1], not a JSON object"),
                          ("run.json", "", "run.json is empty"),
                          ("sft/results.json", "{\"a\"", "results.json is not JSON"),
                          ("dpo/params.json", "\0", "dpo/params.json holds nothing but zeros")])
def test_a_damaged_record_costs_the_card_not_the_export(run, name, text, said, tmp_path, capsys):
    (run / name).unlink() if text is None else (run / name).write_text(text)
    export_with_card(run / "sft" / "checkpoint", tmp_path / "out")
    assert (said in capsys.readouterr().err
            and "knows no results of it" in (tmp_path / "out" / "README.md").read_text())


@pytest.mark.fault("promises")
def test_a_base_model_with_a_template_is_no_chat_model(tokenizer, tmp_path):
    with atomic_folder(tmp_path / "base", {}) as temporary:
        save_model(temporary, ModernDecoderLM(CFG), eos_id=end_of_text_id(tokenizer))
        save_tokenizer(tokenizer, temporary, chat_template=CHAT_TEMPLATE)
    export_with_card(tmp_path / "base", tmp_path / "out")
    assert "It continues text" in (tmp_path / "out" / "README.md").read_text()
