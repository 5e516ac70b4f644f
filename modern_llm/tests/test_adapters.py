"""Adapters (LoRA): what learns, what a stage leaves, what others read, what is refused."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from modern_llm.config import (
    ConfigError, DPOConfig, ModelConfig, PipelineConfig, SFTConfig, VerifierConfig,
    get_pipeline_preset, override,
)
from modern_llm.data import synth
from modern_llm.data.tokens import train_tokenizer
from modern_llm.models.counts import training_memory
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model
from modern_llm.models.verifier import VerifierModel, load_verifier
from modern_llm.runs.record import StageRun
from modern_llm.runs.resume import changed_settings
from modern_llm.runs.spec import recipe_of, sections
from modern_llm.training.adapters import (
    adapters, add_adapters, load_adapter, merge_adapters, merged, projections, save_adapter,
)
from modern_llm.training.distributed import World, on_ranks
from modern_llm.training.optim import chunked_cross_entropy, lm_loss, make_optimizers
from modern_llm.training.sft import save_chat_model
from modern_llm.training.trainer import Trainer

SHAPE = ModelConfig(vocab_size=400, context_length=128, width=32, num_layers=2, num_heads=2,
                    num_kv_heads=1, ffn_width=64, use_qk_norm=False)
CONFIG = SFTConfig(max_steps=9, batch_size=4, warmup_steps=2, lr=1e-2, precision="fp32",
                   lora_rank=3, lora_alpha=5.0, log_every=1, checkpoint_every=4, eval_every=3,
                   keep_checkpoints=2)


def model_of(shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    model = ModernDecoderLM(shape)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def adapted(shape=SHAPE, rank=3, alpha=5.0, names=None):
    """A model whose adapters say something."""
    model = model_of(shape)
    add_adapters(model, rank, alpha, names)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B.weight, std=0.1)
    return model


def batches(step):
    ids = torch.randint(400, (4, 17), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def trainer(folder, cfg=CONFIG, model=None, **options):
    return Trainer(model or model_of(), lm_loss, batches, cfg, folder, device="cpu",
                   save_model=lambda whole, path: save_model(path, whole), progress_bar=False,
                   **options)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name])
                                                 for name, value in first.items())


IDS = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(1))


# ---- in a model ----------------------------------------------------------------------------------


def test_merging_for_a_moment_changes_nothing_and_is_exact_under_autocast():
    model = adapted()
    before, kept = model.state_dict(), adapters(model)
    values = {name: value.clone() for name, value in before.items()}
    first, name = next(iter(kept.values())), next(iter(kept))
    product = first.weight + 5.0 / 3 * (first.lora_B.weight @ first.lora_A.weight)
    with torch.autocast("cpu", torch.bfloat16), merged(model):
        torch.testing.assert_close(model.get_submodule(name).weight, product, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="on purpose"), merged(model):
        raise RuntimeError("on purpose")
    assert adapters(model) == kept and same(model.state_dict(), values)


@pytest.mark.parametrize("act, message", [
    (lambda: add_adapters(model_of(), 0, 1.0), "rank=0, alpha=1.0: both must be greater than 0"),
    (lambda: add_adapters(adapted(), 2, 1.0), "has adapters already: merge_adapters"),
    (lambda: add_adapters(model_of(), 2, 1.0, ["lm_head"]), "lm_head is no projection of a block"),
    (lambda: add_adapters(torch.nn.Linear(2, 2), 2, 1.0), "the model is no projection"),
    (lambda: save_adapter(model_of(), "nowhere"), "no adapters to save"),
])
def test_what_cannot_be_adapted_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_head_gets_no_gradient_and_the_rest_gets_its_own(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    labels = torch.randint(0, 30, (12,))
    whole = chunked_cross_entropy(hidden, weight, labels, 4)
    wanted = torch.autograd.grad(whole, hidden)[0]
    loss = chunked_cross_entropy
    if compiled:
        loss = torch.compile(lambda *args: chunked_cross_entropy(*args), fullgraph=True)
    frozen = weight.detach()
    nats = loss(hidden, frozen, labels, 4)
    nats.backward()
    torch.testing.assert_close(nats, whole)
    torch.testing.assert_close(hidden.grad, wanted)
    assert frozen.grad is None


# ---- in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path, optimizer, precision):
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, precision=precision, ema_decay=0.9)
    draw = lambda model: {"loss": torch.rand(()).item()}
    straight, resumed = model_of(), model_of()
    trainer(tmp_path / "a", cfg, straight, evaluate=draw).fit()
    calls = iter(range(1, 100))
    cut = trainer(tmp_path / "b", cfg, evaluate=draw, should_stop=lambda: next(calls) == 5).fit()
    assert (cut.step, cut.stopped) == (5, "stopped")
    trainer(tmp_path / "b", cfg, resumed, evaluate=draw, resume=True, seed=5).fit()
    assert same(straight.state_dict(), resumed.state_dict()) and adapters(straight)
    one, other = (load_model(tmp_path / run / "checkpoint").state_dict() for run in "ab")
    assert same(one, other)


def test_saving_and_validating_do_not_disturb_training(tmp_path):
    seen = []

    def evaluate(model):
        seen.append((len(adapters(model)), model(IDS).float()))
        return {"loss": 1.0}

    quiet = dataclasses.replace(CONFIG, checkpoint_every=100, eval_every=100, keep_checkpoints=0)
    one, other = model_of(), model_of()
    trainer(tmp_path / "often", CONFIG, one, evaluate=evaluate).fit()
    trainer(tmp_path / "once", quiet, other).fit()
    assert same(one.state_dict(), other.state_dict())
    assert len(seen) == 3 and all(count == 0 for count, _ in seen)
    # what was validated last is what was saved
    saved = load_model(tmp_path / "often" / "checkpoint").eval()
    with torch.no_grad():
        assert torch.equal(saved(IDS), seen[-1][1])


def test_a_checkpoint_is_the_whole_model_with_its_adapter_beside_it(tmp_path):
    model = model_of()
    trainer(tmp_path / "run", model=model).fit()
    start, checkpoint = model_of(), tmp_path / "run" / "checkpoint"
    saved = load_model(checkpoint)
    assert saved.state_dict().keys() == start.state_dict().keys()
    torch.testing.assert_close(saved(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    names = {f"{name}.weight" for name in projections(start)}
    changed = {name for name, value in saved.state_dict().items()
               if not torch.equal(value, start.state_dict()[name])}
    assert changed == names
    for name in names:
        change = saved.state_dict()[name] - start.state_dict()[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 3
    load_adapter(start, checkpoint / "adapter")
    assert torch.equal(start(IDS), model(IDS))
    first, _ = sorted((tmp_path / "run" / "checkpoints").iterdir())
    load_model(first)
    assert (first / "adapter" / "adapter_config.json").is_file()


def test_the_average_of_the_adapters_is_what_is_saved(tmp_path):
    model, cfg = model_of(), dataclasses.replace(CONFIG, ema_decay=0.9)
    trained = trainer(tmp_path / "run", cfg, model)
    trained.fit()
    beside = model_of()
    load_adapter(beside, tmp_path / "run" / "checkpoint" / "adapter")
    learned = {name: p for name, p in beside.named_parameters() if p.requires_grad}
    assert same(learned, trained.state.average.weights)
    assert not same(learned, {n: p for n, p in model.named_parameters() if p.requires_grad})
    saved = load_model(tmp_path / "run" / "checkpoint")
    torch.testing.assert_close(saved(IDS), beside(IDS), rtol=1e-4, atol=1e-4)


def test_another_rank_does_not_fit_the_checkpoint(tmp_path):
    trainer(tmp_path / "run", dataclasses.replace(CONFIG, max_steps=2)).fit()
    for changes in ({"lora_rank": 4}, {"lora_rank": 0, "lora_alpha": None}):
        with pytest.raises(RuntimeError, match="does not fit this run"):
            trainer(tmp_path / "run", dataclasses.replace(CONFIG, **changes), resume=True)


def test_compiled_and_checkpointed_blocks_learn_the_same(tmp_path, monkeypatch):
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block, **_: whole(block, backend="eager"))
    plain, other = model_of(), model_of()
    trainer(tmp_path / "a", CONFIG, plain).fit()
    cfg = dataclasses.replace(CONFIG, compile=True, gradient_checkpointing=True)
    look = lambda model: {"loss": model(IDS).mean().item()}
    trainer(tmp_path / "b", cfg, other, evaluate=look).fit()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_learn_as_one(tmp_path):
    def run(folder, world):
        model = model_of(seed=world.rank)  # the ranks begin with the first one's weights
        return trainer(folder, model=model, world=world,
                       evaluate=lambda m: {"loss": len(adapters(m))}).fit().history

    alone, (first, _) = run(tmp_path / "alone", World()), on_ranks(
        partial(run, tmp_path / "together"))
    of = lambda rows, name: [row[name] for row in rows if name in row]
    assert of(first, "loss") == pytest.approx(of(alone, "loss"), rel=1e-5)
    # all of them validate the merged model
    assert of(first, "val_loss") == of(alone, "val_loss") == [0.0] * 3
    one, other = (load_model(tmp_path / name / "checkpoint") for name in ("alone", "together"))
    torch.testing.assert_close(one(IDS), other(IDS), rtol=1e-3, atol=1e-4)


def test_a_module_without_a_language_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="lora_rank=3: Linear has no ModernDecoderLM"):
        trainer(tmp_path / "run", model=torch.nn.Linear(2, 2))


# ---- the stages ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    texts = [f"{pair.prompt} {pair.chosen} {pair.rejected}"
             for pair, _ in zip(synth.preferences(), range(300))]
    folder = tmp_path_factory.mktemp("start")
    save_chat_model(folder, model_of(), train_tokenizer(texts, 400))
    return folder


SMALL = {
    "sft": {"batch_size": 4, "max_train_examples": 60, "max_validation_examples": 8},
    "dpo": {"max_train_pairs": 24, "max_validation_pairs": 8, "max_new_tokens": 4},
    "verifier": {"levels": [1], "train_problems": 5, "validation_problems": 4,
                 "samples_per_problem": 1, "validation_samples": 2, "max_new_tokens": 6},
}


def stage(name, start, folder, resume=False, **changes):
    """The stage's recipe, with adapters, on a small model."""
    train = {"max_steps": 6, "eval_every": 6, "checkpoint_every": 2, "lora_rank": 2,
             "keep_checkpoints": 0, "precision": "fp32"}
    config = override(get_pipeline_preset("lesson"), {
        "data": {"tokenizer_vocab_size": 400, "max_train_tokens": 5000,
                 "max_validation_tokens": 1500}, name: {**SMALL[name], **train, **changes}})
    config = dataclasses.replace(config, model=SHAPE)
    return recipe_of(name)(StageRun(name, "small", config, "cpu", folder, resume, 0.0,
                                    {"checkpoint": start}))


@pytest.mark.parametrize("name", ["sft", "dpo", "verifier"])
def test_every_stage_leaves_an_ordinary_checkpoint_and_resumes_exactly(
        name, start, tmp_path, offline):
    assert stage(name, start, tmp_path / "straight").fit().stopped == "finished"
    cut, folder = stage(name, start, tmp_path / "cut"), tmp_path / "straight"
    original = cut.run.trainer
    calls = iter(range(1, 100))
    cut.run.trainer = lambda *args, **others: original(
        *args, **{"should_stop": lambda: next(calls) == 3, **others})
    assert cut.fit().stopped == "stopped"
    assert stage(name, start, tmp_path / "cut", resume=True).fit().step == 6
    read = load_verifier if name == "verifier" else load_model
    one, other = (read(tmp_path / run / "checkpoint") for run in ("straight", "cut"))
    language = one.model if name == "verifier" else one
    before = load_model(start)
    assert not adapters(one) and language.state_dict().keys() == before.state_dict().keys()
    changed = {place for place, value in language.state_dict().items()
               if not torch.equal(value, before.state_dict()[place])}
    assert changed == {f"{place}.weight" for place in projections(before)}
    load_adapter(before, folder / "checkpoint" / "adapter")
    torch.testing.assert_close(before(IDS), language(IDS), rtol=1e-4, atol=1e-4)
    if name == "verifier":
        assert one.head.weight.any()
    assert same(one.state_dict(), other.state_dict())
    if name != "sft":  # a control learns by the same means as its stage
        control = load_model(folder / "control" / "checkpoint")
        assert (folder / "control" / "checkpoint" / "adapter").is_dir()
        start_of = load_model(start)
        assert torch.equal(control.embed_tokens.weight, start_of.embed_tokens.weight)
        assert not same(control.state_dict(), start_of.state_dict())


def test_beside_a_frozen_body_the_verifiers_head_learns(tmp_path):
    verifier = VerifierModel(model_of(), VerifierConfig())
    Trainer(verifier, lambda *_: None, batches, dataclasses.replace(CONFIG, lora_rank=2), tmp_path,
            device="cpu", progress_bar=False)
    learning = {name.split(".")[-2] for name, p in verifier.named_parameters()
                if p.requires_grad and "." in name}
    assert learning == {"head", "lora_A", "lora_B"} and verifier.surprise.requires_grad


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"pretrain": {"lora_rank": 8}}, "pretrain.lora_rank=8.*learn beside weights that know"),
    ({"pretrain": {"lora_alpha": 8.0}}, "pretrain.lora_rank=0, lora_alpha=8.0"),
    ({"sft": {"lora_rank": -1}}, "sft.lora_rank=-1 must not be negative"),
    ({"dpo": {"lora_alpha": 4.0}}, "dpo.lora_alpha=4.0 must be greater than 0 and go with"),
    ({"sft": {"lora_rank": 4, "lora_alpha": 0.0}}, "sft.lora_alpha=0.0 must be greater than 0"),
    ({"verifier": {"lora_rank": 4, "kind": "encoder"}}, "verifier.lora_rank=4 is for"),
    ({"sft": {"lora_rank": 4}, "hardware": {"ranks": 2, "strategy": "fsdp"}},
     "sft.lora_rank: hardware.strategy='fsdp'.*say hardware.strategy=ddp"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(PipelineConfig(), changes)


def test_alpha_is_twice_the_rank_where_nothing_is_said():
    assert DPOConfig(lora_rank=8).adapter_alpha == 16.0
    assert DPOConfig(lora_rank=8, lora_alpha=4.0).adapter_alpha == 4.0


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "verifier"])
def test_a_stage_begun_before_the_setting_existed_goes_on(name):
    config = PipelineConfig()
    former = sections(config, name)
    for setting in ("lora_rank", "lora_alpha"):
        del former[name][setting]
    record = {"config": former, "context_length": config.model.context_length}
    assert changed_settings(record, name, config) == []
    if name != "pretrain":
        other = override(config, {name: {"lora_rank": 4}})
        assert changed_settings(record, name, other) == [f"{name}.lora_rank: 0 -> 4"]


@pytest.mark.parametrize("cfg", [CONFIG, dataclasses.replace(CONFIG, optimizer="muon")])
def test_the_memory_estimate_counts_what_is_allocated(cfg):
    model = adapted()
    states = []
    for optimizer in make_optimizers(model, cfg):
        lm_loss(model, batches(0)).total.backward()
        optimizer.step()
        states += [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    estimate = training_memory(SHAPE, cfg)
    size = lambda tensors: sum(4 * tensor.numel() for tensor in tensors)
    assert estimate["optimizer"] == size(states)
    assert estimate["weights"] == size(model.parameters())
    assert estimate["gradients"] == size(p.grad for p in model.parameters() if p.grad is not None)
    assert estimate["total"] < training_memory(
        SHAPE, dataclasses.replace(cfg, lora_rank=0, lora_alpha=None))["total"]


# ---- peft's format -------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was(tmp_path):
    for shape in (SHAPE, dataclasses.replace(SHAPE, num_experts=4)):
        model, again = adapted(shape), model_of(shape)
        save_adapter(model, tmp_path)
        load_adapter(again, tmp_path)
        assert same(model.state_dict(), again.state_dict()) and torch.equal(model(IDS), again(IDS))


@pytest.mark.parametrize("changes, message", [
    ({"use_dora": True}, "says use_dora=True, which is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "says rank_pattern"),
    ({"peft_type": "IA3"}, "says peft_type='IA3'"),
    ({"r": 4}, r"lora_A.weight' is \(3, 64\) in the file, but should be \(4, 64\)"),
    ({"r": None}, "does not say 'r': it describes no LoRA adapter"),
])
def test_an_adapter_of_another_kind_is_refused(tmp_path, changes, message):
    save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    model = model_of()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    for changes in ({"num_layers": 1}, {"width": 64}):
        with pytest.raises(ValueError, match="adapter was trained on another"):
            load_adapter(model_of(dataclasses.replace(SHAPE, **changes)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="lm_head.weight' is \\(2,\\) in the file, but should"):
        load_adapter(model_of(), tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="truncated or damaged"):
        load_adapter(model_of(), tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(model_of(), tmp_path)


@pytest.fixture
def others(tmp_path):
    """peft, and a function that opens the base in transformers, written by `save_model`."""
    reason = "it has to read our adapter: pip install 'modern_llm[baselines]'"
    transformers = pytest.importorskip("transformers", reason=reason)
    peft = pytest.importorskip("peft", reason=reason)

    def base(shape):
        (tmp_path / "base").mkdir()
        save_model(tmp_path / "base", model_of(shape))
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    return peft, base


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True}])
@pytest.mark.parametrize("names", [None, ["layers.0.self_attn.q_proj"]])
def test_peft_reads_our_adapter(tmp_path, others, changes, names):
    (peft, base), shape = others, dataclasses.replace(SHAPE, **changes)
    ours = adapted(shape, names=names)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(shape), str(tmp_path / "adapter"))
    assert (sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
            == len(adapters(ours)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(theirs(IDS).logits, model_of(shape)(IDS), atol=1e-2)
        merge_adapters(ours)
        whole = theirs.merge_and_unload()
        torch.testing.assert_close(whole(IDS).logits, ours(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_we_read_an_adapter_of_peft(tmp_path, others, targets):
    peft, base = others
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base(SHAPE), peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False,
        task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = model_of()
    load_adapter(ours, tmp_path / "adapter")
    assert len(adapters(ours)) == (4 if len(targets) == 2 else 14)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(IDS), model_of()(IDS), atol=1e-2)
