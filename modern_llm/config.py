"""Every knob of the laboratory on one page: what it is called, its unit, its default.

A *preset* is a function that returns a complete `PipelineConfig`; a variant is `dataclasses.replace`. This module is a
leaf: it imports neither torch nor anything of the package, so that a login node can plan a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("wsd", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PREFERENCE_LOSSES = ("sigmoid", "ipo")
REPLAY_SOURCES = ("text", "synthetic", "synthetic-problems", "gsm8k")
VERIFIER_KINDS = ("generator", "encoder")
STRATEGIES = ("ddp", "fsdp")


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the value, the place and the remedy."""


def nearest(value: str, options: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, else the list of valid ones."""
    options = list(options)
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(options)}"


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise ConfigError(message)


def _one_of(place: str, value: str, options: tuple[str, ...]) -> None:
    _require(value in options, f"{place}={value!r} is unknown{nearest(str(value), options)}")


def _positive(place: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{place}.{name}={value} must be greater than 0, and finite")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Read by chapters 00–02."""

    vocab_size: int = 512  # rows of the embedding; at least the tokenizer's size, padded to a round number
    context_length: int = 256  # tokens the model is trained on at once
    width: int = 128  # size c of the residual stream
    num_layers: int = 4
    num_heads: int = 4  # query heads h
    num_kv_heads: int = 2  # key/value groups g; equal to num_heads is plain multi-head attention
    head_dim: int | None = None  # channels of a head, where they are not width / num_heads
    ffn_width: int = 384  # hidden size of SwiGLU
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0  # over 1: the slow wavelengths are so many times longer, for contexts beyond rope_trained_context
    rope_trained_context: int = 8192  # tokens
    norm_eps: float = 1e-5
    use_qk_norm: bool = True  # RMSNorm on queries and keys before the rotation
    use_attention_sinks: bool = False  # one learned logit a head that takes softmax mass
    sliding_window: int | None = None  # keys visible to a query, itself included; None = all before it
    num_experts: int = 0  # 0 = dense SwiGLU, else a mixture of experts in every layer
    experts_per_token: int = 2
    balance_loss_weight: float = 0.01  # load-balancing loss of the router
    router_z_loss_weight: float = 0.001
    dropout: float = 0.0  # on the residual branches, in training
    tie_embeddings: bool = True
    init_std: float = 0.02  # of every matrix; output projections start at 0 when zero_init_outputs
    zero_init_outputs: bool = True

    def __post_init__(self) -> None:
        _positive("model", self, "vocab_size", "context_length", "width", "num_layers", "num_heads", "num_kv_heads",
                  "ffn_width", "rope_theta", "rope_trained_context", "norm_eps", "init_std")
        _require(self.head_dim is None or self.head_dim > 0, f"model.head_dim={self.head_dim} must be at least 2, or null for width/num_heads")
        _require(self.head_dim is not None or self.width % self.num_heads == 0,
                 f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
                 f"use one of {[h for h in range(1, self.width + 1) if self.width % (2 * h) == 0][-8:]}")
        _require(1 <= self.rope_factor < math.inf, f"model.rope_factor={self.rope_factor} must be at least 1, which changes nothing")
        _require(self.head_width % 2 == 0,
                 f"model.{'head_dim' if self.head_dim else 'width/num_heads'}={self.head_width} is odd; rotary embedding turns pairs of channels")
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}; "
                 f"use one of {[g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]}")
        _require(self.num_experts == 0 or 1 <= self.experts_per_token <= self.num_experts,
                 f"model.experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}")
        _require(self.sliding_window is None or self.sliding_window > 0,
                 f"model.sliding_window={self.sliding_window} must be at least 1, or null for full attention")
        _require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must lie in [0, 1)")

    @property
    def head_width(self) -> int:
        """Channels d of one attention head."""
        return self.head_dim or self.width // self.num_heads


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. Read by chapter 02a."""

    sources: tuple[str, ...] = ("synthetic",)  # names of DATASET_REGISTRY
    tokenizer: str = "bpe"  # "bpe" = byte-level BPE trained on the sources; "gpt2" = GPT-2's
    tokenizer_vocab_size: int = 512  # for "bpe"; special tokens included
    max_train_tokens: int | None = None  # a source; None = all of it
    max_validation_tokens: int = 100_000  # a source
    isolate_documents: bool = False  # attention stops at document boundaries inside a packed row
    world_seed: int = 0  # the synthetic world: who lives where, owns which pet …

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources is empty; name at least one, for example 'synthetic'")
        _one_of("data.tokenizer", self.tokenizer, ("bpe", "gpt2"))
        _require(self.tokenizer_vocab_size >= 300,
                 f"data.tokenizer_vocab_size={self.tokenizer_vocab_size} is under 300: 256 bytes and the special tokens")
        _require(self.max_train_tokens is None or self.max_train_tokens > 0,
                 f"data.max_train_tokens={self.max_train_tokens} must be greater than 0, or null for everything")
        _positive("data", self, "max_validation_tokens")


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run. Read by chapter 03; every stage has one."""

    max_steps: int = 500  # optimizer steps
    max_minutes: float | None = None  # stop (and finish the decay) by this wall-clock time
    batch_size: int = 32  # sequences per optimizer step, over all devices
    micro_batch_size: int | None = None  # sequences per forward pass; None = batch_size
    optimizer: str = "muon"  # "muon" = Muon on block matrices, AdamW on the rest; "adamw" = AdamW on all
    lr: float = 3e-3  # peak of AdamW
    muon_lr: float = 2e-2  # peak of Muon
    weight_decay: float = 0.1  # decoupled; matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "wsd"  # "wsd" = warmup, stable, linear decay; "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.5  # share of the run that decays ("wsd")
    final_lr_fraction: float = 0.0  # of the peak, at the end
    grad_clip: float = 1.0  # global norm; 0 = off
    precision: str = "auto"  # "auto" = bf16 where the device has it, else fp16 on other GPUs, fp32 on CPUs
    compile: bool = False
    gradient_checkpointing: bool = False  # recompute block activations in the backward pass
    loss_chunk_tokens: int = 4096  # tokens whose logits exist at once
    ema_decay: float | None = None  # exponential moving average of the weights, used for validation and saving
    log_every: int = 10  # steps
    eval_every: int = 100  # steps
    checkpoint_every: int = 250  # steps
    keep_checkpoints: int = 3  # weights kept along the way, evenly spaced, besides the last

    def __post_init__(self) -> None:
        place = type(self).__name__.removesuffix("Config").lower()  # the stages' configs inherit these checks
        _positive(place, self, "max_steps", "batch_size", "lr", "muon_lr", "log_every", "eval_every",
                  "checkpoint_every", "loss_chunk_tokens")
        _one_of(f"{place}.optimizer", self.optimizer, OPTIMIZERS)
        _one_of(f"{place}.schedule", self.schedule, SCHEDULES)
        _one_of(f"{place}.precision", self.precision, PRECISIONS)
        _require(self.micro_batch_size is None or self.micro_batch_size > 0,
                 f"{place}.micro_batch_size={self.micro_batch_size} must be greater than 0, or null for the whole batch")
        _require(self.batch_size % self.micro_batch == 0,
                 f"{place}.micro_batch_size={self.micro_batch} does not divide {place}.batch_size={self.batch_size}")
        _require(self.max_minutes is None or self.max_minutes > 0,
                 f"{place}.max_minutes={self.max_minutes} must be greater than 0, or null for no limit")
        _require(all(0 <= beta < 1 for beta in self.betas), f"{place}.betas={list(self.betas)} must lie in [0, 1)")
        for name, high in (("decay_fraction", 1.0), ("final_lr_fraction", 1.0), ("ema_decay", 0.999999)):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= high, f"{place}.{name}={value} must lie in [0, {high}]")
        for name in ("weight_decay", "grad_clip", "warmup_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 0, f"{place}.{name}={getattr(self, name)} must not be negative")

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Instruction tuning: the settings of its optimisation and what it reads. Read by chapter 04."""

    sources: tuple[str, ...] = ("synthetic", "synthetic-problems")  # of instructions; names of chapter 04
    weights: tuple[float, ...] = (0.5, 0.5)  # share of the examples drawn from each source
    replay_fraction: float = 0.1  # share of the rows that are pretraining text
    max_train_examples: int = 20_000  # a source
    max_validation_examples: int = 300  # a source

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.sources) > 0, "sft.sources is empty; name at least one, for example 'synthetic'")
        _require(len(self.sources) == len(self.weights),
                 f"sft.weights={list(self.weights)} must have one number for each of sft.sources={list(self.sources)}")
        _require(all(0 < w < math.inf for w in self.weights), f"sft.weights={list(self.weights)} must be greater than 0")
        _require(0 <= self.replay_fraction < 1, f"sft.replay_fraction={self.replay_fraction} must lie in [0, 1)")
        _positive("sft", self, "max_train_examples", "max_validation_examples")


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation; a row of a batch is a pair. Read by chapter 05."""

    sources: tuple[str, ...] = ("synthetic",)  # of preference pairs
    loss: str = "sigmoid"  # "sigmoid" = DPO, "ipo"
    beta: float = 0.1  # strength of the pull back to the reference
    label_smoothing: float = 0.0  # share of pairs believed to be labelled the wrong way round (cDPO)
    length_normalised: bool = False  # log-probability per token instead of per answer
    sft_weight: float = 0.0  # weight of the chosen answer's negative log-probability per token
    replay_weight: float = 0.0  # weight of the nats per token of a row of earlier examples that goes along with every pair
    replay_sources: tuple[str, ...] = ("text",)  # in equal parts; "text" (pretraining), "synthetic", "synthetic-problems", "gsm8k"
    max_train_pairs: int = 5_000  # a source
    max_validation_pairs: int = 200  # a source
    max_new_tokens: int = 128  # of the model's own answers to held-out prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.sources) > 0, "dpo.sources is empty; name at least one, for example 'synthetic'")
        _one_of("dpo.loss", self.loss, PREFERENCE_LOSSES)
        _positive("dpo", self, "beta", "max_train_pairs", "max_validation_pairs", "max_new_tokens")
        _require(0 <= self.label_smoothing < 0.5, f"dpo.label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        _require(self.loss == "sigmoid" or self.label_smoothing == 0, "dpo.label_smoothing is for dpo.loss='sigmoid'")
        for name in ("sft_weight", "replay_weight"):
            _require(getattr(self, name) >= 0, f"dpo.{name}={getattr(self, name)} must not be negative")
        _require(len(self.replay_sources) > 0, "dpo.replay_sources is empty; to replay nothing say dpo.replay_weight=0")
        for name in self.replay_sources:
            _one_of("dpo.replay_sources", name, REPLAY_SOURCES)


@dataclass(frozen=True)
class VerifierConfig(TrainConfig):
    """The verifier: whose answers it learns from, and how it is trained. Read by chapter 06."""

    kind: str = "generator"  # "generator" = starts from the generator's weights; "encoder" = a small one from scratch
    problems: str = "synthetic"  # source of word problems: "synthetic" or "gsm8k"
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the synthetic problems
    train_problems: int = 300
    validation_problems: int = 100
    samples_per_problem: int = 16  # the generator's own answers to each training problem
    validation_samples: int = 16  # to each held-out problem
    temperature: float = 1.0  # of those answers
    max_new_tokens: int = 128
    perturbed_fraction: float = 0.2  # share of the training answers that are gold ones, half of them spoilt
    gold_fraction: float = 0.0  # share of the rows that are gold answers for the language model alone
    lm_weight: float = 0.5  # of the joint language-model loss on right answers
    head_dropout: float = 0.1  # on the hidden state that the score is read from
    surprise: bool = True  # the score also reads how unlikely the verifier's own language model finds the answer so far
    gold_problems: int = 3_000  # further training problems whose gold answers, whole and spoilt, are mixed in
    comparison_steps: int = 0  # steps that the variants on the page are trained for; 0 = no variants

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("verifier.kind", self.kind, VERIFIER_KINDS)
        _one_of("verifier.problems", self.problems, ("synthetic", "gsm8k"))
        _positive("verifier", self, "train_problems", "validation_problems", "samples_per_problem",
                  "validation_samples", "temperature", "max_new_tokens")
        for name in ("perturbed_fraction", "gold_fraction", "head_dropout"):
            _require(0 <= getattr(self, name) < 1, f"verifier.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("lm_weight", "gold_problems", "comparison_steps"):
            _require(getattr(self, name) >= 0, f"verifier.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, on how many items. Read by chapter 07."""

    problems: str = "synthetic"  # word problems: "synthetic" or "gsm8k"
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the synthetic problems, equally many each
    num_problems: int = 250
    problem_shots: int = 1  # solved examples in front of a base model's problem, as far as they fit
    sampled_levels: tuple[int, ...] = (2, 3, 4)  # the synthetic problems that are sampled from: those of middle difficulty
    sampled_problems: int = 150  # at most so many
    samples_per_problem: int = 16  # for pass@k, majority@k and the verifier
    temperature: float = 1.0  # of the samples
    max_new_tokens: int = 128
    batch_rows: int = 256  # answers written at once
    sentiment: str = "synthetic"  # "synthetic" or "sst2"
    num_sentences: int = 200
    shots: tuple[int, ...] = (0, 1, 4)  # demonstrations in front of each sentence, as far as they fit; the last one is the headline
    draws: int = 5  # sets of demonstrations for each number of shots
    num_instructions: int = 200  # built-in instructions, where the preset trains on them
    num_pairs: int = 200  # preference pairs, from dpo.sources
    max_perplexity_tokens: int = 100_000  # a source
    protocol_sources: tuple[str, ...] = ("text",)  # scored in the protocols T0 to T3; "text": data.sources
    protocol_tokens: int = 20_000  # a source, of T1 to T3
    baselines: tuple[str, ...] = ()  # other models, measured alike: folders, GGUF files, or names in the hub's local cache
    overlap_words: int = 13  # n of the n-grams that training text and evaluation items are compared by; 0 = not compared
    overlap_documents: int = 20_000  # of each training source that are read for that

    def __post_init__(self) -> None:
        _one_of("eval.problems", self.problems, ("synthetic", "gsm8k"))
        _one_of("eval.sentiment", self.sentiment, ("synthetic", "sst2"))
        _positive("eval", self, "num_problems", "samples_per_problem", "sampled_problems", "temperature", "max_new_tokens",
                  "batch_rows", "num_sentences", "num_instructions", "num_pairs", "max_perplexity_tokens")
        _positive("eval", self, "draws", "protocol_tokens", "overlap_documents")
        _require(len(self.shots) > 0 and min(self.shots) >= 0, f"eval.shots={list(self.shots)} must be numbers from 0 on, at least one")
        for name in ("problem_shots", "overlap_words"):
            _require(getattr(self, name) >= 0, f"eval.{name}={getattr(self, name)} must not be negative")
        for name in ("levels", "sampled_levels"):
            _require(set(getattr(self, name)) <= {1, 2, 3, 4, 5} and len(getattr(self, name)) > 0,
                     f"eval.{name}={list(getattr(self, name))} must name some of the levels 1 to 5")


@dataclass(frozen=True)
class HardwareConfig:
    """What a preset was sized for; checked before anything starts."""

    device: str = "auto"  # "auto" = cuda, else mps, else cpu
    min_gpu_memory_gb: float = 0.0  # 0 = a CPU will do
    needs_bf16: bool = False
    ranks: int = 1  # processes that train together, one a GPU where there are GPUs; each takes an equal share of every batch
    strategy: str = "ddp"  # "ddp" = the whole model on every rank; "fsdp" = weights, gradients and optimizer states divided

    def __post_init__(self) -> None:
        _require(self.ranks >= 1, f"hardware.ranks={self.ranks} must be at least 1")
        _one_of("hardware.strategy", self.strategy, STRATEGIES)
        _require(self.device.split(":")[0] in ("auto", "cpu", "cuda", "mps"),
                 f"hardware.device={self.device!r} is unknown{nearest(self.device, ('auto', 'cpu', 'cuda', 'mps'))}")


@dataclass(frozen=True)
class PipelineConfig:
    """A whole run: what is trained, on what, how, and where."""

    name: str = "local-smoke"
    description: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    start_from: str = ""  # a model from elsewhere instead of pretraining: a folder, a GGUF file, or a name in the hub's local cache
    seed: int = 0

    def __post_init__(self) -> None:
        for stage in ("pretrain", "sft", "dpo", "verifier"):
            size = getattr(self, stage).batch_size
            _require(size % self.hardware.ranks == 0,
                     f"hardware.ranks={self.hardware.ranks} does not divide {stage}.batch_size={size}; "
                     f"use one of {[r for r in range(1, size + 1) if size % r == 0]}, or another batch size")
        _require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in 0..2**63 - 1")
        if self.data.tokenizer == "bpe":
            _require(self.data.tokenizer_vocab_size <= self.model.vocab_size,
                     f"data.tokenizer_vocab_size={self.data.tokenizer_vocab_size} exceeds "
                     f"model.vocab_size={self.model.vocab_size}: raise the latter")
        else:
            _require(self.model.vocab_size >= GPT2_VOCAB_SIZE,
                     f"model.vocab_size={self.model.vocab_size} is under the {GPT2_VOCAB_SIZE} of data.tokenizer='gpt2' "
                     "with its chat tokens: use 50304")


GPT2_VOCAB_SIZE = 50_261  # 50,257 of GPT-2 and four chat tokens


# ---- presets ---------------------------------------------------------------------------------------------------------


def lesson() -> PipelineConfig:
    return PipelineConfig(
        name="lesson",
        description="0.2M parameters on the built-in world: what a stage notebook runs when opened, under 30 seconds",
        model=ModelConfig(context_length=128, width=64, num_layers=3, num_heads=2, num_kv_heads=1, ffn_width=192),
        data=DataConfig(max_train_tokens=300_000, max_validation_tokens=10_000),
        pretrain=TrainConfig(max_steps=120, batch_size=16, warmup_steps=5, eval_every=20, checkpoint_every=40),
        sft=SFTConfig(max_steps=100, batch_size=8, lr=2e-3, muon_lr=1e-2, warmup_steps=5, decay_fraction=0.6, eval_every=20,
                      checkpoint_every=50, weights=(0.7, 0.3), replay_fraction=0.2, max_train_examples=2000,
                      max_validation_examples=40),
        dpo=DPOConfig(max_steps=30, batch_size=8, optimizer="adamw", lr=1e-3, weight_decay=0.0, warmup_steps=3, log_every=1,
                      eval_every=10, checkpoint_every=10, keep_checkpoints=0, sft_weight=1.0, replay_weight=1.0,
                      replay_sources=("text", "synthetic", "synthetic-problems"), max_train_pairs=240, max_validation_pairs=60,
                      max_new_tokens=40),
        verifier=VerifierConfig(levels=(1, 2, 3), max_steps=20, batch_size=8, lr=2e-3, muon_lr=1e-2, warmup_steps=2, log_every=2,
                                perturbed_fraction=0.6, lm_weight=2.0, eval_every=10, checkpoint_every=10, keep_checkpoints=0,
                                train_problems=40, validation_problems=30, samples_per_problem=4, validation_samples=8,
                                max_new_tokens=80, gold_problems=200, comparison_steps=20),
        eval=EvalConfig(levels=(1, 2, 3), num_problems=30, sampled_levels=(1, 2, 3), sampled_problems=18, samples_per_problem=4,
                        max_new_tokens=72, num_sentences=30, shots=(0, 1), draws=3, num_instructions=30, num_pairs=30,
                        max_perplexity_tokens=10_000, protocol_tokens=5000, overlap_documents=2000),
    )


def local_smoke() -> PipelineConfig:
    return PipelineConfig(
        name="local-smoke",
        description="about 1M parameters on the built-in world: minutes on 2 CPU cores, no network",
        data=DataConfig(max_train_tokens=2_000_000, max_validation_tokens=40_000),
        pretrain=TrainConfig(max_steps=300, batch_size=16, lr=4e-3, muon_lr=3e-2, eval_every=60, checkpoint_every=60),
        sft=SFTConfig(weights=(0.6, 0.4), replay_fraction=0.15, max_steps=220, batch_size=16, warmup_steps=10, decay_fraction=0.6,
                      eval_every=100, checkpoint_every=50, keep_checkpoints=0, max_train_examples=8000,
                      max_validation_examples=120),
        dpo=DPOConfig(max_steps=100, batch_size=8, optimizer="adamw", lr=4e-4, weight_decay=0.0, warmup_steps=10, log_every=1,
                      eval_every=50, checkpoint_every=25, keep_checkpoints=0, sft_weight=6.0, replay_weight=4.0,
                      replay_sources=("text", "synthetic", "synthetic-problems"), max_train_pairs=800, max_new_tokens=40),
        verifier=VerifierConfig(levels=(2, 3, 4), max_steps=120, batch_size=16, warmup_steps=10, decay_fraction=0.6, eval_every=60,
                                checkpoint_every=40, keep_checkpoints=0, train_problems=120, validation_problems=120,
                                samples_per_problem=8, temperature=0.7, max_new_tokens=112, perturbed_fraction=0.2,
                                gold_problems=4000, gold_fraction=0.75, lm_weight=20.0),
        eval=EvalConfig(batch_rows=512, temperature=0.7, num_sentences=120, shots=(0, 4), draws=3, max_perplexity_tokens=40_000),
    )


def local_cpu() -> PipelineConfig:
    return PipelineConfig(
        name="local-cpu",
        description="6M parameters on WikiText-2 and TinyStories on 2 CPU cores",
        model=ModelConfig(vocab_size=4096, width=256, num_layers=6, num_kv_heads=2, ffn_width=768),
        data=DataConfig(sources=("wikitext-2-raw-v1", "tinystories"), tokenizer_vocab_size=4096),
        pretrain=TrainConfig(max_steps=2000, max_minutes=45, batch_size=16, eval_every=100, checkpoint_every=200),
        sft=SFTConfig(sources=("alpaca", "gsm8k", "sst2"), weights=(0.5, 0.3, 0.2), max_steps=600, max_minutes=15, batch_size=16,
                      lr=2e-3, muon_lr=1e-2, checkpoint_every=200, max_validation_examples=100),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=150, max_minutes=8, batch_size=8, optimizer="adamw", lr=5e-5, weight_decay=0.0,
                      sft_weight=0.1, log_every=5, eval_every=50, checkpoint_every=50, keep_checkpoints=0, max_train_pairs=1200,
                      max_validation_pairs=100),
        verifier=VerifierConfig(problems="gsm8k", max_steps=200, max_minutes=6, batch_size=8, lr=1e-3, muon_lr=5e-3, train_problems=80,
                                validation_problems=40, samples_per_problem=4, validation_samples=8, keep_checkpoints=0),
        eval=EvalConfig(problems="gsm8k", num_problems=100, sampled_problems=24, samples_per_problem=8, sentiment="sst2",
                        num_sentences=100, shots=(0, 4), num_instructions=100, num_pairs=100, max_perplexity_tokens=30_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories")),
    )


def local() -> PipelineConfig:
    return PipelineConfig(
        name="local",
        description="114M parameters on WikiText-2 and TinyStories, about 50M tokens, on one 12 GB GPU",
        model=ModelConfig(vocab_size=50_304, context_length=1024, width=768, num_layers=12, num_heads=12,
                          num_kv_heads=4, ffn_width=2048),
        data=DataConfig(sources=("wikitext-2-raw-v1", "tinystories"), tokenizer="gpt2", max_train_tokens=50_000_000),
        pretrain=TrainConfig(max_steps=1600, batch_size=32, micro_batch_size=4, warmup_steps=50, compile=True,
                             gradient_checkpointing=True),
        sft=SFTConfig(sources=("alpaca", "oasst1", "gsm8k", "sst2"), weights=(0.5, 0.1, 0.2, 0.2), max_train_examples=60_000,
                      max_steps=600, batch_size=32, micro_batch_size=4, lr=1e-3, muon_lr=5e-3, compile=True,
                      gradient_checkpointing=True),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=600, batch_size=32, micro_batch_size=2, optimizer="adamw", lr=2e-6,
                      weight_decay=0.0, eval_every=100, max_train_pairs=20_000, max_new_tokens=256),
        eval=EvalConfig(problems="gsm8k", num_problems=200, problem_shots=4, sampled_problems=50, max_new_tokens=256, batch_rows=64,
                        sentiment="sst2", num_sentences=872, shots=(0, 1, 4, 8), num_pairs=500, max_perplexity_tokens=300_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories"), protocol_tokens=400_000, overlap_documents=2_000_000),
        hardware=HardwareConfig(min_gpu_memory_gb=11),
        verifier=VerifierConfig(problems="gsm8k", max_steps=600, batch_size=32, micro_batch_size=4, lr=3e-4, muon_lr=2e-3, compile=True,
                                gradient_checkpointing=True, train_problems=1500, validation_problems=300, max_new_tokens=256),
    )


def tacc_h100() -> PipelineConfig:
    return PipelineConfig(
        name="tacc-h100",
        description="253M parameters, 5.2B tokens of WikiText-103 and TinyStories: the published run, one 80 GB H100",
        model=ModelConfig(vocab_size=50_304, context_length=1024, width=1024, num_layers=12, num_heads=16,
                          num_kv_heads=16, ffn_width=4096),
        data=DataConfig(sources=("wikitext-103-raw-v1", "tinystories"), tokenizer="gpt2",
                        max_validation_tokens=300_000),
        pretrain=TrainConfig(max_steps=40_000, batch_size=128, micro_batch_size=32, warmup_steps=200, compile=True,
                             log_every=20, eval_every=500, checkpoint_every=1000),
        sft=SFTConfig(sources=("alpaca", "oasst1", "gsm8k", "sst2"), weights=(0.5, 0.1, 0.2, 0.2), max_train_examples=60_000,
                      max_steps=5000, batch_size=64, micro_batch_size=32, lr=3e-4, muon_lr=2e-3, warmup_steps=100, compile=True,
                      log_every=20, eval_every=250, checkpoint_every=1000),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=3000, batch_size=64, micro_batch_size=8, optimizer="adamw", lr=1e-6,
                      weight_decay=0.0, warmup_steps=100, eval_every=250, checkpoint_every=500, max_train_pairs=170_000,
                      max_validation_pairs=500, max_new_tokens=256),
        eval=EvalConfig(problems="gsm8k", num_problems=1319, problem_shots=4, sampled_problems=500, samples_per_problem=32,
                        max_new_tokens=256, sentiment="sst2", num_sentences=872, shots=(0, 1, 4, 8), num_pairs=1000,
                        max_perplexity_tokens=300_000, protocol_sources=("wikitext-2-raw-v1", "tinystories"), protocol_tokens=400_000,
                        overlap_documents=10_000_000, baselines=("gpt2", "distilgpt2", "HuggingFaceTB/SmolLM2-135M")),
        hardware=HardwareConfig(min_gpu_memory_gb=70, needs_bf16=True),
        verifier=VerifierConfig(problems="gsm8k", max_steps=3000, batch_size=64, micro_batch_size=16, lr=1e-4, muon_lr=1e-3,
                                warmup_steps=100, compile=True, log_every=20, eval_every=500, checkpoint_every=500,
                                train_problems=7000, validation_problems=400, samples_per_problem=32, validation_samples=32,
                                max_new_tokens=256, head_dropout=0.2),
    )


def tacc_a100() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="tacc-a100",
        description="the tacc-h100 run on one 40 GB A100",
        pretrain=replace(base.pretrain, micro_batch_size=16),
        sft=replace(base.sft, micro_batch_size=16),
        dpo=replace(base.dpo, micro_batch_size=4),
        hardware=replace(base.hardware, min_gpu_memory_gb=38),
        verifier=replace(base.verifier, micro_batch_size=8),
    )


def tacc_smoke() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="tacc-smoke",
        description="every code path of tacc-h100 (bf16, compile, accumulation, resume) on a tiny model, in minutes",
        model=replace(base.model, context_length=256, width=128, num_layers=2, num_heads=4, num_kv_heads=2,
                      ffn_width=384),
        data=replace(base.data, sources=("wikitext-2-raw-v1", "tinystories"), max_train_tokens=500_000,
                     max_validation_tokens=20_000),
        pretrain=replace(base.pretrain, max_steps=40, batch_size=16, micro_batch_size=8, warmup_steps=5, log_every=5,
                         eval_every=20, checkpoint_every=20),
        sft=replace(base.sft, max_steps=20, batch_size=16, micro_batch_size=8, warmup_steps=5, log_every=5, eval_every=10,
                    checkpoint_every=10, max_train_examples=500, max_validation_examples=16),
        dpo=replace(base.dpo, max_steps=20, batch_size=16, micro_batch_size=8, warmup_steps=5, log_every=5, eval_every=10,
                    checkpoint_every=10, max_train_pairs=320, max_validation_pairs=16, max_new_tokens=64),
        eval=replace(base.eval, num_problems=16, problem_shots=1, sampled_problems=4, samples_per_problem=4, max_new_tokens=64,
                     num_sentences=32, shots=(0, 4), draws=2, num_pairs=32, max_perplexity_tokens=20_000, protocol_tokens=5000,
                     overlap_documents=2000, baselines=()),
        hardware=HardwareConfig(min_gpu_memory_gb=8, needs_bf16=True),
        verifier=replace(base.verifier, max_steps=20, batch_size=16, micro_batch_size=8, warmup_steps=5, log_every=5, eval_every=10,
                         checkpoint_every=10, train_problems=20, validation_problems=10, samples_per_problem=4,
                         validation_samples=4, max_new_tokens=64),
    )


def gpu_full() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="gpu-full",
        description="the model of tacc-h100 with the original AdamW recipe, kept for comparison",
        model=replace(base.model, use_qk_norm=False, zero_init_outputs=False),
        pretrain=replace(base.pretrain, optimizer="adamw", lr=3e-4, schedule="cosine", warmup_steps=2000,
                         final_lr_fraction=0.1),
        sft=replace(base.sft, optimizer="adamw", lr=1e-4, schedule="cosine"),
    )


def h100_speedrun() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="h100-speedrun",
        description="the best 253M model one H100 or H200 makes in 60 minutes",
        pretrain=replace(base.pretrain, max_minutes=60, max_steps=6000, warmup_steps=100, ema_decay=0.998),
        sft=replace(base.sft, max_steps=600, max_minutes=6),
        dpo=replace(base.dpo, max_steps=300, max_minutes=4, max_train_pairs=20_000),
    )


def smollm2_135m() -> PipelineConfig:
    return PipelineConfig(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct, tuned further on the built-in world instead of pretraining; a CPU will do",
        model=ModelConfig(vocab_size=49_152, context_length=512, width=576, num_layers=30, num_heads=9, num_kv_heads=3, ffn_width=1536,
                          rope_theta=100_000.0, use_qk_norm=False),
        data=DataConfig(max_train_tokens=500_000, max_validation_tokens=10_000),
        pretrain=TrainConfig(batch_size=8, micro_batch_size=1, loss_chunk_tokens=512),  # left out
        sft=SFTConfig(max_steps=100, batch_size=8, micro_batch_size=1, optimizer="adamw", lr=5e-5, weight_decay=0.0, warmup_steps=5,
                      loss_chunk_tokens=512, log_every=1, eval_every=50, checkpoint_every=25, keep_checkpoints=0,
                      max_train_examples=2000, max_validation_examples=20),
        dpo=DPOConfig(max_steps=50, batch_size=8, micro_batch_size=1, optimizer="adamw", lr=5e-6, weight_decay=0.0, warmup_steps=5,
                      loss_chunk_tokens=512, log_every=1, eval_every=25, checkpoint_every=25, keep_checkpoints=0, sft_weight=1.0,
                      max_train_pairs=200, max_validation_pairs=20, max_new_tokens=40),
        verifier=VerifierConfig(levels=(1, 2, 3), max_steps=30, batch_size=8, micro_batch_size=1, optimizer="adamw", lr=2e-5,
                                weight_decay=0.0, warmup_steps=3, loss_chunk_tokens=512, log_every=1, eval_every=15, checkpoint_every=15,
                                keep_checkpoints=0, train_problems=20, validation_problems=20, samples_per_problem=4,
                                validation_samples=8, max_new_tokens=96, gold_problems=200),
        eval=EvalConfig(num_problems=40, sampled_problems=12, samples_per_problem=4, max_new_tokens=96, batch_rows=32, num_sentences=40,
                        shots=(0, 4), draws=2, num_instructions=40, num_pairs=20, max_perplexity_tokens=10_000, protocol_tokens=3000,
                        overlap_documents=2000),
        start_from="HuggingFaceTB/SmolLM2-135M-Instruct",
    )


PRESETS: dict[str, typing.Callable[[], PipelineConfig]] = {
    "lesson": lesson,
    "local-smoke": local_smoke,
    "local-cpu": local_cpu,
    "local": local,
    "tacc-smoke": tacc_smoke,
    "tacc-a100": tacc_a100,
    "tacc-h100": tacc_h100,
    "gpu-full": gpu_full,
    "h100-speedrun": h100_speedrun,
    "smollm2-135m": smollm2_135m,
}
ALIASES = {"local-rtx3060": "local", "tacc": "tacc-h100"}


def get_pipeline_preset(name_or_path: str = "local-smoke") -> PipelineConfig:
    """The preset of that name (or alias), or the one a JSON file describes.

    A JSON file has the shape of `to_dict`; keys left out keep the default, or the value of the preset that its
    key `base` names. Raises ConfigError naming the nearest valid name or key.
    """
    name = ALIASES.get(name_or_path, name_or_path)
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name_or_path).expanduser()
    if path.suffix != ".json" and not path.is_file():
        raise ConfigError(f"unknown preset {name_or_path!r}{nearest(name_or_path, [*PRESETS, *ALIASES])}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"preset file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"preset file {str(path)!r} is not valid JSON: {error}") from error
    _require(isinstance(values, dict), f"preset file {str(path)!r} must hold a JSON object")
    base = values.pop("base", None)
    _require(base is None or isinstance(base, str) and ALIASES.get(base, base) in PRESETS,
             f"{path}: base={base!r} is no preset{nearest(str(base), PRESETS)}")
    start = get_pipeline_preset(base) if base else PipelineConfig(name=path.stem)
    return override(start, values, place=str(path))


def to_dict(config: object) -> dict:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: typing.Any, values: dict, place: str = "") -> typing.Any:
    """A copy of a config dataclass with the (nested) `values` set; unknown keys and wrong types raise ConfigError."""
    hints = typing.get_type_hints(type(config))
    changed = {}
    for key, value in values.items():
        where = f"{place}: {key}" if place and ":" not in place else f"{place}.{key}" if place else key
        _require(key in hints, f"{where} is no setting of {type(config).__name__}{nearest(str(key), hints)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            _require(isinstance(value, dict), f"{where}={value!r} must be a JSON object of {type(current).__name__}")
            changed[key] = override(current, value, where)
        else:
            changed[key] = _checked(where, value, hints[key])
    return replace(config, **changed)


def _checked(place: str, value: typing.Any, hint: typing.Any) -> typing.Any:
    """`value` as the annotated type says, without silent conversions other than int → float and list → tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _checked(place, value, next(option for option in options if option is not type(None)))
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        _require(len(inner) == len(value), f"{place}={value!r} must have {len(inner)} entries")
        return tuple(_checked(f"{place}[{i}]", v, h) for i, (v, h) in enumerate(zip(value, inner)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or hint
    name = {tuple: "a list"}.get(wanted, getattr(wanted, "__name__", str(wanted)))
    ok = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    _require(ok, f"{place}={value!r} is {type(value).__name__}, should be {name}")
    return value
