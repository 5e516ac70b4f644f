"""The settings of each stage: what each knob is called, its unit, its default. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modern_llm.config.checks import require, require_one_of, require_positive, require_sources
from modern_llm.config.datasets import CHAT_KINDS, names_of

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("wsd", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PREFERENCE_LOSSES = ("sigmoid", "ipo")
VERIFIER_KINDS = ("generator", "encoder")


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
    # over 0: the model's own weights stay, and adapters of this rank learn beside the projections
    # of its blocks (LoRA), by AdamW; not in pretraining
    lora_rank: int = 0
    # an adapter's product counts lora_alpha / lora_rank times; None = 2 · lora_rank
    lora_alpha: float | None = None
    weight_decay: float = 0.1  # decoupled; matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "wsd"  # "wsd" = warmup, stable, linear decay; "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.5  # share of the run that decays ("wsd")
    final_lr_fraction: float = 0.0  # of the peak, at the end
    grad_clip: float = 1.0  # global norm; 0 = off
    # "auto" = bf16 where the GPU or the CPU has units for it, else fp16 on GPUs, fp32 on CPUs
    precision: str = "auto"
    # true = every block by itself; "model" = the whole model with its loss, and Muon's iteration;
    # with hardware.strategy="fsdp", which brings weights block by block, the same as true
    compile: bool | str = False
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
        require_positive(place, self, "max_steps", "batch_size", "lr", "muon_lr", "log_every",
                         "eval_every", "checkpoint_every", "loss_chunk_tokens")
        require_one_of(f"{place}.optimizer", self.optimizer, OPTIMIZERS)
        require_one_of(f"{place}.schedule", self.schedule, SCHEDULES)
        require_one_of(f"{place}.precision", self.precision, PRECISIONS)
        require(isinstance(self.compile, bool) or self.compile == "model",
                f"{place}.compile={self.compile!r} must be true, false or \"model\"")
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
        for name in ("weight_decay", "grad_clip", "warmup_steps", "keep_checkpoints", "lora_rank"):
            require(getattr(self, name) >= 0,
                    f"{place}.{name}={getattr(self, name)} must not be negative")
        require(place != "pretrain" or (self.lora_rank == 0 and self.lora_alpha is None),
                f"pretrain.lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}: adapters "
                "learn beside weights that know something already, and pretraining starts from "
                "random ones; leave both out here, and set them for sft, dpo or verifier")
        require(self.lora_alpha is None or (self.lora_rank and 0 < self.lora_alpha < math.inf),
                f"{place}.lora_alpha={self.lora_alpha} must be greater than 0 and go with a "
                f"{place}.lora_rank, or be null")

    @property
    def adapter_alpha(self) -> float:
        """What `lora_alpha` means."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

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
        require_sources("sft", self.sources, *CHAT_KINDS)
        require(len(self.sources) == len(self.weights),
                f"sft.weights={list(self.weights)} must have one number for each of "
                f"sft.sources={list(self.sources)}")
        require(all(0 < w < math.inf for w in self.weights),
                f"sft.weights={list(self.weights)} must be greater than 0")
        require(0 <= self.replay_fraction < 1,
                f"sft.replay_fraction={self.replay_fraction} must lie in [0, 1)")
        require_positive("sft", self, "max_train_examples", "max_validation_examples")


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation; a row of a batch is a pair. Read by chapter 05."""

    sources: tuple[str, ...] = ("synthetic",)  # of preference pairs
    loss: str = "sigmoid"  # "sigmoid" = DPO, "ipo"
    beta: float = 0.1  # strength of the pull back to the reference
    # share of pairs believed to be labelled the wrong way round (cDPO)
    label_smoothing: float = 0.0
    length_normalised: bool = False  # log-probability per token instead of per answer
    preference_weight: float = 1.0  # weight of the preference loss
    sft_weight: float = 0.0  # weight of the chosen answer's negative log-probability per token
    # weight of the nats per token of a row of earlier examples that goes along with every pair
    replay_weight: float = 0.0
    # in equal parts; "text" (pretraining), and what sft.sources may name
    replay_sources: tuple[str, ...] = ("text",)
    max_train_pairs: int = 5_000  # a source
    max_validation_pairs: int = 200  # a source
    max_new_tokens: int = 128  # of the model's own answers to held-out prompts
    # beside it, the same start is trained for the same steps on the same batches without the
    # preference loss, if another term is left to train on
    control: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sources("dpo", self.sources, "pairs")
        require_one_of("dpo.loss", self.loss, PREFERENCE_LOSSES)
        require_positive("dpo", self, "beta", "max_train_pairs", "max_validation_pairs",
                         "max_new_tokens")
        require(0 <= self.label_smoothing < 0.5,
                f"dpo.label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        require(self.loss == "sigmoid" or self.label_smoothing == 0,
                "dpo.label_smoothing is for dpo.loss='sigmoid'")
        for name in ("preference_weight", "sft_weight", "replay_weight"):
            require(getattr(self, name) >= 0,
                    f"dpo.{name}={getattr(self, name)} must not be negative")
        require(self.preference_weight + self.sft_weight + self.replay_weight > 0,
                "dpo.preference_weight, dpo.sft_weight and dpo.replay_weight are all 0: nothing is "
                "left to train on; set one of them above 0")
        require(len(self.replay_sources) > 0,
                "dpo.replay_sources is empty; to replay nothing say dpo.replay_weight=0")
        for name in self.replay_sources:
            require_one_of("dpo.replay_sources", name, ("text", *names_of(*CHAT_KINDS)))

    @property
    def sequences(self) -> int:
        """The pair, and a third one where something is replayed."""
        return 2 + bool(self.replay_weight)

    @property
    def trains_control(self) -> bool:
        """Whether a control is trained: where it is asked for, and differs from the run and from
        its start.
        """
        return bool(self.control and self.preference_weight
                    and (self.sft_weight or self.replay_weight))


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Reinforcement learning with verifiable rewards; a row of a batch is an answer that the model
    itself wrote. Read by chapter 38.
    """

    with_all: bool = False  # whether `--stage all` runs this stage; by its name it always runs
    problems: str = "synthetic"  # a data set of word problems
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the synthetic problems
    train_problems: int = 2_000
    validation_problems: int = 100
    group_size: int = 8  # answers to a problem, which are compared with each other
    # answers are written for so many steps at once, by the weights of the first
    steps_per_round: int = 2
    # of those answers; at another one than 1 the gradient is not that of their mean reward
    temperature: float = 1.0
    max_new_tokens: int = 128
    # "exact" = 1 for a right answer that ends by itself, else 0; or the folder of a verifier or of
    # a run that has one: its score
    reward: str = "exact"
    clip: float = 0.2  # a token's probability ratio counts within 1 - clip and 1 + clip
    # of an answer: "scaled" = its reward less the group's mean, in the group's standard deviations;
    # "centred" = not divided; "reward" = the reward, so that only right answers count
    advantage: str = "scaled"
    per_token: bool = False  # every token of a step counts the same; false = every answer
    kl_weight: float = 0.0  # of the distance from the starting model; 0 = that model is not kept
    # beside it, the same start is trained on the same problems' gold answers, for as many FLOPs
    control: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("grpo.problems", self.problems, names_of("problems"))
        require_one_of("grpo.advantage", self.advantage, ("scaled", "centred", "reward"))
        require_positive("grpo", self, "train_problems", "validation_problems", "steps_per_round",
                         "temperature", "max_new_tokens", "clip")
        require(self.group_size >= 2,
                f"grpo.group_size={self.group_size} must be at least 2: an answer is compared with "
                "the others of its group")
        require(self.batch_size % self.group_size == 0,
                f"grpo.group_size={self.group_size} does not divide "
                f"grpo.batch_size={self.batch_size}, the answers of a step")
        require(0 <= self.kl_weight < math.inf,
                f"grpo.kl_weight={self.kl_weight} must be 0 or greater")
        require(set(self.levels) <= {1, 2, 3, 4, 5} and len(self.levels) > 0,
                f"grpo.levels={list(self.levels)} must name some of the levels 1 to 5")
        require(not self.compile,
                f"grpo.compile={self.compile!r} must be false: the blocks that learn write, too, "
                "and would be compiled again for every length of a text")
        require(self.reward != "",
                "grpo.reward is empty: say \"exact\", or the folder of a verifier")


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
    # beside it, the generator itself is trained on: as many steps, the same batches, the
    # language-model loss alone; not beside an encoder, or where lm_weight is 0
    control: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("verifier.kind", self.kind, VERIFIER_KINDS)
        require_one_of("verifier.problems", self.problems, names_of("problems"))
        require_positive("verifier", self, "train_problems", "validation_problems",
                         "samples_per_problem", "validation_samples", "temperature",
                         "max_new_tokens")
        for name in ("perturbed_fraction", "gold_fraction", "head_dropout"):
            require(0 <= getattr(self, name) < 1,
                    f"verifier.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("lm_weight", "gold_problems", "comparison_steps"):
            require(getattr(self, name) >= 0,
                    f"verifier.{name}={getattr(self, name)} must not be negative")
        require(self.kind == "generator" or not self.lora_rank,
                f"verifier.lora_rank={self.lora_rank} is for verifier.kind='generator': an encoder "
                "starts from random weights, all of which have to learn")

    @property
    def trains_control(self) -> bool:
        """Whether the generator is trained on as control."""
        return bool(self.control and self.lm_weight and self.kind == "generator")


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
        require_one_of("eval.problems", self.problems, names_of("problems"))
        require_one_of("eval.sentiment", self.sentiment, names_of("sentences"))
        require_positive("eval", self, "num_problems", "samples_per_problem", "sampled_problems",
                         "temperature", "max_new_tokens", "batch_rows", "num_sentences",
                         "num_instructions", "num_pairs", "max_perplexity_tokens", "draws",
                         "protocol_tokens", "overlap_documents")
        require(len(self.shots) > 0 and min(self.shots) >= 0,
                f"eval.shots={list(self.shots)} must be numbers from 0 on, at least one")
        for name in ("problem_shots", "overlap_words"):
            require(getattr(self, name) >= 0,
                    f"eval.{name}={getattr(self, name)} must not be negative")
        for name in ("levels", "sampled_levels"):
            require(set(getattr(self, name)) <= {1, 2, 3, 4, 5} and len(getattr(self, name)) > 0,
                    f"eval.{name}={list(getattr(self, name))} must name some of the levels 1 to 5")
