"""One look for every figure: size, colours and the two or three shapes the chapters and reports
share.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_suffix(".mplstyle"), use_default_template=False)
COLOURS = [to_rgb(colour) for colour in STYLE["axes.prop_cycle"].by_key()["color"]]


def figure(width: float = 6.0, height: float = 3.0, columns: int = 1, rows: int = 1, **options):
    """A figure of `width` × `height` inches at 100 dpi and its axes (one, or an array of rows ×
    columns).

    From here on this notebook, if it is one, stores every figure as `small_png`.
    """
    plt.rcParams.update(STYLE)
    made = plt.subplots(rows, columns, figsize=(width, height), dpi=100, layout="constrained",
                        **options)
    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)
        if "inline" in plt.get_backend():  # there it is drawn when it is shown, and that is enough
            made[0].canvas.draw_idle = lambda *_: None
    return made


def small_png(fig: Figure, colours: int = 128) -> bytes:
    """The figure as a PNG with a palette: to the eye the same, a third of the size."""
    from PIL import Image

    if fig.get_layout_engine():  # it fits, so that one drawing is enough
        # a figure that was shown and closed has no canvas of its own
        canvas = fig.canvas if hasattr(fig.canvas, "buffer_rgba") else FigureCanvasAgg(fig)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    else:
        from IPython.core.pylabtools import print_figure

        drawn = Image.open(io.BytesIO(print_figure(fig, "png")))
    drawn.convert("RGB").quantize(colours).save(packed := io.BytesIO(), "PNG", optimize=True)
    return packed.getvalue()


def colour_map(name: str):
    """A colour map of seaborn's, such as "mako_r" or "vlag", which matplotlib does not know."""
    import seaborn as sns  # and with it scipy, where that is installed: two seconds

    return sns.color_palette(name, as_cmap=True)


def heatmap(ax, values, xlabel: str = "", ylabel: str = "", title: str = "", **options):
    """Draw a matrix (rows downwards) on `ax`; options go to seaborn's heatmap."""
    import seaborn as sns

    sns.heatmap(values, ax=ax, cmap=options.pop("cmap", "mako_r"), cbar=False,
                square=options.pop("square", True), rasterized=True, **options)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax


def training_curves(metrics, floor: float | None = None, window: int = 1):
    """Loss and validation loss against tokens on a log scale (with the entropy floor, if known),
    and the learning rate beside them.

    Args:
        metrics: DataFrame of `metrics.jsonl`: tokens, loss, lr, and where validated val_loss.
        floor: nats per token no model can beat; drawn dashed.
        window: rows over which the training loss is averaged.
    """
    fig, (left, right) = figure(8, 3, columns=2, width_ratios=[3, 2])
    millions = metrics.tokens / 1e6
    left.plot(millions, metrics.loss.rolling(window, min_periods=1).mean(), lw=1.2,
              label="training")
    if "val_loss" in metrics:
        seen = metrics.val_loss.notna()
        left.plot(millions[seen], metrics.val_loss[seen], "o-", ms=4, label="held out")
    if floor is not None:
        left.axhline(floor, color="black", lw=1, ls="--", label="entropy floor")
    left.set(xlabel="tokens, millions", ylabel="nats per token", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend()
    right.plot(millions, metrics.lr, color=COLOURS[2], lw=1.5)
    right.set(xlabel="tokens, millions", ylabel="learning rate (AdamW)", ylim=(0, None))
    return fig


@contextlib.contextmanager
def live_curves(metrics_file: Path, seconds: float = 2.0, **options) -> Iterator[None]:
    """Inside, a notebook open in Jupyter shows the curves of a training run, redrawn every
    `seconds` while `metrics_file` grows.

    Anywhere else (papermill, a script, a test) nothing is drawn: there the trainer's bar tells how
    far it is, in lines of text.

    Args:
        metrics_file: the `metrics.jsonl` a trainer appends to.
        options: of `training_curves`.
    """
    # what Jupyter's server tells the kernels of open notebooks
    if "JPY_SESSION_NAME" not in os.environ:
        yield
        return
    import pandas as pd
    from IPython.display import Image, Markdown, display

    handle, over, drawn = display(
        Markdown("*The curves come with the second row of the metrics.*"), display_id=True
    ), threading.Event(), b""

    def draw() -> None:
        nonlocal drawn
        rows = metrics_file.read_bytes() if metrics_file.exists() else b""
        rows = rows[: rows.rfind(b"\n") + 1]  # a row may be half written
        if rows.count(b"\n") > 1 and rows != drawn:
            fig = training_curves(pd.read_json(io.BytesIO(rows), lines=True), **options)
            handle.update(Image(small_png(fig)))
            plt.close(fig)
            drawn = rows

    def watch() -> None:
        while not over.wait(seconds):
            draw()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    draw()


def sample_sheet(samples: dict[str, list[str]], width: int = 100):
    """Generated texts as Markdown, prompt by prompt: `samples` maps a heading (a step, a stage) to
    one text per prompt.
    """
    from IPython.display import Markdown

    parts = []
    for texts in zip(*samples.values()):
        lines = []
        for heading, text in zip(samples, texts):
            paragraphs = [textwrap.fill(line, width, replace_whitespace=False)
                          for line in text.split("\n")]
            lines += [f"[{heading}]", *paragraphs, ""]
        parts.append("```text\n" + "\n".join(lines).rstrip().replace("```", "'''") + "\n```")
    return Markdown("\n\n".join(parts))
