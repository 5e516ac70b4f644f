"""Every setting, the presets made of them, and how a word changes one. Imports no torch."""

from modern_llm.config.checks import ConfigError, device_parts, nearest, require
from modern_llm.config.choosing import get_pipeline_preset, preset_with, steps_wanted
from modern_llm.config.datasets import (
    BUILT_IN, CHAT_KINDS, DATASET_REGISTRY, KINDS, DatasetInfo, function_of, names_of,
    register_dataset,
)
from modern_llm.config.overrides import PLAIN, json_or_text, override, parse_overrides, to_dict
from modern_llm.config.presets import (
    ALIASES, PRESETS, gpu_full, h100_speedrun, lesson, local, local_cpu, local_smoke, smollm2_135m,
    tacc_a100, tacc_h100, tacc_smoke,
)
from modern_llm.config.schema import (
    GPT2_VOCAB_SIZE, SHORTEST_CONTEXT, STRATEGIES, DataConfig, HardwareConfig, ModelConfig,
    PipelineConfig,
)
from modern_llm.config.stage_settings import (
    OPTIMIZERS, PRECISIONS, PREFERENCE_LOSSES, SCHEDULES, VERIFIER_KINDS, DPOConfig, EvalConfig,
    GRPOConfig, SFTConfig, TrainConfig, VerifierConfig,
)
from modern_llm.config.stages import (
    ALWAYS, GENERATORS, NOTEBOOKS, STAGES, TRAINED, StageSpec, is_part_of_all, trained_on,
)
from modern_llm.config.work import Work
