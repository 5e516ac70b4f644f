"""What a stage knew when: every checkpoint that it kept, side by side on the same held-out text and
the same prompts.

A plain module over what the stage itself measures while it trains (chapters 03 to 05).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer
from tqdm import tqdm

from modern_llm.config import GENERATORS, PipelineConfig, override
from modern_llm.data.chat import (
    EncodedExample, continuations, document_prompt, encode_prompt, end_id, is_chat_model,
)
from modern_llm.data.corpus import build_token_cache
from modern_llm.data.packing import TokenCache
from modern_llm.data.pairs import encode_pairs, preference_pairs
from modern_llm.data.tokens import end_of_text_id, load_tokenizer
from modern_llm.files import find_folder, read_record
from modern_llm.interchange.hub import is_model
from modern_llm.messages import StageError
from modern_llm.models.generation import check_prompts
from modern_llm.models.saving import load_model, read_config
from modern_llm.statistics import ratio_interval
from modern_llm.training.pretrain import text_nats
from modern_llm.training.sft import example_nats, load_examples

REQUESTS = ("What is 3 plus 4?",
            "Tom has 3 hats and buys 4 hats. How many hats does Tom have now?",
            "Is this review positive or negative?\nAnna laughed and clapped. A wonderful evening.")
OPENINGS = 3  # held-out documents whose beginnings a base model continues


def kept_checkpoints(stage_folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint that a stage kept, the last one's too, by step.

    Raises StageError if there is none, or if the stage makes no language model.
    """
    if stage_folder.name not in GENERATORS:
        raise StageError(f"{stage_folder}: the stages whose checkpoints write text are "
                         f"{', '.join(reversed(GENERATORS))}; {stage_folder.name!r} is none")
    folders = sorted((stage_folder / "checkpoints").glob("step-*"))
    try:
        folders.append(find_folder(stage_folder / "checkpoint"))
    except FileNotFoundError:
        pass  # the stage has not come so far
    # a stage that was stopped may have kept its last step twice
    found = {read_record(folder / "meta.json").get("step", 0): folder
             for folder in folders if is_model(folder)}
    if not found:
        raise StageError(f"{stage_folder} has no checkpoint: tried {stage_folder / 'checkpoint'} "
                         f"and {stage_folder / 'checkpoints'}/step-…. Run the stage, with "
                         f"-p {stage_folder.name}.keep_checkpoints=3 to keep some along the way")
    return sorted(found.items())


@dataclass(frozen=True)
class HeldOut:
    """What all checkpoints of a stage are measured on."""

    config: PipelineConfig
    tokenizer: Tokenizer
    texts: dict[str, TokenCache]  # by source
    answers: list[EncodedExample]  # to held-out requests, of a stage that learns from answers
    chat: bool

    @classmethod
    def of(cls, stage_folder: Path, last: Path) -> HeldOut:
        """The held-out data of a stage, by its own record; `last` is one of its checkpoints."""
        config = override(PipelineConfig(), read_record(stage_folder.parent / "run.json")["config"])
        own = read_record(stage_folder / "params.json").get("config", {})
        config = override(config, {name: value for name, value in own.items() if "." not in name})
        config = replace(config, model=read_config(last))
        tokenizer, context = load_tokenizer(last), config.model.context_length
        texts = {name: build_token_cache(name, "validation", tokenizer,
                                         config.data.max_validation_tokens,
                                         world_seed=config.data.world_seed)
                 for name in config.data.sources}
        answers = []
        if stage_folder.name == "sft":
            _, encoded, _ = load_examples(config.sft, tokenizer, context, "validation",
                                          config.data.world_seed)
            answers = [example for examples in encoded.values() for example in examples]
        elif stage_folder.name == "dpo":
            pairs = [pair for source in config.dpo.sources for pair in preference_pairs(
                source, "validation", config.dpo.max_validation_pairs, config.seed,
                config.data.world_seed)[0]]
            answers = [pair.chosen for pair in encode_pairs(tokenizer, pairs, context)[0]]
        return cls(config, tokenizer, texts, answers, is_chat_model(last, tokenizer))

    def floor(self, max_tokens: int | None = None) -> float | None:
        """Nats per token of the text that no model stays below; None where it is not known."""
        caches = [cache.head(max_tokens) for cache in self.texts.values()]
        nats = [cache.floor_nats for cache in caches]
        return None if None in nats else sum(nats) / sum(cache.num_tokens for cache in caches)

    def prompts(self) -> list[str]:
        """The built-in requests, or for a base model the first six words of held-out documents, of
        the sources in turn.
        """
        if self.chat:
            return list(REQUESTS)
        caches = list(self.texts.values())
        places = [(caches[k % len(caches)], k // len(caches)) for k in range(OPENINGS)]
        texts = [self.tokenizer.decode(cache[i][1:33].tolist()) for cache, i in places
                 if i < len(cache)]
        return [re.match(r"\s*(?:\S+\s+){0,5}\S*", text)[0] for text in texts]

    def encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts, in the chat template or as the beginning of a document.
        ValueError for one that leaves no room, or is an empty request.
        """
        found = [encode_prompt(self.tokenizer, prompt) if self.chat
                 else document_prompt(self.tokenizer, [], prompt, 0) for prompt in prompts]
        for prompt, ids in zip(prompts, found):
            if self.chat and not prompt.strip():
                raise ValueError(f"the prompt {prompt!r} has no text: say what the model is asked")
            if len(ids) >= (room := self.config.model.context_length):
                raise ValueError(f"the prompt {prompt[:60]!r} has {len(ids)} tokens, and the "
                                 f"context of this model {room}: use a shorter one")
        return found

    def measured(self, model, max_tokens: int | None) -> dict[str, float]:
        """Bits per byte of the text, and nats per token of the text and of the answers with their
        intervals over documents.
        """
        tables = text_nats(model, self.texts, self.config, 16, max_tokens)
        text = pd.concat(tables.values())
        size = sum(self.texts[name].bytes[table.index].sum() for name, table in tables.items())
        found = {"text": text, **({"answers": example_nats(model, self.answers)}
                                  if self.answers else {})}
        row = {"bits_per_byte": text.nats.sum() / size / math.log(2)}
        for name, table in found.items():
            interval = ratio_interval(table.nats, table.tokens)
            row |= {f"{name}_nats": interval["value"], f"{name}_low": interval["low"],
                    f"{name}_high": interval["high"]}
        return row


def compare_checkpoints(
    checkpoints: Sequence[tuple[int, Path]], held_out: HeldOut, prompts: Sequence[str],
    max_new_tokens: int, max_tokens: int | None = None, device: str = "cpu", progress: bool = False,
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """A row for every checkpoint (step, tokens, `HeldOut.measured`), and what each writes greedily:
    "step 60" -> a text for every prompt; of a base model, prompt and text with ▸ between.

    Args:
        max_tokens: of each source of held-out text; None for all.
    """
    encoded, tokenizer, rows, texts = held_out.encoded(prompts), held_out.tokenizer, [], {}
    ending = end_id(tokenizer) if held_out.chat else end_of_text_id(tokenizer)
    for step, folder in tqdm(checkpoints, desc="checkpoints", unit="checkpoint",
                             disable=not progress):
        model = load_model(folder, device)
        check_prompts(encoded, model.cfg)
        tokens = read_record(folder / "meta.json").get("tokens")
        rows.append({"step": step, "tokens": tokens, **held_out.measured(model, max_tokens)})
        answers = continuations(model, tokenizer, encoded, ending, max_new_tokens=max_new_tokens)
        texts[f"step {step}"] = [answer.text if held_out.chat else f"{prompt} ▸{answer.text}"
                                 for prompt, answer in zip(prompts, answers)]
    shown = {"request": list(prompts)} if held_out.chat else {}
    return pd.DataFrame(rows).round(4), shown | texts
