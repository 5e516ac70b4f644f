"""Draw the figures of README.md and of the guides: what local-smoke's ledger says, at the width of
a phone, and the pipeline. Legible on light and on dark pages.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

root = Path(__file__).resolve().parent.parent
GREY = "#7d848c"  # stands out on white and on black alike
# white text stands out on each
BLUE, GREEN, ORANGE, PURPLE, SLATE = "#0173b2", "#017d5b", "#c04f01", "#8b4a92", "#66707a"
plt.rcParams.update({"svg.hashsalt": "modern_llm", "font.size": 9, "text.color": GREY,
                     "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY,
                     "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False})


def save(fig, name: str) -> None:
    """Write a figure as SVG with a transparent background; the same figure is the same file."""
    fig.savefig(root / "report" / "figures" / name, transparent=True,
                metadata={"Date": None, "Creator": None})
    plt.close(fig)


def box(ax, x: float, y: float, width: float, height: float, colour: str, title: str,
        text: str) -> None:
    """A filled box around (x, y): a title, and what belongs to it."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                                boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="none"))
    lines = text.count("\n") + 1
    ax.text(x, y + 0.085 * lines, title, color="white", ha="center", va="center", size=10,
            weight="bold")
    ax.text(x, y - 0.115, text, color="white", ha="center", va="center", size=8, linespacing=1.25)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, and a word above its middle."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=GREY, lw=1.3,
                                 shrinkA=2, shrinkB=2))
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.06, text, ha="center",
            va="bottom", size=8)


def pipeline() -> None:
    """Above, what a notebook is; below, the stages in order, what each learns from, and the weights
    it hands on.
    """
    fig = plt.figure(figsize=(9, 3.2))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0.05, 3.25))
    ax.set_axis_off()
    box(ax, 0.97, 2.85, 1.6, 0.62, SLATE, "nbs/*.ipynb", "one source")
    uses = {"a chapter": "JupyterLab, make docs", "a module": "import modern_llm",
            "a run": "papermill, here or SLURM"}
    for place, (what, how) in enumerate(uses.items()):
        box(ax, 3.43 + 2.2125 * place, 2.85, 1.95, 0.62, BLUE, what, how)
    arrow(ax, (1.77, 2.85), (2.46, 2.85), "is")
    for place, word in ((4.536, "and"), (6.749, "and")):
        ax.text(place, 2.85, word, ha="center", va="center", size=8)
    stages = [("03 pretrain", "next token\nof any text", GREEN, "pretrained"),
              ("04 SFT", "answers\nof chats", GREEN, "chat"),
              ("05 DPO", "chosen over\nrejected", GREEN, "policy"),
              ("06 verifier", "right or wrong,\nits own answers", GREEN, "judge"),
              ("07 evaluation", "same items\nfor every stage", ORANGE, ""),
              ("08 attention", "where\nheads look", ORANGE, "")]
    for place, (name, text, colour, hands_on) in enumerate(stages):
        x = 0.78 + 1.488 * place
        box(ax, x, 1.45, 1.22, 0.86, colour, name, text)
        if place < len(stages) - 1:
            arrow(ax, (x + 0.6, 1.45), (x + 0.89, 1.45))
        if hands_on:
            ax.text(x, 0.93, f"→ {hands_on}", ha="center", va="center", size=8)
    ax.text(0.17, 2.16, "The stages, in this order: the same notebooks run one after the other",
            ha="left", va="center", size=9, style="italic")
    box(ax, 4.5, 0.42, 8.66, 0.46, PURPLE, "", "")
    ax.text(4.5, 0.42, "runs/<run>/: executed notebooks, metrics, checkpoints that transformers "
                       "opens   →   report/: tables with intervals, figures, commands",
            color="white", ha="center", va="center", size=8.5)
    save(fig, "pipeline.svg")


def results() -> None:
    """Four shares that the stages must move, each with its 95% interval."""
    panels = {
        "instructions\nexact match": [("instructions", "exact match", ("base", "sft", "dpo"))],
        "preferred answer\nis likelier": [("preferences", "accuracy", ("base", "sft", "dpo"))],
        "word problems\none greedy answer": [("problems", "exact match", ("base", "sft", "dpo"))],
        "word problems, middle levels\none answer, or a vote of 16":
            [("problems, sampled", "exact match", ("dpo",)),
             ("problems, sampled", "majority@16", ("dpo",)),
             ("problems, sampled", "weighted_vote@16", ("verifier",))]}
    ledger = pd.read_csv(root / "report" / "results" / "local-smoke" / "ledger.csv").set_index(
        ["task", "metric", "stage"])
    colours = {"base": SLATE, "sft": BLUE, "dpo": GREEN, "verifier": ORANGE}
    names = {"base": "pretrained", "sft": "SFT", "dpo": "DPO", "majority@16": "majority",
             "weighted_vote@16": "verifier's"}
    fig, axes = plt.subplots(2, 2, figsize=(5, 4.4), sharey=True, layout="constrained")
    for ax, (title, measures) in zip(axes.flat, panels.items()):
        bars = [(names.get(metric, "greedy" if "sampled" in task else names[stage]), stage,
                 ledger.loc[(task, metric, stage)])
                for task, metric, stages in measures for stage in stages]
        for place, (label, stage, row) in enumerate(bars):
            ax.bar([place], [row.value], width=0.62, color=colours[stage], alpha=0.35)
            ax.errorbar([place], [row.value], [[row.value - row.low], [row.high - row.value]],
                        fmt="o", ms=5, color=colours[stage], capsize=4, lw=1.5)
            ax.text(place, row.high + 0.03, f"{row.value:.2f}", ha="center", va="bottom")
        ax.set(xticks=range(len(bars)), xticklabels=[label for label, _, _ in bars],
               ylim=(0, 1.12), yticks=[0, 0.5, 1])
        ax.set_title(title, size=9, color=GREY)
        ax.tick_params(length=0)
    save(fig, "overview.svg")


if __name__ == "__main__":
    pipeline()
    results()
