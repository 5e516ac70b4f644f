"""One look for every figure: size, colours and the two or three shapes the chapters and reports share."""

from __future__ import annotations

import matplotlib.pyplot as plt
import seaborn as sns

COLOURS = sns.color_palette("colorblind")


def figure(width: float = 6.0, height: float = 3.0, columns: int = 1, rows: int = 1, **options):
    """A figure of `width` × `height` inches at 100 dpi and its axes (one, or an array of rows × columns)."""
    sns.set_theme(style="ticks", context="notebook", palette="colorblind", font_scale=0.8)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
                         "legend.frameon": False, "savefig.dpi": 100})
    return plt.subplots(rows, columns, figsize=(width, height), dpi=100, layout="constrained", **options)


def heatmap(ax, values, xlabel: str = "", ylabel: str = "", title: str = "", colour_bar: bool = True, **options):
    """Draw a matrix (rows downwards) on `ax`; options go to seaborn's heatmap."""
    sns.heatmap(values, ax=ax, cmap=options.pop("cmap", "mako_r"), cbar=colour_bar, square=options.pop("square", True),
                rasterized=True, **options)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax
