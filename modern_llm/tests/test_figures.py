"""Figures: what a notebook stores of them, and what they show."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from execnb.shell import CaptureShell
from IPython.core.pylabtools import print_figure
from PIL import Image

from modern_llm import figures
from modern_llm.evaluation.charts import sentiment_chart
from modern_llm.figures import figure, small_png


def test_a_notebook_stores_figures_with_a_palette():
    plt.close("all")  # a notebook shows what other tests have left open
    notebook = CaptureShell()
    notebook.run("from modern_llm.figures import figure")
    outputs = notebook.run("fig, ax = figure(3, 2)\nax.plot([1, 2, 3]);")
    [stored] = [output["data"]["image/png"] for output in outputs
                if "image/png" in output.get("data", {})]
    assert Image.open(io.BytesIO(base64.b64decode(stored))).mode == "P"


def test_a_small_png_is_the_figure_to_the_eye():
    fig, ax = figure(4, 2.5)
    for i in range(6):
        ax.plot(np.sin(np.arange(20) + i), "o-", label=str(i))
        ax.fill_between(range(20), np.sin(np.arange(20) + i), alpha=0.1)
    ax.legend()
    whole, small = print_figure(fig, "png", bbox_inches=None), small_png(fig)
    one, other = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
                  for data in (whole, small))
    assert (len(small) < 0.5 * len(whole) and one.shape == other.shape
            and np.abs(one - other).mean() < 3)
    assert (np.abs(one - other).max(-1) < 60).mean() > 0.999


def test_the_style_file_is_seaborns_theme():
    import seaborn as sns
    from matplotlib import rc_context, rcParams

    with rc_context():
        sns.set_theme(style="ticks", context="notebook", palette="colorblind", font_scale=0.8)
        theirs = dict(rcParams)
    with rc_context():
        rcParams.update(figures.STYLE)
        own = dict(rcParams)
    changed = {"axes.spines.top", "axes.spines.right", "axes.titlesize", "legend.frameon",
               "savefig.dpi", "image.cmap", "axes.prop_cycle"}
    differs = lambda a, b: a != (pytest.approx(b) if isinstance(b, float) else b)
    different = {name for name in theirs
                 if name not in changed and differs(own[name], theirs[name])}
    assert different == set()
    assert np.allclose(figures.COLOURS, sns.color_palette("colorblind"), atol=1e-9)


def test_a_method_without_all_numbers_of_demonstrations_stands_at_its_own():
    metrics = {"majority class": 0.5, "accuracy, 0-shot, direct": 0.6,
               "accuracy, 4-shot, direct": 0.7, "accuracy, 4-shot, ordered": 0.8}
    ledger = pd.DataFrame([{"stage": "SFT", "task": "sentiment", "metric": metric, "value": value,
                            "low": value - 0.1, "high": value + 0.1, "n": 100}
                           for metric, value in metrics.items()])
    ax = sentiment_chart(ledger, ["SFT"]).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "4"]
    lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    assert lines["direct"].get_xdata().round().tolist() == [0, 1]
    assert lines["ordered"].get_xdata().round().tolist() == [1]
