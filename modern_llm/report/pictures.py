"""The figures that a report has for itself, each drawn from what the stages left behind and
returned; those of the evaluation are the chapters'. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from modern_llm.figures import COLOURS, figure, training_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parameters(parts: dict[str, int]) -> Figure:
    """One bar: where the model's parameters are."""
    fig, ax = figure(8, 1.3)
    left = 0
    for colour, (name, count) in zip(COLOURS, ((n, c) for n, c in parts.items() if c)):
        ax.barh([0], [count], left=left, color=colour,
                label=f"{name.replace('_', ' ')} {count / sum(parts.values()):.1%}")
        left += count
    ax.set(yticks=[], xlabel="parameters")
    ax.spines["left"].set_visible(False)
    ax.legend(ncols=6, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return fig


def curves(metrics: pd.DataFrame, floor: float | None = None) -> Figure | None:
    """Loss and learning rate of a training stage, on held-out and training data; None if the
    metrics are too few.
    """
    if len(metrics) < 2 or not {"tokens", "loss", "lr"} <= set(metrics):
        return None
    return training_curves(metrics, floor=floor, window=5 if len(metrics) > 50 else 1)


def preference_curves(metrics: pd.DataFrame) -> Figure | None:
    """Margin, pairs put right, and both log-probabilities, held out and in training."""
    panels = {"reward margin": ("margin",), "share of pairs right": ("reward_accuracy", "accuracy"),
              "log-probability, nats": ("chosen", "rejected")}
    panels = {label: [n for n in names if n in metrics] for label, names in panels.items()}
    panels = {label: names for label, names in panels.items() if names}
    if not panels or len(metrics) < 2:
        return None
    fig, axes = figure(9, 2.8, columns=len(panels), squeeze=False)
    for ax, (label, names) in zip(axes[0], panels.items()):
        for name, colour in zip(names, COLOURS):
            ax.plot(metrics.step, metrics[name].rolling(5, min_periods=1).mean(), color=colour,
                    lw=1, alpha=0.6)
            if (held_out := f"val_{name}") in metrics:
                seen = metrics[metrics[held_out].notna()]
                ax.plot(seen.step, seen[held_out], "o-", ms=3, color=colour,
                        label=name.replace("_", " "))
        ax.set(xlabel="step", ylabel=label)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    return fig


def stage_results(table: pd.DataFrame) -> Figure:
    """One panel per measure, one point per stage with its interval: columns panel, stage, value,
    low, high.
    """
    panels = list(dict.fromkeys(table.panel))
    rows = -(-len(panels) // 4)
    fig, axes = figure(8.5, 2.2 * rows, columns=min(4, len(panels)), rows=rows, squeeze=False)
    stages = list(dict.fromkeys(table.stage))
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels):
        for row in table[table.panel == panel].itertuples():
            place = stages.index(row.stage)
            ax.errorbar([place], [row.value],
                        [[row.value - row.low], [row.high - row.value]], fmt="o", ms=5, capsize=3,
                        color=COLOURS[place % len(COLOURS)])
        ax.set(title=panel, xticks=range(len(stages)), xticklabels=stages,
               xlim=(-0.5, len(stages) - 0.5))
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", alpha=0.3)
    return fig
