"""Figures: what a notebook stores of them."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from execnb.shell import CaptureShell
from IPython.core.pylabtools import print_figure
from PIL import Image

from modern_llm import figures
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
