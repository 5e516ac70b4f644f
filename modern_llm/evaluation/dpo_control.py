"""What chapter 05 measures of DPO's control: the same start, steps and batches without the
preferences.

A plain module; the control is trained by `PreferenceTuning.fit`.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from modern_llm.files import cached_frame
from modern_llm.models.saving import load_model
from modern_llm.statistics import (
    paired_difference, perplexity_ratio, proportion_interval, ratio_interval,
)
from modern_llm.training.control import FOLDER
from modern_llm.training.dpo import PreferenceTuning, pair_log_probs


def control_rows(recipe: PreferenceTuning, pairs: pd.DataFrame, answers_after: pd.DataFrame,
                 text_before: dict[str, pd.DataFrame], judge: Callable) -> list[dict]:
    """The control beside DPO, as table rows; none where no control was trained.

    Args:
        recipe: whose control it is.
        pairs: source, prompt, and `after`, whether DPO ranks it rightly: a row per held-out pair.
        answers_after: DPO's answers to the held-out prompts, `all rules` among the columns.
        text_before: nats of held-out text of the model that both started from, by source.
        judge: (model, name) -> its answers and its nats of held-out text, like those two.
    """
    if not recipe.train.trains_control:
        return []
    folder = recipe.run.folder
    model = load_model(folder / FOLDER / "checkpoint", recipe.run.device)
    found = cached_frame(folder / "held_out_control.jsonl",
                         lambda: pair_log_probs(model, recipe.held_out))
    answers, text = judge(model, "control")
    right, rows = (found.chosen > found.rejected).astype(float), []
    for source, of in pairs.groupby("source", sort=False):
        for metric, values in (("control", right), ("after - control", pairs.after - right)):
            groups = values[of.index].groupby(of.prompt)
            rows.append({"metric": f"preference accuracy, {metric}, {source}",
                         **ratio_interval(groups.sum(), groups.size()),
                         "protocol": f"{len(of)} held-out pairs of {source}, {groups.ngroups} "
                                     "prompts; interval over prompts"})
    for side in ("chosen", "rejected"):
        shift = ratio_interval(found[side] - recipe.before[side], found[f"{side}_tokens"])
        rows.append({"metric": f"{side} log-probability, change, control", **shift,
                     "protocol": f"nats per token, {len(found)} held-out pairs"})
    obeyed = answers["all rules"].dropna().astype(float)
    if len(obeyed):
        after = answers_after["all rules"][obeyed.index].astype(float)
        rows += [{"metric": "obeys all rules, control",
                  **proportion_interval(obeyed.sum(), len(obeyed)),
                  "protocol": f"{len(obeyed)} held-out prompts, greedy, at most "
                              f"{recipe.new_tokens} tokens"},
                 {"metric": "obeys all rules, after - control",
                  **paired_difference(after.to_numpy(), obeyed.to_numpy()),
                  "protocol": "paired by prompt"}]
    return rows + [{"metric": f"perplexity tax, control, {source}",
                    **perplexity_ratio(before, text[source]),
                    "protocol": "perplexity after over that before, the same held-out documents"}
                   for source, before in text_before.items()]
