"""The presets: a function for each that returns a complete `PipelineConfig`. A variant of one is
`dataclasses.replace`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modern_llm.config.schema import DataConfig, HardwareConfig, ModelConfig, PipelineConfig
from modern_llm.config.stage_settings import (
    DPOConfig, EvalConfig, GRPOConfig, SFTConfig, TrainConfig, VerifierConfig,
)


def _in_float32(config: PipelineConfig) -> PipelineConfig:
    """The preset with all its training in float32, so that every processor gives the same numbers
    up to rounding; bfloat16 gains little at these sizes.
    """
    return replace(config, **{stage: replace(getattr(config, stage), precision="fp32")
                              for stage in ("pretrain", "sft", "dpo", "grpo", "verifier")})


def lesson() -> PipelineConfig:
    return _in_float32(PipelineConfig(
        name="lesson",
        description="0.2M parameters on the built-in world: what a stage notebook runs when "
                    "opened, under 30 seconds",
        model=ModelConfig(context_length=128, width=64, num_layers=3, num_heads=2, num_kv_heads=1,
                          ffn_width=192),
        data=DataConfig(max_train_tokens=300_000, max_validation_tokens=10_000),
        pretrain=TrainConfig(max_steps=120, batch_size=16, warmup_steps=5, eval_every=20,
                             checkpoint_every=40),
        sft=SFTConfig(max_steps=100, batch_size=8, lr=2e-3, muon_lr=1e-2, warmup_steps=5,
                      decay_fraction=0.6, eval_every=20, checkpoint_every=50, weights=(0.7, 0.3),
                      replay_fraction=0.2, max_train_examples=2000, max_validation_examples=40),
        dpo=DPOConfig(max_steps=30, batch_size=8, optimizer="adamw", lr=1e-3, weight_decay=0.0,
                      warmup_steps=3, log_every=1, eval_every=10, checkpoint_every=10,
                      keep_checkpoints=0, sft_weight=1.0, replay_weight=1.0,
                      replay_sources=("text", "synthetic", "synthetic-problems"),
                      max_train_pairs=240, max_validation_pairs=60, max_new_tokens=40),
        grpo=GRPOConfig(
            levels=(1,), max_steps=8, batch_size=64, optimizer="adamw", lr=2e-4,
            weight_decay=0.0, warmup_steps=1, log_every=1, eval_every=4, checkpoint_every=4,
            keep_checkpoints=0, train_problems=200, validation_problems=40, max_new_tokens=80),
        verifier=VerifierConfig(
            levels=(1, 2, 3), max_steps=20, batch_size=8, lr=2e-3, muon_lr=1e-2, warmup_steps=2,
            log_every=2, perturbed_fraction=0.6, lm_weight=2.0, eval_every=10, checkpoint_every=10,
            keep_checkpoints=0, train_problems=40, validation_problems=30, samples_per_problem=4,
            validation_samples=8, max_new_tokens=80, gold_problems=200, comparison_steps=20),
        eval=EvalConfig(levels=(1, 2, 3), num_problems=30, sampled_levels=(1, 2, 3),
                        sampled_problems=18, samples_per_problem=4, max_new_tokens=72,
                        num_sentences=30, shots=(0, 1), draws=3, num_instructions=30, num_pairs=30,
                        max_perplexity_tokens=10_000, protocol_tokens=5000, overlap_documents=2000),
    ))


def local_smoke() -> PipelineConfig:
    return _in_float32(PipelineConfig(
        name="local-smoke",
        description="about 1M parameters on the built-in world: minutes on 2 CPU cores, no network",
        data=DataConfig(max_train_tokens=2_000_000, max_validation_tokens=40_000),
        pretrain=TrainConfig(max_steps=800, batch_size=6, lr=3e-3, muon_lr=2e-2, warmup_steps=10,
                             decay_fraction=0.6, eval_every=160, checkpoint_every=160),
        sft=SFTConfig(weights=(0.8, 0.2), replay_fraction=0.15, max_steps=1200, batch_size=6,
                      lr=1.5e-3, muon_lr=1e-2, warmup_steps=10, decay_fraction=0.6, eval_every=300,
                      checkpoint_every=200, keep_checkpoints=0, max_train_examples=20_000,
                      max_validation_examples=120),
        dpo=DPOConfig(max_steps=100, batch_size=8, optimizer="adamw", lr=4e-4, weight_decay=0.0,
                      warmup_steps=10, log_every=1, eval_every=50, checkpoint_every=25,
                      keep_checkpoints=0, sft_weight=6.0, replay_weight=4.0,
                      replay_sources=("text", "synthetic", "synthetic-problems"),
                      max_train_pairs=800, max_new_tokens=40),
        grpo=GRPOConfig(
            max_steps=60, batch_size=128, optimizer="adamw", lr=5e-5, weight_decay=0.0,
            warmup_steps=5, log_every=1, eval_every=20, checkpoint_every=20, keep_checkpoints=0,
            validation_problems=200, max_new_tokens=112),
        verifier=VerifierConfig(
            levels=(2, 3, 4), max_steps=120, batch_size=16, warmup_steps=10, decay_fraction=0.6,
            eval_every=60, checkpoint_every=40, keep_checkpoints=0, train_problems=120,
            validation_problems=120, samples_per_problem=8, temperature=0.7, max_new_tokens=112,
            perturbed_fraction=0.2, gold_problems=4000, gold_fraction=0.75, lm_weight=20.0),
        eval=EvalConfig(batch_rows=512, temperature=0.7, num_sentences=120,
                        shots=(0, 4), draws=3, max_perplexity_tokens=40_000),
    ))


def local_cpu() -> PipelineConfig:
    return PipelineConfig(
        name="local-cpu",
        description="6M parameters on WikiText-2, TinyStories, SST-2 and HH-RLHF on 2 CPU cores",
        model=ModelConfig(vocab_size=4096, width=256, num_layers=6, num_kv_heads=2, ffn_width=768),
        data=DataConfig(sources=("wikitext-2-raw-v1", "tinystories"), tokenizer_vocab_size=4096),
        pretrain=TrainConfig(max_steps=3000, batch_size=16, warmup_steps=50, compile=True,
                             eval_every=250, checkpoint_every=250),
        sft=SFTConfig(sources=("sst2", "synthetic-problems", "alpaca"), weights=(0.7, 0.2, 0.1),
                      replay_fraction=0.4, max_steps=2400, batch_size=16, lr=1.5e-3, muon_lr=7.5e-3,
                      compile=True, eval_every=300, checkpoint_every=300, keep_checkpoints=0,
                      max_train_examples=70_000, max_validation_examples=100),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=300, batch_size=16, optimizer="adamw",
                      lr=5e-5, weight_decay=0.0, sft_weight=0.1, replay_weight=1.0,
                      replay_sources=("text", "sst2", "synthetic-problems"), log_every=5,
                      eval_every=50, checkpoint_every=50, keep_checkpoints=0,
                      max_train_pairs=4800, max_validation_pairs=200),
        grpo=GRPOConfig(
            levels=(5,), max_steps=60, batch_size=128, micro_batch_size=32, optimizer="adamw",
            lr=1e-4, weight_decay=0.0, warmup_steps=5, log_every=1, eval_every=20,
            checkpoint_every=20, keep_checkpoints=0, validation_problems=200, max_new_tokens=192),
        verifier=VerifierConfig(
            levels=(5,), max_steps=120, batch_size=16, lr=1e-3, muon_lr=5e-3, warmup_steps=10,
            decay_fraction=0.6, eval_every=60, checkpoint_every=40, keep_checkpoints=0,
            train_problems=120, validation_problems=120, samples_per_problem=8, temperature=0.7,
            max_new_tokens=192, gold_problems=4000, gold_fraction=0.75, lm_weight=20.0),
        eval=EvalConfig(sampled_levels=(5,), temperature=0.7, sentiment="sst2",
                        max_new_tokens=192, num_sentences=872, shots=(0, 4), draws=2,
                        num_pairs=800, max_perplexity_tokens=100_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories")),
    )


def local() -> PipelineConfig:
    return PipelineConfig(
        name="local",
        description="114M parameters on WikiText-2 and TinyStories, about 50M tokens, on one "
                    "12 GB GPU",
        model=ModelConfig(vocab_size=50_304, context_length=1024, width=768, num_layers=12,
                          num_heads=12, num_kv_heads=4, ffn_width=2048),
        data=DataConfig(sources=("wikitext-2-raw-v1", "tinystories"), tokenizer="gpt2",
                        max_train_tokens=50_000_000),
        pretrain=TrainConfig(max_steps=1600, batch_size=32, micro_batch_size=4, warmup_steps=50,
                             compile=True, gradient_checkpointing=True),
        sft=SFTConfig(sources=("alpaca", "oasst1", "gsm8k", "sst2"), weights=(0.5, 0.1, 0.2, 0.2),
                      max_train_examples=60_000, max_steps=600, batch_size=32, micro_batch_size=4,
                      lr=1e-3, muon_lr=5e-3, compile=True, gradient_checkpointing=True),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=600, batch_size=32, micro_batch_size=2,
                      optimizer="adamw", lr=2e-6, weight_decay=0.0, eval_every=100,
                      max_train_pairs=20_000, max_new_tokens=256),
        eval=EvalConfig(problems="gsm8k", num_problems=200, problem_shots=4, sampled_problems=50,
                        max_new_tokens=256, batch_rows=64, sentiment="sst2", num_sentences=872,
                        shots=(0, 1, 4, 8), num_pairs=500, max_perplexity_tokens=300_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories"),
                        protocol_tokens=400_000, overlap_documents=2_000_000),
        hardware=HardwareConfig(min_gpu_memory_gb=11),
        grpo=GRPOConfig(problems="gsm8k", max_steps=300, batch_size=256, micro_batch_size=4,
                        optimizer="adamw", lr=2e-6, weight_decay=0.0, log_every=1, eval_every=50,
                        checkpoint_every=25, train_problems=7000, validation_problems=300,
                        max_new_tokens=256),
        verifier=VerifierConfig(problems="gsm8k", max_steps=600, batch_size=32, micro_batch_size=4,
                                lr=3e-4, muon_lr=2e-3, compile=True, gradient_checkpointing=True,
                                train_problems=1500, validation_problems=300, max_new_tokens=256),
    )


def tacc_h100() -> PipelineConfig:
    return PipelineConfig(
        name="tacc-h100",
        description="253M parameters, 5.2B tokens of WikiText-103 and TinyStories on one 80 GB "
                    "H100; planned, not run yet",
        model=ModelConfig(vocab_size=50_304, context_length=1024, width=1024, num_layers=12,
                          num_heads=16, num_kv_heads=16, ffn_width=4096),
        data=DataConfig(sources=("wikitext-103-raw-v1", "tinystories"), tokenizer="gpt2",
                        max_validation_tokens=300_000),
        pretrain=TrainConfig(max_steps=40_000, batch_size=128, micro_batch_size=32,
                             warmup_steps=200, compile=True, log_every=20, eval_every=500,
                             checkpoint_every=1000),
        sft=SFTConfig(sources=("alpaca", "oasst1", "gsm8k", "sst2"),
                      weights=(0.5, 0.1, 0.2, 0.2), max_train_examples=60_000, max_steps=5000,
                      batch_size=64, micro_batch_size=32, lr=3e-4, muon_lr=2e-3, warmup_steps=100,
                      compile=True, log_every=20, eval_every=250, checkpoint_every=1000),
        dpo=DPOConfig(sources=("hh-rlhf",), max_steps=3000, batch_size=64, micro_batch_size=8,
                      optimizer="adamw", lr=1e-6, weight_decay=0.0, warmup_steps=100,
                      eval_every=250, checkpoint_every=500, max_train_pairs=170_000,
                      max_validation_pairs=500, max_new_tokens=256),
        eval=EvalConfig(problems="gsm8k", num_problems=1319, problem_shots=4, sampled_problems=500,
                        samples_per_problem=32, max_new_tokens=256, sentiment="sst2",
                        num_sentences=872, shots=(0, 1, 4, 8), num_pairs=1000,
                        max_perplexity_tokens=300_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories"),
                        protocol_tokens=400_000, overlap_documents=10_000_000,
                        baselines=("gpt2", "distilgpt2", "HuggingFaceTB/SmolLM2-135M")),
        hardware=HardwareConfig(min_gpu_memory_gb=70, needs_bf16=True),
        grpo=GRPOConfig(
            problems="gsm8k", max_steps=300, batch_size=1024, micro_batch_size=16,
            optimizer="adamw", lr=1e-6, weight_decay=0.0, log_every=1, eval_every=25,
            checkpoint_every=25, train_problems=7000, validation_problems=400, group_size=16,
            max_new_tokens=256),
        verifier=VerifierConfig(
            problems="gsm8k", max_steps=3000, batch_size=64, micro_batch_size=16, lr=1e-4,
            muon_lr=1e-3, warmup_steps=100, compile=True, log_every=20, eval_every=500,
            checkpoint_every=500, train_problems=7000, validation_problems=400,
            samples_per_problem=32, validation_samples=32, max_new_tokens=256, head_dropout=0.2),
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
        grpo=replace(base.grpo, micro_batch_size=8),
        verifier=replace(base.verifier, micro_batch_size=8),
    )


def tacc_smoke() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="tacc-smoke",
        description="every code path of tacc-h100 (bf16, compile, accumulation, resume) on a tiny "
                    "model, in minutes",
        model=replace(base.model, context_length=256, width=128, num_layers=2, num_heads=4,
                      num_kv_heads=2, ffn_width=384),
        data=replace(base.data, sources=("wikitext-2-raw-v1", "tinystories"),
                     max_train_tokens=500_000, max_validation_tokens=20_000),
        pretrain=replace(base.pretrain, max_steps=40, batch_size=16, micro_batch_size=8,
                         warmup_steps=5, log_every=5, eval_every=20, checkpoint_every=20),
        sft=replace(base.sft, max_steps=20, batch_size=16, micro_batch_size=8, warmup_steps=5,
                    log_every=5, eval_every=10, checkpoint_every=10, max_train_examples=500,
                    max_validation_examples=16),
        dpo=replace(base.dpo, max_steps=20, batch_size=16, micro_batch_size=8, warmup_steps=5,
                    log_every=5, eval_every=10, checkpoint_every=10, max_train_pairs=320,
                    max_validation_pairs=16, max_new_tokens=64),
        eval=replace(base.eval, num_problems=16, problem_shots=1,
                     sampled_problems=4, samples_per_problem=4, max_new_tokens=64, num_sentences=32,
                     shots=(0, 4), draws=2, num_pairs=32, max_perplexity_tokens=20_000,
                     protocol_tokens=5000, overlap_documents=2000, baselines=()),
        hardware=HardwareConfig(min_gpu_memory_gb=8, needs_bf16=True),
        grpo=replace(base.grpo, max_steps=8, batch_size=16, micro_batch_size=8, warmup_steps=2,
                     eval_every=4, checkpoint_every=4, train_problems=32, validation_problems=10,
                     group_size=4, max_new_tokens=64),
        verifier=replace(base.verifier, max_steps=20, batch_size=16, micro_batch_size=8,
                         warmup_steps=5, log_every=5, eval_every=10, checkpoint_every=10,
                         train_problems=20, validation_problems=10, samples_per_problem=4,
                         validation_samples=4, max_new_tokens=64),
    )


def gpu_full() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="gpu-full",
        description="the model of tacc-h100 with the original AdamW recipe, kept for comparison",
        model=replace(base.model, use_qk_norm=False, zero_init_outputs=False),
        pretrain=replace(base.pretrain, optimizer="adamw", lr=3e-4, schedule="cosine",
                         warmup_steps=2000, final_lr_fraction=0.1),
        sft=replace(base.sft, optimizer="adamw", lr=1e-4, schedule="cosine"),
    )


def h100_speedrun() -> PipelineConfig:
    base = tacc_h100()
    return replace(
        base,
        name="h100-speedrun",
        description="the best 253M model one H100 or H200 makes in 60 minutes",
        pretrain=replace(base.pretrain, max_minutes=60, max_steps=6000, warmup_steps=100,
                         ema_decay=0.998),
        sft=replace(base.sft, max_steps=600, max_minutes=6),
        dpo=replace(base.dpo, max_steps=300, max_minutes=4, max_train_pairs=20_000),
    )


def smollm2_135m() -> PipelineConfig:
    return PipelineConfig(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct, tuned further on the built-in world instead of "
                    "pretraining; a CPU will do",
        model=ModelConfig(vocab_size=49_152, context_length=512, width=576, num_layers=30,
                          num_heads=9, num_kv_heads=3, ffn_width=1536, rope_theta=100_000.0,
                          use_qk_norm=False),
        data=DataConfig(max_train_tokens=500_000, max_validation_tokens=10_000),
        pretrain=TrainConfig(batch_size=8, micro_batch_size=1, loss_chunk_tokens=512),  # left out
        sft=SFTConfig(max_steps=100, batch_size=8, micro_batch_size=1, optimizer="adamw", lr=5e-5,
                      weight_decay=0.0, warmup_steps=5, loss_chunk_tokens=512,
                      log_every=1, eval_every=50, checkpoint_every=25, keep_checkpoints=0,
                      max_train_examples=2000, max_validation_examples=20),
        dpo=DPOConfig(max_steps=50, batch_size=8, micro_batch_size=1, optimizer="adamw", lr=5e-6,
                      weight_decay=0.0, warmup_steps=5, loss_chunk_tokens=512, log_every=1,
                      eval_every=25, checkpoint_every=25, keep_checkpoints=0, sft_weight=1.0,
                      max_train_pairs=200, max_validation_pairs=20, max_new_tokens=40),
        grpo=GRPOConfig(levels=(1, 2, 3), max_steps=16, batch_size=32, micro_batch_size=1,
                        optimizer="adamw", lr=1e-5, weight_decay=0.0, warmup_steps=2,
                        loss_chunk_tokens=512, log_every=1, eval_every=8, checkpoint_every=4,
                        keep_checkpoints=0, train_problems=200, validation_problems=40,
                        max_new_tokens=96),
        verifier=VerifierConfig(levels=(1, 2, 3), max_steps=30, batch_size=8, micro_batch_size=1,
                                optimizer="adamw", lr=2e-5, weight_decay=0.0, warmup_steps=3,
                                loss_chunk_tokens=512, log_every=1, eval_every=15,
                                checkpoint_every=15, keep_checkpoints=0, train_problems=20,
                                validation_problems=20, samples_per_problem=4, validation_samples=8,
                                max_new_tokens=96, gold_problems=200),
        eval=EvalConfig(num_problems=40, sampled_problems=12, samples_per_problem=4,
                        max_new_tokens=96, batch_rows=32, num_sentences=40,
                        shots=(0, 4), draws=2, num_instructions=40, num_pairs=20,
                        max_perplexity_tokens=10_000, protocol_tokens=3000, overlap_documents=2000),
        start_from="HuggingFaceTB/SmolLM2-135M-Instruct",
    )


def smollm2_gsm8k() -> PipelineConfig:
    base = smollm2_135m()
    tuned = dict(batch_size=64, optimizer="adamw", weight_decay=0.0, warmup_steps=10,
                 loss_chunk_tokens=4096, log_every=5, checkpoint_every=100, keep_checkpoints=0)
    return replace(
        base,
        name="smollm2-gsm8k",
        description="SmolLM2-135M-Instruct tuned on GSM8K, SST-2, Alpaca and HH-RLHF, for a "
                    "data-centre GPU; planned, not run yet",
        data=DataConfig(sources=("wikitext-2-raw-v1", "tinystories"),
                        max_validation_tokens=100_000),
        sft=SFTConfig(sources=("gsm8k", "sst2", "alpaca"), weights=(0.6, 0.25, 0.15), lr=3e-4,
                      max_steps=300, micro_batch_size=32, eval_every=100,
                      max_validation_examples=300, **tuned),
        dpo=DPOConfig(sources=("hh-rlhf",), lr=1e-5, max_steps=80, micro_batch_size=16,
                      eval_every=40, sft_weight=0.2, max_validation_pairs=500,
                      max_new_tokens=128, **tuned | {"batch_size": 32}),
        grpo=GRPOConfig(problems="gsm8k", lr=1e-5, max_steps=100, micro_batch_size=32,
                        eval_every=25, train_problems=7000, validation_problems=150,
                        max_new_tokens=200, **tuned | {"batch_size": 256, "log_every": 1,
                                                       "checkpoint_every": 10}),
        verifier=VerifierConfig(problems="gsm8k", lr=1e-4, max_steps=80, micro_batch_size=32,
                                eval_every=40, train_problems=800, validation_problems=150,
                                samples_per_problem=8, validation_samples=16, temperature=0.7,
                                max_new_tokens=200, gold_problems=7000, gold_fraction=0.25,
                                **tuned),
        eval=EvalConfig(problems="gsm8k", num_problems=1319, problem_shots=0, sampled_problems=500,
                        samples_per_problem=16, temperature=0.7, max_new_tokens=200,
                        batch_rows=1024, sentiment="sst2", num_sentences=872, shots=(0, 4),
                        draws=2, num_instructions=100, num_pairs=500,
                        max_perplexity_tokens=100_000,
                        protocol_sources=("wikitext-2-raw-v1", "tinystories"),
                        protocol_tokens=60_000),
    )


def smollm2_cpu() -> PipelineConfig:
    base = smollm2_gsm8k()
    steps = dict(batch_size=16, micro_batch_size=2, compile=True, log_every=2)
    return replace(
        base,
        name="smollm2-cpu",
        description="SmolLM2-135M-Instruct tuned on GSM8K and SST-2, on 2 CPU cores with bf16 "
                    "units",
        hardware=replace(base.hardware, inference_precision="bf16"),
        sft=replace(base.sft, sources=("gsm8k", "sst2"), weights=(0.75, 0.25), lr=4e-4,
                    max_steps=300, eval_every=100, checkpoint_every=30,
                    max_validation_examples=30, **steps | {"micro_batch_size": 8}),
        dpo=replace(base.dpo, max_steps=30, eval_every=15, checkpoint_every=15, **steps),
        grpo=replace(base.grpo, max_steps=20, eval_every=10, checkpoint_every=2,
                     validation_problems=60, **steps | {"batch_size": 64, "compile": False}),
        verifier=replace(base.verifier, max_steps=30, eval_every=15, checkpoint_every=15,
                         train_problems=60, validation_problems=30, validation_samples=8,
                         gold_problems=1000, **steps),
        eval=replace(base.eval, num_problems=500, sampled_problems=60, samples_per_problem=8,
                     batch_rows=256, draws=1, num_pairs=100, max_perplexity_tokens=30_000,
                     protocol_tokens=8_000),
    )


PRESETS: dict[str, Callable[[], PipelineConfig]] = {
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
    "smollm2-gsm8k": smollm2_gsm8k,
    "smollm2-cpu": smollm2_cpu,
}
ALIASES = {"local-rtx3060": "local", "tacc": "tacc-h100"}
