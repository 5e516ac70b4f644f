"""What every head does and what the model loses without it, checkpoint by checkpoint.

A plain module over the measures of chapter 08.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from tokenizers import Tokenizer

from modern_llm.evaluation.attention import (
    attention_maps, induction_attention, planted_repetition, repetition_gain, row_measures,
    without_head,
)
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.statistics import mean_interval


def ordinary_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids of a tokenizer that are text, special tokens left out."""
    special = tokenizer.get_added_tokens_decoder()
    return [i for i in range(tokenizer.get_vocab_size()) if i not in special]


def head_scores(model: ModernDecoderLM, tokens: Sequence[int], start_id: int, length: int = 24,
                rows: int = 32, seed: int = 0) -> pd.DataFrame:
    """One row per head, all on random tokens that are said twice.

    Args:
        tokens: ids to draw from; at least 2·length of them.
        start_id: stands in front.
        length: tokens of one copy.
        rows: texts; the intervals are over them.
        seed: of the draws.

    Returns:
        By layer and head, `sink` (first token and learned sink) and `previous` as mean weights on
        the texts whose second half is new; `induction`, the weight on the token to continue with
        less the same without a repetition; and `lost`, `low`, `high`, `n`: how much less the
        repetition saves, in nats per token of the second copy, with that head's output set to 0,
        and the 95% interval over texts. `attrs["saved"]`: what it saves with all heads.
    """
    planted, control = planted_repetition(tokens, length, rows, start_id, seed)
    maps, without = attention_maps(model, planted), attention_maps(model, control)
    induction = (induction_attention(maps) - induction_attention(without)).mean(1)
    measures = [row_measures(without[:, row]) for row in range(rows)]
    mean = {name: sum(found[name].mean(-1) for found in measures) / rows
            for name in ("sink", "previous")}
    whole, found = repetition_gain(model, planted, control), []
    for layer in range(model.cfg.num_layers):
        for head in range(model.cfg.num_heads):
            with without_head(model, layer, head):
                lost = whole - repetition_gain(model, planted, control)
            found.append({"layer": layer, "head": head,
                          "sink": mean["sink"][layer, head].item(),
                          "previous": mean["previous"][layer, head].item(),
                          "induction": induction[layer, head].item(),
                          **mean_interval(lost.numpy())})
    table = pd.DataFrame(found).rename(columns={"value": "lost"}).set_index(["layer", "head"])
    table.attrs["saved"] = mean_interval(whole.numpy())
    return table
