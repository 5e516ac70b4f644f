"""The figures of chapter 08: the table of heads, every head's map of a text, and one map with the
tokens written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch

from modern_llm.figures import colour_map, figure, heatmap

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.figure import Figure
    from torch import Tensor

    from modern_llm.evaluation.attention import EncodedAttentionExample


def weight_scale(fig: Figure, picture, axes, roots: bool = True) -> None:
    """A colour bar beside `axes`, from weight 0 to 1; `roots`: the colours are square roots of
    weights.
    """
    weights = [0, 0.05, 0.25, 0.5, 1] if roots else [0, 0.5, 1]
    bar = fig.colorbar(picture, ax=axes, shrink=0.8, aspect=25, pad=0.02,
                       ticks=[w ** 0.5 if roots else w for w in weights])
    bar.ax.set_yticklabels([f"{w:g}" for w in weights])
    bar.set_label("weight" if roots else "measure")
    bar.outline.set_visible(False)


def heads_figure(table: pd.DataFrame) -> Figure:
    """The table of heads as one small map (layers × heads) a measure, all on the scale 0 to 1."""
    measures = ["self", "previous", "local", "sink", "evenness", "induction"]
    layers, heads = (n + 1 for n in table.index.max())
    fig, axes = figure(8, 1.0 + 1.6 * max(layers / heads, 0.5), columns=len(measures), sharey=True)
    for ax, name in zip(axes, measures):
        heatmap(ax, table[name].unstack("head"), "head", "layer" if name == "self" else "", name,
                vmin=0, vmax=1)
    weight_scale(fig, axes[-1].collections[0], axes, roots=False)
    return fig


def maps_figure(weights: Float[Tensor, "l h t s"]) -> Figure:
    """Every head's map of one text: layers downwards, heads to the right, all on one colour scale.
    """
    layers, heads, t, _ = weights.shape
    gap = max(1, t // 12)
    mosaic = torch.full((layers * (t + gap), heads * (t + gap)), torch.nan)
    for layer in range(layers):
        for head in range(heads):
            top, left = layer * (t + gap), head * (t + gap)
            mosaic[top:top + t, left:left + t] = weights[layer, head].sqrt()
    side = min(1.4, 14 / heads)
    fig, ax = figure(side * heads + 1.2, side * layers + 0.4)
    picture = ax.imshow(mosaic[:-gap, :-gap].numpy(), cmap=colour_map("mako_r"), vmin=0,
                        vmax=1, interpolation="nearest")
    weight_scale(fig, picture, ax)
    middles = lambda n: [i * (t + gap) + t / 2 for i in range(n)]
    ax.set(xticks=middles(heads), xticklabels=range(heads), xlabel="head",
           yticks=middles(layers), yticklabels=range(layers), ylabel="layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig


def head_figure(weights: Float[Tensor, "t s"], item: EncodedAttentionExample,
                title: str = "") -> Figure:
    """One head's map of one example with the tokens written out; key tokens are marked with an
    arrow.
    """
    t = len(item.labels)
    side = 1.2 + 0.14 * t
    fig, ax = figure(side + 0.8, side)
    labels = [f"→ {label}" if i in item.keys else label for i, label in enumerate(item.labels)]
    heatmap(ax, weights.sqrt().numpy(), title=title, vmin=0, vmax=1, xticklabels=labels,
            yticklabels=labels)
    ax.tick_params(labelsize=7, length=0)
    weight_scale(fig, ax.collections[0], ax)
    return fig
