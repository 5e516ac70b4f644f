"""What chapter 38 measures of GRPO: beside its start, votes over its start's samples, and its
control. A plain module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from modern_llm.data.tasks import rerank
from modern_llm.data.tokens import load_tokenizer
from modern_llm.figures import COLOURS, figure
from modern_llm.models.verifier import load_verifier
from modern_llm.statistics import mean_interval, paired_difference, proportion_interval
from modern_llm.training.verifier_scores import score_samples

if TYPE_CHECKING:
    from modern_llm.training.grpo import RewardTraining


def learning_curves(metrics: pd.DataFrame):
    """Reward, groups that differ and surprise against the step; returns the figure.

    Args:
        metrics: rows of `metrics.jsonl`, step 0 = before training.
    """
    fig, axes = figure(6.6, 1.9, columns=3)
    for ax, name, label in zip(axes, ("reward", "spread", "surprise"),
                               ("share", "groups that differ", "nats per token")):
        ax.plot(metrics.step, metrics[name], lw=0.5, color=COLOURS[0])
        ax.plot(metrics.step, metrics[name].rolling(5, min_periods=1).mean(), color=COLOURS[0],
                label="mean reward")
        ax.set(xlabel="step", ylabel=label)
    seen = metrics.dropna(subset="val_right")
    axes[0].plot(seen.step, seen.val_right, "o-", ms=3, color=COLOURS[1], label="held out, greedy")
    axes[0].legend(fontsize=7)
    for ax in axes:
        ax.set_ylim(bottom=0)
    return fig


def compared(recipe: RewardTraining, judged: Mapping[str, tuple], verifier: Path) -> list[dict]:
    """GRPO beside its start, its control, and votes over the start's samples, as table rows.

    Args:
        judged: "before", "after" and, where there is one, "control" -> greedy answers to the
            held-out problems, samples of them (both of `tasks.solve`), and more that is not read.
        verifier: the run's checkpoint of one, which may be missing.
    """
    size, problems = recipe.train.group_size, recipe.held_problems
    right = {name: greedy.set_index("problem").right.astype(float)
             for name, (greedy, *_) in judged.items()}
    greedily = f"{len(problems)} held-out problems, temperature 0"
    rows = [{"metric": f"greedy exact match, {name}", **mean_interval(values.to_numpy()),
             "protocol": greedily} for name, values in right.items()]
    start = judged["before"][1]
    ways = ["majority", "log_prob"]
    if (verifier / "verifier.safetensors").is_file():
        judge = load_verifier(verifier, recipe.run.device)
        start = start.assign(score=score_samples(judge, load_tokenizer(verifier), start, problems))
        ways += ["weighted_vote", "best_of_n"]
    votes = {f"{way}@{size}, before": rerank(start, size, way) for way in ways}
    votes[f"majority@{size}, after"] = rerank(judged["after"][1], size, "majority")
    rows += [{"metric": name, **mean_interval(values.to_numpy()),
              "protocol": f"{size} samples of each held-out problem at temperature "
                          f"{recipe.train.temperature:g}"} for name, values in votes.items()]
    against = {name: values for name, values in {**right, **votes}.items()
               if not name.endswith("after")}
    rows += [{"metric": f"after - {name}", **paired_difference(
        right["after"].to_numpy(), values.loc[right["after"].index].to_numpy()),
        "protocol": "greedy exact match after, paired by problem"}
        for name, values in against.items()]
    for name, (greedy, *_) in judged.items():
        rows.append({"metric": f"answer length, {name}", **mean_interval(greedy.tokens.to_numpy()),
                     "protocol": f"tokens, {greedily}"})
        rows.append({"metric": f"ends by itself, {name}",
                     **proportion_interval(greedy.ended.sum(), len(greedy)), "protocol": greedily})
    return rows
