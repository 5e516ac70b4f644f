"""The model's options with each other: every pair of values is in some row, and every row goes
through all stages, the checkpoint, generation, the evaluation and both exports. What has no
counterpart elsewhere is refused, by the name of the option.
"""

import copy
import dataclasses
import itertools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from modern_llm.config import ModelConfig, get_pipeline_preset, override
from modern_llm.evaluation.attention import attention_maps
from modern_llm.evaluation.families import FAMILIES
from modern_llm.evaluation.stages import Evaluation, ledger_items, measure
from modern_llm.files import read_json
from modern_llm.interchange.export import ExportError, export_model
from modern_llm.interchange.gguf_export import export_gguf
from modern_llm.models.counts import adapter_parameters, parameter_count
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.prefix import continuation_log_probs
from modern_llm.models.saving import disk_names, load_model
from modern_llm.models.verifier import load_verifier
from modern_llm.runs.record import StageRun
from modern_llm.runs.spec import recipe_of
from modern_llm.training import grpo
from modern_llm.training.adapters import projections

PLAIN = ModelConfig(vocab_size=400, context_length=128, width=32, num_layers=2, num_heads=4,
                    num_kv_heads=4, ffn_width=48, use_qk_norm=False)
OPTIONS = {  # the first values make a plain Llama
    "experts": ({}, {"num_experts": 2, "experts_per_token": 1},
                {"num_experts": 3, "experts_per_token": 2}),
    "groups": ({}, {"num_kv_heads": 2}, {"num_kv_heads": 1}),
    "rope": ({}, {"rope_factor": 2.0, "rope_scaling": "yarn", "rope_trained_context": 64}),
    "qk-norm": ({}, {"use_qk_norm": True}),
    "sinks": ({}, {"use_attention_sinks": True}),
    "window": ({}, {"sliding_window": 5}),
    "untied": ({}, {"tie_embeddings": False}),
    "lora": ({}, {"lora_rank": 2}),
}
STAGES = ("pretrain", "sft", "dpo", "grpo", "verifier")  # each starts from the one before
TRAIN = {"max_steps": 2, "batch_size": 4, "warmup_steps": 0, "log_every": 1, "eval_every": 2,
         "checkpoint_every": 2, "keep_checkpoints": 0, "precision": "fp32"}
SMALL = {
    "pretrain": TRAIN,
    "sft": TRAIN | {"max_train_examples": 40, "max_validation_examples": 4},
    "dpo": TRAIN | {"max_train_pairs": 8, "max_validation_pairs": 4, "max_new_tokens": 4,
                    "control": False},
    "grpo": TRAIN | {"levels": [1], "train_problems": 4, "validation_problems": 2, "group_size": 2,
                     "max_new_tokens": 6, "kl_weight": 0.1, "control": False},
    "verifier": TRAIN | {"levels": [1], "train_problems": 5, "validation_problems": 4,
                         "samples_per_problem": 1, "validation_samples": 2, "gold_problems": 20,
                         "max_new_tokens": 6, "control": False},
    "data": {"tokenizer_vocab_size": 400, "max_train_tokens": 5000, "max_validation_tokens": 1500},
    "eval": {"levels": [1], "num_problems": 2, "sampled_levels": [1], "sampled_problems": 2,
             "samples_per_problem": 2, "max_new_tokens": 4, "num_sentences": 2, "shots": [0, 1],
             "draws": 1, "num_instructions": 2, "num_pairs": 2, "max_perplexity_tokens": 300,
             "protocol_tokens": 200, "overlap_words": 0},
}
IDS = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(1))


def pairs(row):
    """The pairs of (option, number of its value) in a row."""
    return set(itertools.combinations(zip(OPTIONS, row), 2))


def covering(seed=490):
    """Rows of numbers of values, the plain model first: always one of those that have most of the
    pairs that are missing; another seed may need more rows.
    """
    plain, *others = itertools.product(*(range(len(values)) for values in OPTIONS.values()))
    random.Random(seed).shuffle(others)
    found = {row: pairs(row) for row in (plain, *others)}
    rows, missing = [], set().union(*found.values())
    while missing:
        rows.append(max(found, key=lambda row: len(found[row] & missing)))
        missing -= found[rows[-1]]
    return rows


ROWS = [{name: OPTIONS[name][number] for name, number in zip(OPTIONS, row)} for row in covering()]


def test_every_pair_of_values_is_in_a_row():
    for one, other in itertools.combinations(OPTIONS, 2):
        for values in itertools.product(OPTIONS[one], OPTIONS[other]):
            assert any((row[one], row[other]) == values for row in ROWS), (one, other, values)
    assert len(ROWS) == 9 and not any(ROWS[0].values())
    # and what no class of transformers has
    assert any(row["experts"] and row["qk-norm"] and row["sinks"] for row in ROWS)


# ---- a row through the stages --------------------------------------------------------------------


@dataclasses.dataclass
class Watched(StageRun):
    """A stage that keeps what it trained, which parameters got a gradient other than 0, and the
    same training restored from its checkpoint.
    """

    def trainer(self, model, *how, **others):
        fresh = copy.deepcopy(model)
        self.trained = super().trainer(model, *how, progress_bar=False, **others)
        self.restored = lambda: StageRun.trainer(self, fresh, *how, progress_bar=False,
                                                 **others | {"resume": True})
        self.reached = set()
        for name, parameter in self.trained.state.module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self.note, name))
        return self.trained

    def note(self, name, parameter):
        if parameter.grad.any():
            self.reached.add(name)

    @property
    def checkpoint(self):
        return self.folder / "checkpoint"


def loud(model):
    """Weights as large as trained ones, so that everything counts."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data = torch.linspace(-1.0, 2.0, len(parameter))
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)


def paid_in_turn(problems, answers):
    """A reward for every second answer, so that every group has something to compare."""
    return np.arange(len(answers)) % 2.0


def named(row):
    return ", ".join(f"{name}={value}" for values in row.values()
                     for name, value in values.items()) or "plain"


@pytest.fixture(scope="module", params=ROWS, ids=named)
def chain(request, tmp_path_factory):
    """The row's run: two steps of every stage."""
    options = {name: value for values in request.param.values() for name, value in values.items()}
    rank, folder = options.pop("lora_rank", 0), tmp_path_factory.mktemp("run")
    cfg = dataclasses.replace(PLAIN, **options)
    config = override(get_pipeline_preset("lesson"), SMALL)
    config = dataclasses.replace(config, model=cfg, **{
        stage: dataclasses.replace(getattr(config, stage), lora_rank=rank)
        for stage in STAGES[1:]})
    runs, inputs = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MODERN_LLM_DATA", raising=False)
        patch.setattr(grpo, "exact_reward", paid_in_turn)
        for stage in STAGES:
            run = runs[stage] = Watched(stage, "it", config, "cpu", folder / stage, False, 0.0,
                                        inputs)
            recipe = recipe_of(stage)(run)
            if stage == "pretrain":
                loud(recipe.model)
            run.result, inputs = recipe.fit(), {stage: run.checkpoint}
    return runs


def body_of(module):
    """The language model of a module, which in a verifier is a part of it."""
    return getattr(module, "model", module)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_what_it_should(chain, stage):
    run = chain[stage]
    assert run.result.stopped == "finished" and run.result.step == 2
    losses = [row[name] for row in run.result.history for name in ("loss", "val_loss")
              if name in row]
    assert len(losses) > 2 and all(map(math.isfinite, losses))
    module, plain, rank = (run.trained.state.module, ModernDecoderLM(run.config.model),
                           getattr(run.config, stage).lora_rank)
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    own = {f"{name}.{part}.weight" for name in projections(plain) for part in ("lora_A", "lora_B")
           } if rank else set(dict(plain.named_parameters()))
    heads = {"head.weight", "head.bias", "surprise"} if stage == "verifier" else set()
    assert learning.keys() == run.reached == {
        "model." * bool(heads) + name for name in own} | heads
    assert sum(p.numel() for name, p in learning.items() if name not in heads) == (
        adapter_parameters(plain.cfg, rank) if rank else parameter_count(plain.cfg)["total"])


@torch.no_grad()
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_what_was_trained(chain, stage):
    run, rank = chain[stage], getattr(chain[stage].config, stage).lora_rank
    module, again = run.trained.state.module.eval(), run.restored().state
    kept = again.module.state_dict()
    assert again.step == 2 and kept.keys() == module.state_dict().keys()
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    whole = (load_verifier if stage == "verifier" else load_model)(run.checkpoint).eval()
    assert body_of(whole).cfg == run.config.model
    # adapters are saved as a product, added to what they stand beside
    same = torch.testing.assert_close if rank else partial(
        torch.testing.assert_close, rtol=0, atol=0)
    same(body_of(whole)(IDS), body_of(module)(IDS))
    if stage == "verifier":
        same(whole(IDS, IDS > 200)[0], module(IDS, IDS > 200)[0])
    if run.start:
        before, after = load_model(run.start).state_dict(), body_of(whole).state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == ({f"{name}.weight" for name in projections(body_of(whole))} if rank
                           else before.keys())


@torch.no_grad()
def test_what_is_cached_is_the_full_forward_pass(chain):
    model, prompts = load_model(chain["grpo"].checkpoint).eval(), [[1, 2, 3], [4], [5, 6] * 9]
    told = generate(model, prompts, max_new_tokens=12, temperature=0)
    for prompt, answer in zip(prompts, told):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert behind.max() < 1e-3 < logits.std()
    assert len({tuple(answer) for answer in told}) == 3
    assert generate(model, prompts[:1], max_new_tokens=12, temperature=0,
                    streaming=True) == told[:1]
    rows = [[*IDS[0].tolist(), *tail] for tail in ([1, 2], [3], [4, 5, 6, 7])]
    shared, alone = (continuation_log_probs(model, rows, [40] * 3, share=share)
                     for share in (True, False))
    assert shared == pytest.approx(alone, rel=1e-4) and shared.std() > 0.1


def test_every_task_of_the_evaluation_is_measured(chain):
    run = chain["verifier"]
    inputs = {stage: chain[stage].checkpoint for stage in ("grpo", "verifier")}
    found = Evaluation(dataclasses.replace(run, stage="eval", folder=run.folder.parent / "eval",
                                           inputs=inputs))
    measure(found)
    items = ledger_items(found)
    assert {task for _, task in found.pieces} == set(FAMILIES)
    assert np.isfinite(items.value).all() and set(items.stage) == {"grpo", "verifier"}


def test_the_weights_of_attention_rebuild_every_layer(chain):
    """`attention_maps` refuses weights that do not."""
    model = load_model(chain["grpo"].checkpoint)
    maps, cfg = attention_maps(model, IDS), model.cfg
    sunk = 1 - maps.sum(-1)
    assert sunk.min() > 1e-4 if cfg.use_attention_sinks else sunk.abs().max() < 1e-5
    assert not maps.triu(1).any()
    assert bool(maps.tril(-5).any()) == (cfg.sliding_window is None)


# ---- in the files of others ----------------------------------------------------------------------


@torch.no_grad()
def test_a_hugging_face_folder_has_the_same_logits_or_is_refused(chain, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="it has to open what we write: pip install 'modern_llm[hub]'")
    checkpoint, cfg = chain["grpo"].checkpoint, chain["grpo"].config.model
    if cfg.num_experts and cfg.use_qk_norm and cfg.use_attention_sinks:
        with pytest.raises(ExportError, match="model.use_attention_sinks=true has no counterpart"):
            export_model(checkpoint, tmp_path / "out")
        return
    export_model(checkpoint, tmp_path / "out")
    if cfg.use_attention_sinks and not hasattr(transformers, "GraniteSWAForCausalLM"):
        pytest.skip(f"this transformers, {transformers.__version__}, has no learned sinks")
    logits = load_model(checkpoint).eval()(IDS)
    known = read_json(checkpoint / "config.json")["model_type"] != "modern_llm"
    for folder in [tmp_path / "out", *[checkpoint] * known]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert (theirs(IDS).logits - logits).abs().max() < 1e-4 * logits.abs().max()


def test_a_gguf_file_has_the_same_weights_or_is_refused(chain, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install 'modern_llm[baselines]'")
    checkpoint, cfg = chain["grpo"].checkpoint, chain["grpo"].config.model
    refused = [option for option, on in (
        ("num_experts", cfg.num_experts), ("use_attention_sinks", cfg.use_attention_sinks),
        ("sliding_window", cfg.sliding_window), ("rope_scaling", cfg.rope_factor > 1)) if on]
    if refused:
        with pytest.raises(ExportError, match=f"model.{refused[0]}.* not written as GGUF"):
            export_gguf(checkpoint, tmp_path / "model.gguf", "fp32")
        assert not list(tmp_path.iterdir())
        return
    export_gguf(checkpoint, tmp_path / "model.gguf", "fp32")
    model, written = load_model(checkpoint), gguf.GGUFReader(tmp_path / "model.gguf").tensors
    squares = lambda values: sorted(float((value.astype("float64") ** 2).sum()) for value in values)
    own = [model.state_dict()[name].numpy() for name in disk_names(model).values()]
    assert squares(tensor.data for tensor in written) == pytest.approx(squares(own), rel=1e-9)
