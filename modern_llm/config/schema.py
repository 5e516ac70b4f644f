"""Every knob of the laboratory on one page: what it is called, its unit, its default.

A variant of a config is `dataclasses.replace`; complete ones, the presets, are in `presets`. This
module imports neither torch nor anything but the names of the data sets, so that a login node can
plan a run.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from modern_llm.messages import UserError

from modern_llm.config.datasets import CHAT_KINDS, columns_of, names_of

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("wsd", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PREFERENCE_LOSSES = ("sigmoid", "ipo")
VERIFIER_KINDS = ("generator", "encoder")
STRATEGIES = ("ddp", "fsdp")


class ConfigError(UserError, ValueError):
    """A setting that cannot be used. The message names the value, the place and the remedy."""


def nearest(value: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, else the list of valid ones."""
    options = list(options)
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(options)}"


def require(claim: bool, message: str) -> None:
    """Raise ConfigError with the message if the claim is false."""
    if not claim:
        raise ConfigError(message)


def device_parts(place: str, name: str) -> tuple[str, int | None]:
    """What a device is called, taken apart: kind and number, None where it has none. ConfigError if
    it is not a name of a device.
    """
    found = re.fullmatch(r"(auto|cpu|mps|cuda)|(cpu|mps):(0)|(cuda):(0|[1-9][0-9]{0,3})", name)
    require(found is not None,
            f"{place}={name!r} is unknown: say auto (the best there is), cpu, mps (Apple silicon), "
            "cuda (an NVIDIA or AMD GPU), or cuda:1 for the second of several GPUs")
    kind, *number = filter(None, found.groups())
    return kind, int(number[0]) if number else None


def _divisors(number: int, times: int = 1) -> list[int]:
    """What divides a number, also when multiplied by `times`: those up to 1024."""
    return [n for n in range(1, min(number, 1024) + 1) if number % (times * n) == 0]


def _sources(section: str, names: tuple[str, ...], *kinds: str) -> None:
    require(len(names) > 0,
            f"{section}.sources is empty; name at least one, for example 'synthetic'")
    require(len(set(names)) == len(names), f"{section}.sources={list(names)} names a source twice")
    if kinds:
        valid, (own, columns) = names_of(*kinds), columns_of(kinds[0])
        for name in names:
            require(name in valid,
                    f"{section}.sources={name!r} is unknown{nearest(name, valid)}; rows of your "
                    f"own, with {columns}, are read from $MODERN_LLM_DATA/{own}/train.jsonl by the "
                    f"name {own!r}")


def _one_of(place: str, value: str, options: tuple[str, ...]) -> None:
    require(value in options, f"{place}={value!r} is unknown{nearest(str(value), options)}")


def _positive(place: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{place}.{name}={value} must be greater than 0, and finite")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Read by chapters 00–02."""

    # rows of the embedding; at least the tokenizer's size, padded to a round number
    vocab_size: int = 512
    context_length: int = 256  # tokens the model is trained on at once
    width: int = 128  # size c of the residual stream
    num_layers: int = 4
    num_heads: int = 4  # query heads h
    num_kv_heads: int = 2  # key/value groups g; equal to num_heads is plain multi-head attention
    head_dim: int | None = None  # channels of a head, where they are not width / num_heads
    ffn_width: int = 384  # hidden size of SwiGLU
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    # over 1: the slow wavelengths are so many times longer, for contexts beyond
    # rope_trained_context
    rope_factor: float = 1.0
    rope_trained_context: int = 8192  # tokens
    norm_eps: float = 1e-5
    use_qk_norm: bool = True  # RMSNorm on queries and keys before the rotation
    use_attention_sinks: bool = False  # one learned logit per head that takes softmax mass
    # keys visible to a query, itself included; None = all before it
    sliding_window: int | None = None
    num_experts: int = 0  # 0 = dense SwiGLU, else a mixture of experts in every layer
    experts_per_token: int = 2
    balance_loss_weight: float = 0.01  # load-balancing loss of the router
    router_z_loss_weight: float = 0.001
    dropout: float = 0.0  # on the residual branches, in training
    tie_embeddings: bool = True
    init_std: float = 0.02  # of every matrix; output projections start at 0 when zero_init_outputs
    zero_init_outputs: bool = True

    def __post_init__(self) -> None:
        _positive("model", self, "vocab_size", "context_length", "width", "num_layers", "num_heads",
                  "num_kv_heads", "ffn_width", "rope_theta", "rope_trained_context", "norm_eps",
                  "init_std")
        require(self.head_dim is None or self.head_dim > 0,
                f"model.head_dim={self.head_dim} must be at least 2, or null for width/num_heads")
        require(self.head_dim is not None or self.width % self.num_heads == 0,
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
                f"use one of {_divisors(self.width, 2)[-8:]}")
        require(1 <= self.rope_factor < math.inf,
                f"model.rope_factor={self.rope_factor} must be at least 1, which changes nothing")
        require(self.head_width % 2 == 0,
                f"model.{'head_dim' if self.head_dim else 'width/num_heads'}={self.head_width} is "
                "odd; rotary embedding turns pairs of channels")
        require(self.num_heads % self.num_kv_heads == 0,
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}; use one of {_divisors(self.num_heads)}")
        require(self.num_experts == 0 or 1 <= self.experts_per_token <= self.num_experts,
                f"model.experts_per_token={self.experts_per_token} must lie in "
                f"1..num_experts={self.num_experts}")
        require(self.sliding_window is None or self.sliding_window > 0,
                f"model.sliding_window={self.sliding_window} must be at least 1, or null for full "
                "attention")
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must lie in [0, 1)")

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
        _sources("data", self.sources)
        _one_of("data.tokenizer", self.tokenizer, ("bpe", "gpt2"))
        require(self.tokenizer_vocab_size >= 300,
                f"data.tokenizer_vocab_size={self.tokenizer_vocab_size} is under 300: 256 bytes "
                "and the special tokens")
        require(self.max_train_tokens is None or self.max_train_tokens > 0,
                f"data.max_train_tokens={self.max_train_tokens} must be greater than 0, or null "
                "for everything")
        _positive("data", self, "max_validation_tokens")


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run. Read by chapter 03; every stage has one."""

    max_steps: int = 500  # optimizer steps
    max_minutes: float | None = None  # stop (and finish the decay) by this wall-clock time
    batch_size: int = 32  # sequences per optimizer step, over all devices
    micro_batch_size: int | None = None  # sequences per forward pass; None = batch_size
    # "muon" = Muon on block matrices, AdamW on the rest; "adamw" = AdamW on all
    optimizer: str = "muon"
    lr: float = 3e-3  # peak of AdamW
    muon_lr: float = 2e-2  # peak of Muon
    weight_decay: float = 0.1  # decoupled; matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "wsd"  # "wsd" = warmup, stable, linear decay; "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.5  # share of the run that decays ("wsd")
    final_lr_fraction: float = 0.0  # of the peak, at the end
    grad_clip: float = 1.0  # global norm; 0 = off
    # "auto" = bf16 where the device has it, else fp16 on other GPUs, fp32 on CPUs
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False  # recompute block activations in the backward pass
    loss_chunk_tokens: int = 4096  # tokens whose logits exist at once
    # exponential moving average of the weights, used for validation and saving
    ema_decay: float | None = None
    log_every: int = 10  # steps
    eval_every: int = 100  # steps
    checkpoint_every: int = 250  # steps
    keep_checkpoints: int = 3  # weights kept along the way, evenly spaced, besides the last

    def __post_init__(self) -> None:
        # the stages' configs inherit these checks
        place = type(self).__name__.removesuffix("Config").lower().replace("train", "pretrain")
        _positive(place, self, "max_steps", "batch_size", "lr", "muon_lr", "log_every",
                  "eval_every", "checkpoint_every", "loss_chunk_tokens")
        _one_of(f"{place}.optimizer", self.optimizer, OPTIMIZERS)
        _one_of(f"{place}.schedule", self.schedule, SCHEDULES)
        _one_of(f"{place}.precision", self.precision, PRECISIONS)
        require(self.micro_batch_size is None or self.micro_batch_size > 0,
                f"{place}.micro_batch_size={self.micro_batch_size} must be greater than 0, or null "
                "for the whole batch")
        require(self.batch_size % self.micro_batch == 0,
                f"{place}.micro_batch_size={self.micro_batch} does not divide "
                f"{place}.batch_size={self.batch_size}")
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"{place}.max_minutes={self.max_minutes} must be greater than 0, or null for no limit")
        require(all(0 <= beta < 1 for beta in self.betas),
                f"{place}.betas={list(self.betas)} must lie in [0, 1)")
        for name, high in (("decay_fraction", 1.0), ("final_lr_fraction", 1.0),
                           ("ema_decay", 0.999999)):
            value = getattr(self, name)
            require(value is None or 0 <= value <= high,
                    f"{place}.{name}={value} must lie in [0, {high}]")
        for name in ("weight_decay", "grad_clip", "warmup_steps", "keep_checkpoints"):
            require(getattr(self, name) >= 0,
                    f"{place}.{name}={getattr(self, name)} must not be negative")

    @property
    def sequences(self) -> int:
        """Sequences of tokens that a row of a batch is."""
        return 1

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Instruction tuning: the settings of its optimisation and what it reads. Read by chapter 04.
    """

    # of chats, problems or labelled sentences; see config.datasets
    sources: tuple[str, ...] = ("synthetic", "synthetic-problems")
    weights: tuple[float, ...] = (0.5, 0.5)  # share of the examples drawn from each source
    replay_fraction: float = 0.1  # share of the rows that are pretraining text
    max_train_examples: int = 20_000  # a source
    max_validation_examples: int = 300  # a source

    def __post_init__(self) -> None:
        super().__post_init__()
        _sources("sft", self.sources, *CHAT_KINDS)
        require(len(self.sources) == len(self.weights),
                f"sft.weights={list(self.weights)} must have one number for each of "
                f"sft.sources={list(self.sources)}")
        require(all(0 < w < math.inf for w in self.weights),
                f"sft.weights={list(self.weights)} must be greater than 0")
        require(0 <= self.replay_fraction < 1,
                f"sft.replay_fraction={self.replay_fraction} must lie in [0, 1)")
        _positive("sft", self, "max_train_examples", "max_validation_examples")


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation; a row of a batch is a pair. Read by chapter 05."""

    sources: tuple[str, ...] = ("synthetic",)  # of preference pairs
    loss: str = "sigmoid"  # "sigmoid" = DPO, "ipo"
    beta: float = 0.1  # strength of the pull back to the reference
    # share of pairs believed to be labelled the wrong way round (cDPO)
    label_smoothing: float = 0.0
    length_normalised: bool = False  # log-probability per token instead of per answer
    sft_weight: float = 0.0  # weight of the chosen answer's negative log-probability per token
    # weight of the nats per token of a row of earlier examples that goes along with every pair
    replay_weight: float = 0.0
    # in equal parts; "text" (pretraining), and what sft.sources may name
    replay_sources: tuple[str, ...] = ("text",)
    max_train_pairs: int = 5_000  # a source
    max_validation_pairs: int = 200  # a source
    max_new_tokens: int = 128  # of the model's own answers to held-out prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        _sources("dpo", self.sources, "pairs")
        _one_of("dpo.loss", self.loss, PREFERENCE_LOSSES)
        _positive("dpo", self, "beta", "max_train_pairs", "max_validation_pairs", "max_new_tokens")
        require(0 <= self.label_smoothing < 0.5,
                f"dpo.label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        require(self.loss == "sigmoid" or self.label_smoothing == 0,
                "dpo.label_smoothing is for dpo.loss='sigmoid'")
        for name in ("sft_weight", "replay_weight"):
            require(getattr(self, name) >= 0,
                    f"dpo.{name}={getattr(self, name)} must not be negative")
        require(len(self.replay_sources) > 0,
                "dpo.replay_sources is empty; to replay nothing say dpo.replay_weight=0")
        for name in self.replay_sources:
            _one_of("dpo.replay_sources", name, ("text", *names_of(*CHAT_KINDS)))

    @property
    def sequences(self) -> int:
        """The pair, and a third one where something is replayed."""
        return 2 + bool(self.replay_weight)


@dataclass(frozen=True)
class VerifierConfig(TrainConfig):
    """The verifier: whose answers it learns from, and how it is trained. Read by chapter 06."""

    # "generator" = starts from the generator's weights; "encoder" = a small one from scratch
    kind: str = "generator"
    problems: str = "synthetic"  # a data set of word problems
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the synthetic problems
    train_problems: int = 300
    validation_problems: int = 100
    samples_per_problem: int = 16  # the generator's own answers to each training problem
    validation_samples: int = 16  # to each held-out problem
    temperature: float = 1.0  # of those answers
    max_new_tokens: int = 128
    # share of the training answers that are gold ones, half of them spoilt
    perturbed_fraction: float = 0.2
    # share of the rows that are gold answers for the language model alone
    gold_fraction: float = 0.0
    lm_weight: float = 0.5  # of the joint language-model loss on right answers
    head_dropout: float = 0.1  # on the hidden state that the score is read from
    # the score also reads how unlikely the verifier's own language model finds the answer so far
    surprise: bool = True
    # further training problems whose gold answers, whole and spoilt, are mixed in
    gold_problems: int = 3_000
    # steps that the variants on the page are trained for; 0 = no variants
    comparison_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("verifier.kind", self.kind, VERIFIER_KINDS)
        _one_of("verifier.problems", self.problems, names_of("problems"))
        _positive("verifier", self, "train_problems", "validation_problems", "samples_per_problem",
                  "validation_samples", "temperature", "max_new_tokens")
        for name in ("perturbed_fraction", "gold_fraction", "head_dropout"):
            require(0 <= getattr(self, name) < 1,
                    f"verifier.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("lm_weight", "gold_problems", "comparison_steps"):
            require(getattr(self, name) >= 0,
                    f"verifier.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, on how many items. Read by chapter 07."""

    problems: str = "synthetic"  # a data set of word problems
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the synthetic problems, equally many each
    num_problems: int = 250
    problem_shots: int = 1  # solved examples in front of a base model's problem, as far as they fit
    # the synthetic problems that are sampled from: those of middle difficulty
    sampled_levels: tuple[int, ...] = (2, 3, 4)
    sampled_problems: int = 150  # at most so many
    samples_per_problem: int = 16  # for pass@k, majority@k and the verifier
    temperature: float = 1.0  # of the samples
    max_new_tokens: int = 128
    batch_rows: int = 256  # answers written at once
    sentiment: str = "synthetic"  # a data set of labelled sentences
    num_sentences: int = 200
    # demonstrations in front of each sentence, as far as they fit; the last one is the headline
    shots: tuple[int, ...] = (0, 1, 4)
    draws: int = 5  # sets of demonstrations for each number of shots
    num_instructions: int = 200  # built-in instructions, where the preset trains on them
    num_pairs: int = 200  # preference pairs, from dpo.sources
    max_perplexity_tokens: int = 100_000  # a source
    # scored in the protocols T0 to T3; "text": data.sources
    protocol_sources: tuple[str, ...] = ("text",)
    protocol_tokens: int = 20_000  # a source, of T1 to T3
    # other models, measured alike: folders, GGUF files, or names in the hub's local cache
    baselines: tuple[str, ...] = ()
    # n of the n-grams that training text and evaluation items are compared by; 0 = not compared
    overlap_words: int = 13
    overlap_documents: int = 20_000  # of each training source that are read for that

    def __post_init__(self) -> None:
        _one_of("eval.problems", self.problems, names_of("problems"))
        _one_of("eval.sentiment", self.sentiment, names_of("sentences"))
        _positive("eval", self, "num_problems", "samples_per_problem", "sampled_problems",
                  "temperature", "max_new_tokens", "batch_rows", "num_sentences",
                  "num_instructions", "num_pairs", "max_perplexity_tokens")
        _positive("eval", self, "draws", "protocol_tokens", "overlap_documents")
        require(len(self.shots) > 0 and min(self.shots) >= 0,
                f"eval.shots={list(self.shots)} must be numbers from 0 on, at least one")
        for name in ("problem_shots", "overlap_words"):
            require(getattr(self, name) >= 0,
                    f"eval.{name}={getattr(self, name)} must not be negative")
        for name in ("levels", "sampled_levels"):
            require(set(getattr(self, name)) <= {1, 2, 3, 4, 5} and len(getattr(self, name)) > 0,
                    f"eval.{name}={list(getattr(self, name))} must name some of the levels 1 to 5")


@dataclass(frozen=True)
class HardwareConfig:
    """What a preset was sized for; checked before anything starts."""

    device: str = "auto"  # "auto" = cuda, else mps, else cpu
    min_gpu_memory_gb: float = 0.0  # 0 = a CPU will do
    needs_bf16: bool = False
    # processes that train together, one per GPU where there are GPUs; each takes an equal share of
    # every batch
    ranks: int = 1
    # "ddp" = the whole model on every rank; "fsdp" = weights, gradients and optimizer states
    # sharded
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"hardware.ranks={self.ranks} must be at least 1")
        _one_of("hardware.strategy", self.strategy, STRATEGIES)
        kind, number = device_parts("hardware.device", self.device)
        require(self.ranks == 1 or (kind != "mps" and number is None),
                f"hardware.device={self.device!r} is a single device, hardware.ranks={self.ranks} "
                "need one each: say hardware.device="
                + ("cpu" if kind == "mps" else kind) + ", or hardware.ranks=1")


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
    # a third-party model instead of pretraining: a folder, a GGUF file, or a name in the hub's
    # local cache
    start_from: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for stage, train in vars(self).items():
            size = train.batch_size if isinstance(train, TrainConfig) else 0
            require(
                size % self.hardware.ranks == 0,
                f"hardware.ranks={self.hardware.ranks} does not divide {stage}.batch_size={size}; "
                f"use one of {_divisors(size)}, or another batch size")
        require(self.model.context_length >= SHORTEST_CONTEXT,
                f"model.context_length={self.model.context_length} leaves no room for the openings "
                f"that a stage continues, and for what it writes: use at least {SHORTEST_CONTEXT}; "
                "instructions and word problems take 128 or more")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in 0..2**63 - 1")
        if self.data.tokenizer == "bpe":
            require(self.data.tokenizer_vocab_size <= self.model.vocab_size,
                    f"data.tokenizer_vocab_size={self.data.tokenizer_vocab_size} exceeds "
                    f"model.vocab_size={self.model.vocab_size}: raise the latter")
        else:
            require(self.model.vocab_size >= GPT2_VOCAB_SIZE,
                    f"model.vocab_size={self.model.vocab_size} is under the {GPT2_VOCAB_SIZE} of "
                    "data.tokenizer='gpt2' with its chat tokens: use 50304")


SHORTEST_CONTEXT = 16  # tokens: ten to begin with, and some to write
GPT2_VOCAB_SIZE = 50_261  # 50,257 of GPT-2 and four chat tokens
