"""The pictures of a report, each drawn from tables that the stages left behind, and saved as PNG.
No torch.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from modern_llm.figures import COLOURS, figure, training_curves

# places in the palette, the same on every page
STAGE_COLOURS = {"base": 7, "sft": 0, "dpo": 2, "verifier": 3, "checkpoint": 4}
METHOD_COLOURS = {"pass": 7, "random": 0, "log_prob": 1, "calculator": 8, "majority": 2,
                  "best_of_n": 4, "weighted_vote": 3}


def _save(fig, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


def parameters(parts: dict[str, int], path: Path) -> Path:
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
    return _save(fig, path)


def cost(minutes: dict[str, float], path: Path) -> Path:
    """One bar per stage: how long it took."""
    fig, ax = figure(6, 0.6 + 0.25 * len(minutes))
    ax.barh(list(minutes), list(minutes.values()), color=COLOURS[0])
    for place, value in enumerate(minutes.values()):
        ax.annotate(f" {value:.1f}", (value, place), va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="minutes")
    return _save(fig, path)


def curves(metrics: pd.DataFrame, path: Path, floor: float | None = None) -> Path | None:
    """Loss and learning rate of a training stage, on held-out and training data; None if the
    metrics are too few.
    """
    if len(metrics) < 2 or not {"tokens", "loss", "lr"} <= set(metrics):
        return None
    return _save(training_curves(metrics, floor=floor, window=5 if len(metrics) > 50 else 1), path)


def preference_curves(metrics: pd.DataFrame, path: Path) -> Path | None:
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
    return _save(fig, path)


def stage_results(table: pd.DataFrame, path: Path) -> Path:
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
            colour = COLOURS[STAGE_COLOURS.get(row.stage, 5)]
            ax.errorbar([stages.index(row.stage)], [row.value],
                        [[row.value - row.low], [row.high - row.value]], fmt="o", ms=5, capsize=3,
                        color=colour)
        ax.set(title=panel, xticks=range(len(stages)), xticklabels=stages,
               xlim=(-0.5, len(stages) - 0.5))
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", alpha=0.3)
    return _save(fig, path)


def gains(table: pd.DataFrame, path: Path) -> Path:
    """Every change with its interval, filled where it is significant: columns label, stage, change,
    low, high, significant.
    """
    fig, ax = figure(8, 0.8 + 0.22 * len(table))
    for place, row in enumerate(table.itertuples()):
        colour = COLOURS[STAGE_COLOURS.get(row.stage, 5)]
        ax.errorbar([row.change], [place],
                    xerr=[[row.change - row.low], [row.high - row.change]], fmt="o", ms=5,
                    capsize=2, color=colour, mfc=colour if row.significant else "white")
    ax.axvline(0, color="black", lw=1)
    ax.set(yticks=range(len(table)), yticklabels=list(table.label), xlabel="change")
    ax.tick_params(labelsize=7)
    ax.invert_yaxis()
    return _save(fig, path)


def rerank(table: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Share right against the number of answers to choose from: columns method, size, value, low,
    high.
    """
    fig, ax = figure(6.4, 3.4)
    for method, line in table.groupby("method", sort=False):
        line, colour = line.sort_values("size"), COLOURS[METHOD_COLOURS.get(method, 5)]
        ax.plot(line["size"], line.value, "o--" if method == "pass" else "o-", ms=4, color=colour,
                label=method.replace("_", " "))
        if method in ("random", "majority", "weighted_vote"):
            ax.fill_between(line["size"], line.low.astype(float),
                            line.high.astype(float), color=colour, alpha=0.12, lw=0)
    sizes = sorted(table["size"].unique())
    ax.set(xlabel="answers to choose from", ylabel="share right", xscale="log", xticks=sizes,
           xticklabels=sizes, title=title)
    ax.minorticks_off()
    ax.legend(fontsize=7, ncols=2)
    return _save(fig, path)


def calibration(table: pd.DataFrame, path: Path) -> Path:
    """Share right against the score, answers in bins by score: columns score, value, low, high."""
    fig, ax = figure(3.6, 3.2)
    ax.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    ax.errorbar(table.score, table.value, [table.value - table.low, table.high - table.value],
                fmt="o-", ms=4, capsize=2)
    ax.set(xlabel="score", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    return _save(fig, path)


def sentiment(table: pd.DataFrame, majority: float, path: Path) -> Path:
    """Accuracy against the number of demonstrations, one panel per model, one line per method."""
    stages = list(dict.fromkeys(table.stage))
    fig, axes = plt.subplots(1, len(stages),
                             figsize=(2.4 * len(stages) + 0.8, 2.8), sharey=True, squeeze=False)
    for ax, stage in zip(axes[0], stages):
        for i, (method, of) in enumerate(table[table.stage == stage].groupby("method", sort=False)):
            ax.errorbar(of.shots, 100 * of.value,
                        yerr=100 * abs(of[["low", "high"]].T.to_numpy() - of.value.to_numpy()),
                        fmt="o-", ms=3, lw=1, color=COLOURS[i], label=method)
        ax.axhline(100 * majority, color="black", lw=1, ls="--")
        ax.set(title=stage, xlabel="demonstrations")
    axes[0][0].set_ylabel("accuracy, %")
    axes[0][-1].legend(fontsize=7)
    fig.tight_layout()
    return _save(fig, path)


def levels(table: pd.DataFrame, path: Path) -> Path:
    """Share of word problems right against their level, one line per stage: columns stage, level,
    value, low, high.
    """
    fig, ax = figure(4.6, 3)
    for stage, line in table.groupby("stage", sort=False):
        ax.errorbar(line.level, line.value, [line.value - line.low, line.high - line.value],
                    fmt="o-", ms=4, capsize=2, label=stage,
                    color=COLOURS[STAGE_COLOURS.get(stage, 5)])
    ax.set(xlabel="level", ylabel="share right, greedy",
           ylim=(-0.02, 1.02), xticks=sorted(table.level.unique()))
    ax.legend(fontsize=7)
    return _save(fig, path)
