"""The figures that chapters 06 and 07 and the report share, each drawn from tables and returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from modern_llm.figures import COLOURS, figure, heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# the same on every page
METHOD_COLOURS = {"random": COLOURS[7], "log_prob": COLOURS[1], "calculator": COLOURS[2],
                  "majority": COLOURS[0], "best_of_n": COLOURS[4], "weighted_vote": COLOURS[3],
                  "majority_trained_on": COLOURS[9], "pass": "black"}


# ---- a verifier ----------------------------------------------------------------------------------


def judgement_curves(metrics: pd.DataFrame) -> Figure:
    """Cross-entropy of the judgement, and the within-problem AUC of some held-out samples, by step.

    Args:
        metrics: step, judgement, and val_auc where the held-out samples can show one.
    """
    fig, (left, right) = figure(6, 2.2, columns=2, sharex=True)
    left.plot(metrics.step, metrics.judgement, label="judgement, training")
    left.axhline(np.log(2), color="black", lw=1, ls="--", label="log 2")
    left.set(xlabel="step", ylabel="nats per answer", ylim=(0, None))
    left.legend(fontsize=8, loc="lower left")
    if "val_auc" in metrics:
        right.plot(metrics.step[metrics.val_auc.notna()], metrics.val_auc.dropna(), "o-",
                   color=COLOURS[2])
    right.axhline(0.5, color="black", lw=1, ls="--")
    right.set(xlabel="step", ylabel="within-problem AUC", ylim=(0.4, 1))
    return fig


def score_strips(strips: dict[str, tuple[list[str], np.ndarray]], most: int = 64) -> Figure:
    """The score after every token, one strip an answer: heading -> (tokens, scores)."""
    fig, axes = figure(7, 1.3 * len(strips), rows=len(strips))
    for ax, (name, (tokens, values)) in zip(axes, strips.items()):
        heatmap(ax, values[None, :most], title=f"{name}: {values[-1]:.2f} at the end",
                square=False, vmin=0, vmax=1, cmap="RdYlGn", yticklabels=False,
                xticklabels=[repr(token)[1:-1] for token in tokens[:most]])
        ax.tick_params(axis="x", labelsize=7, rotation=90, length=0)
    return fig


def reliability_curve(table: pd.DataFrame, error: float | None = None) -> Figure:
    """Share right against the score, answers in bins: columns score, value, low, high; `error` is
    said above.
    """
    fig, ax = figure(3.2, 2.8)
    ax.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    ax.errorbar(table.score, table.value, [table.value - table.low, table.high - table.value],
                fmt="o-", ms=4, capsize=2)
    ax.set(xlabel="score", ylabel="share right")
    if error is not None:
        ax.set_title(f"calibration error {error:.3f}")
    top = min(1.01, 1.1 * max(table.score.max(), table.high.max()))
    ax.axis([-0.01, top, -0.01, top])
    return fig


def rerank_curves(table: pd.DataFrame, greedy: float | None = None,
                  trained_on: float | None = None) -> Figure:
    """Share right against the number of answers to choose from: columns method, size, value, low,
    high; dashed: the greedy answer; dotted: that of the generator trained on.

    The method "pass" is the bound: whether any of them is right.
    """
    fig, ax = figure(5.8, 3)
    for method, line in table.groupby("method", sort=False):
        line, colour = line.sort_values("size"), METHOD_COLOURS.get(method, COLOURS[5])
        ax.plot(line["size"], line.value, "o-", ms=4, color=colour, label=method.replace("_", " "))
        if method in ("majority", "majority_trained_on", "weighted_vote"):
            ax.fill_between(line["size"], line.low, line.high, color=colour, alpha=0.1, lw=0)
    for share, style, label in ((greedy, "--", "greedy"), (trained_on, ":", "greedy, trained on")):
        if share is not None:
            ax.axhline(share, color="black", lw=1, ls=style, label=label)
    sizes = sorted(table["size"].unique())
    ax.set(xlabel="answers to choose from", ylabel="share right", xscale="log", xticks=sizes,
           xticklabels=sizes)
    ax.minorticks_off()
    ax.legend(fontsize=8, ncols=2)
    return fig


def score_histogram(samples: pd.DataFrame | None) -> Figure | None:
    """The scores of right and of wrong samples; None without samples."""
    if samples is None:
        return None
    fig, ax = figure(6, 2.6)
    for right, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
        ax.hist(samples.score[samples.right == right], bins=np.linspace(0, 1, 31), alpha=0.6,
                color=colour, label="right" if right else "wrong")
    ax.set(xlabel="score of a sample", ylabel="samples")
    ax.legend()
    return fig


# ---- checkpoints side by side --------------------------------------------------------------------


def checkpoint_curve(table: pd.DataFrame, floor: float | None = None) -> Figure:
    """Nats per token by step, of held-out text and, where there are any, of held-out answers; bands
    are the intervals, dashed: the text's entropy floor, if known.

    Args:
        table: step, text_nats, text_low, text_high, and the same of answers.
    """
    fig, ax = figure(6, 3)
    for kind, colour in (("text", COLOURS[0]), ("answers", COLOURS[3])):
        if f"{kind}_nats" in table:
            ax.plot(table.step, table[f"{kind}_nats"], "o-", ms=4, color=colour,
                    label=f"held-out {kind}")
            ax.fill_between(table.step, table[f"{kind}_low"], table[f"{kind}_high"], color=colour,
                            alpha=0.15, lw=0)
    if floor is not None:
        ax.axhline(floor, color="black", lw=1, ls="--", label="entropy floor of the text")
    ax.set(xlabel="step", ylabel="nats per token", ylim=(0, None))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


# ---- stages side by side -------------------------------------------------------------------------


def change_chart(labels: pd.Series, changes: pd.DataFrame, xlabel: str = "change",
                 width: float = 8) -> Figure:
    """Every change with its interval, the first on top, grey where it is not significant.

    Args:
        changes: columns change, low, high, significant.
    """
    fig, ax = figure(width, 0.8 + 0.22 * len(changes))
    colours = [COLOURS[0] if real else "gray" for real in changes.significant]
    places = range(len(changes))
    ax.hlines(places, changes.low, changes.high, colors=colours)
    ax.scatter(changes.change, places, c=colours, zorder=3)
    ax.set_yticks(places, labels)
    ax.axvline(0, color="black", lw=1, ls="--")
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    return fig


def gains_chart(gains: pd.DataFrame) -> Figure:
    """What each stage changed in exact match and accuracy, in points.

    Args:
        gains: of `ledger.stage_gains`.
    """
    shown = gains[gains.metric.isin(("exact match", "accuracy"))
                  & ~gains.against.isin(("majority class", "no calculator"))]
    points = {name: 100 * shown[name] for name in ("change", "low", "high")}
    return change_chart(shown.stage + " − " + shown.against + ": " + shown.task,
                        shown.assign(**points), "points gained, with 95% interval", 6.5)


def percent_bars(table: pd.DataFrame) -> np.ndarray:
    """The lengths of error bars below and above, in percent."""
    # an interval may end at its value, but for the last digit
    return 100 * np.stack([table.value - table.low, table.high - table.value]).clip(min=0)


def sentiment_chart(ledger: pd.DataFrame, stages: Sequence[str]) -> Figure:
    """Accuracy of each way to read the labels' probabilities, by number of demonstrations, one
    panel a stage; dashed: the commonest label.
    """
    of_task = ledger[ledger.task == "sentiment"]
    names = of_task.metric.str.extract(r"^accuracy, (?P<shots>\d+)-shot, (?P<method>\w+)$")
    rows = of_task.join(names).dropna(subset="shots")
    places = {shots: place for place, shots in enumerate(sorted(set(rows.shots), key=int))}
    fig, axes = figure(max(min(7, 2.6 * len(stages)), 1.6 * len(stages)), 2.8,
                       columns=len(stages), sharey=True, squeeze=False)
    for ax, stage in zip(axes[0], stages):
        by_method = rows[rows.stage == stage].groupby("method", sort=False)
        for i, (method, line) in enumerate(by_method):
            ax.errorbar(line.shots.map(places).to_numpy(float) + 0.08 * (i - 1.5), 100 * line.value,
                        yerr=percent_bars(line), fmt="o-", ms=3, lw=1, color=COLOURS[i],
                        label=method)
        ax.set_xticks(range(len(places)), places)
        majority = of_task[of_task.stage.eq(stage) & of_task.metric.eq("majority class")].value
        for share in majority:
            ax.axhline(100 * share, color="black", lw=1, ls="--")
        ax.set(title=stage, xlabel="demonstrations")
    axes[0][0].set_ylabel("accuracy, %")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
               fontsize=8)
    return fig


def levels_chart(ledger: pd.DataFrame, stages: Sequence[str], label: str) -> Figure | None:
    """Greedy exact match on word problems by level, one line a stage; `label`: what a level is.
    None where no level was measured.
    """
    rows = ledger[ledger.metric.str.startswith("exact match, level") & (ledger.task == "problems")]
    if rows.empty:
        return None
    level = rows.metric.str.extract(r"(\d+)$")[0].astype(int)
    stages = [stage for stage in stages if stage in set(rows.stage)]
    fig, ax = figure(5, 2.6)
    for i, stage in enumerate(stages):
        line = rows[rows.stage == stage]
        beside = level[line.index] + 0.06 * (2 * i - len(stages) + 1)
        ax.errorbar(beside, 100 * line.value, yerr=percent_bars(line), fmt="o-", ms=4, lw=1.2,
                    label=stage)
    ax.set(xlabel=label, ylabel="exact match, %", xticks=sorted(level.unique()), ylim=(-3, 103))
    ax.legend()
    return fig


def sample_curves(curves: dict[str, list[dict]]) -> Figure | None:
    """`rerank_curves` of the problems that were sampled; None where none were.

    Args:
        curves: method -> points (size, value, low, high), as in gsm8k_analysis.json.
    """
    rows = [{"method": method, **point} for method, points in curves.items() for point in points]
    return rerank_curves(pd.DataFrame(rows)) if rows else None
