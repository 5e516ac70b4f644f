"""A whole run as settings: the model, the data, the machine, and a section for each stage.

A variant of a config is `dataclasses.replace`; complete ones, the presets, are in `presets`. The
settings import neither torch nor anything but the names of the data sets, so that a login node can
plan a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modern_llm.config.checks import (
    device_parts, divisors, nearest, require, require_one_of, require_positive, require_sources,
)
from modern_llm.config.stage_settings import (
    DPOConfig, EvalConfig, GRPOConfig, SFTConfig, TrainConfig, VerifierConfig,
)

STRATEGIES = ("ddp", "fsdp")
ROPE_SCALINGS = ("llama3", "linear", "ntk", "yarn")  # rules for contexts longer than trained on
INFERENCE_PRECISIONS = ("auto", "fp32", "tf32", "bf16")
TRACKERS = ("tensorboard", "trackio")  # each an extra of that name
SHORTEST_CONTEXT = 16  # tokens: ten to begin with, and some to write
GPT2_VOCAB_SIZE = 50_261  # 50,257 of GPT-2 and four chat tokens


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
    # over 1: the wavelengths, or the slow ones, are so many times longer, for contexts beyond
    # rope_trained_context
    rope_factor: float = 1.0
    # which ones, with a rope_factor over 1: "llama3" = the slow ones by their turns in
    # rope_trained_context, "linear" = all alike, "ntk" = the slower the more, by another base,
    # "yarn" = the slow ones by their place, with sharper attention
    rope_scaling: str = "llama3"
    rope_trained_context: int = 8192  # tokens; read by "llama3" and "yarn"
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
        require_positive("model", self, "vocab_size", "context_length", "width", "num_layers",
                         "num_heads", "num_kv_heads", "ffn_width", "rope_theta",
                         "rope_trained_context", "norm_eps", "init_std")
        require(self.head_dim is None or self.head_dim > 0,
                f"model.head_dim={self.head_dim} must be at least 2, or null for width/num_heads")
        require(self.head_dim is not None or self.width % self.num_heads == 0,
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
                f"use one of {divisors(self.width, 2)[-8:]}")
        require(1 <= self.rope_factor < math.inf,
                f"model.rope_factor={self.rope_factor} must be at least 1, which changes nothing")
        require_one_of("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        require(self.rope_scaling != "ntk" or self.head_width > 2,
                "model.rope_scaling='ntk' slows the last pair of channels and keeps the first, but "
                f"a head of {self.head_width} channels has one pair; use 'linear'")
        require(self.rope_scaling != "yarn" or self.rope_theta > 1,
                f"model.rope_scaling='yarn' needs pairs of different speeds, which "
                f"model.rope_theta={self.rope_theta} does not make; use one over 1")
        require(self.head_width % 2 == 0,
                f"model.{'head_dim' if self.head_dim else 'width/num_heads'}={self.head_width} is "
                "odd; rotary embedding turns pairs of channels")
        require(self.num_heads % self.num_kv_heads == 0,
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}; use one of {divisors(self.num_heads)}")
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

    @property
    def rope(self) -> tuple[float, float, int, str]:
        """What `rotary_tables` takes behind positions and the head's width: base, factor, trained
        context, rule.
        """
        return self.rope_theta, self.rope_factor, self.rope_trained_context, self.rope_scaling


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. Read by chapter 02a."""

    sources: tuple[str, ...] = ("synthetic",)  # names of DATASET_REGISTRY
    tokenizer: str = "bpe"  # "bpe" = byte-level BPE trained on the sources; "gpt2" = GPT-2's
    tokenizer_vocab_size: int = 512  # for "bpe"; special tokens included
    max_train_tokens: int | None = None  # a source; None = all of it
    # of pretraining, in place of pretrain.max_steps; rounded up to whole steps
    tokens_target: int | None = None
    max_epochs: float | None = None  # pretraining ends when the text was read so often
    max_validation_tokens: int = 100_000  # a source
    isolate_documents: bool = False  # attention stops at document boundaries inside a packed row
    world_seed: int = 0  # the synthetic world: who lives where, owns which pet …

    def __post_init__(self) -> None:
        require_sources("data", self.sources)
        require_one_of("data.tokenizer", self.tokenizer, ("bpe", "gpt2"))
        require(self.tokenizer_vocab_size >= 300,
                f"data.tokenizer_vocab_size={self.tokenizer_vocab_size} is under 300: 256 bytes "
                "and the special tokens")
        require(self.max_train_tokens is None or self.max_train_tokens > 0,
                f"data.max_train_tokens={self.max_train_tokens} must be greater than 0, or null "
                "for everything")
        for name in ("tokens_target", "max_epochs"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf,
                    f"data.{name}={value} must be greater than 0, or null for no such bound")
        require_positive("data", self, "max_validation_tokens")


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
    # with "fsdp": each rank writes its own shards of a checkpoint, while training goes on; false =
    # rank 0 gathers them in one file, with the model's own files in every checkpoint
    sharded_checkpoints: bool = True
    # of models that are evaluated, or asked for answers to learn from, on every rank: "fp32" =
    # exact; "tf32" = products of float32 matrices rounded to 10 bits; "bf16" = such weights; "auto"
    # = "tf32" on GPUs, else "fp32"
    inference_precision: str = "auto"

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"hardware.ranks={self.ranks} must be at least 1")
        require_one_of("hardware.strategy", self.strategy, STRATEGIES)
        require_one_of("hardware.inference_precision", self.inference_precision,
                       INFERENCE_PRECISIONS)
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
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    # a third-party model instead of pretraining: a folder, a GGUF file, or a name in the hub's
    # local cache
    start_from: str = ""
    seed: int = 0
    # where the curves of stages that train are shown too: "tensorboard" = event files in
    # runs/RUN/tensorboard, "trackio" = its database in runs/RUN/trackio; null = in neither
    tracker: str | None = None

    def __post_init__(self) -> None:
        for stage, train in vars(self).items():
            size = train.batch_size if isinstance(train, TrainConfig) else 0
            require(
                size % self.hardware.ranks == 0,
                f"hardware.ranks={self.hardware.ranks} does not divide {stage}.batch_size={size}; "
                f"use one of {divisors(size)}, or another batch size")
            require(
                size == 0 or not train.lora_rank or self.hardware.ranks == 1
                or self.hardware.strategy != "fsdp",
                f"{stage}.lora_rank: hardware.strategy='fsdp' shards weights, gradients and "
                "optimizer states, and adapters have hardly any of the last two; say "
                "hardware.strategy=ddp for this stage")
        require(self.model.context_length >= SHORTEST_CONTEXT,
                f"model.context_length={self.model.context_length} leaves no room for the openings "
                f"that a stage continues, and for what it writes: use at least {SHORTEST_CONTEXT}; "
                "instructions and word problems take 128 or more")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in 0..2**63 - 1")
        require(self.tracker is None or self.tracker in TRACKERS,
                f"tracker={self.tracker!r} is unknown{nearest(str(self.tracker), TRACKERS)}; or "
                "null for none")
        if self.data.tokenizer == "bpe":
            require(self.data.tokenizer_vocab_size <= self.model.vocab_size,
                    f"data.tokenizer_vocab_size={self.data.tokenizer_vocab_size} exceeds "
                    f"model.vocab_size={self.model.vocab_size}: raise the latter")
        else:
            require(self.model.vocab_size >= GPT2_VOCAB_SIZE,
                    f"model.vocab_size={self.model.vocab_size} is under the {GPT2_VOCAB_SIZE} of "
                    "data.tokenizer='gpt2' with its chat tokens: use 50304")
