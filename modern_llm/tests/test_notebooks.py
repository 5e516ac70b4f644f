"""Every chapter runs from top to bottom, its assertions are the package's first tests, and shows
again what it has stored.

Outputs are compared up to the first cell that trains a model (a stage may begin by training what it
starts from): numbers may differ in their last digits, pictures are compared by size.
"""

import atexit
import gc
import os
import re
import sys
from base64 import b64decode
from html import unescape
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "nbs").glob("*.ipynb"))
SKIPPED = ("#| slow", "#| gpu", "#| eval: false")
# from here on a chapter's figures hang on the processor's rounding
TRAINS = (".fit()", ".backward(", "train(", "= begin(")
NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Chapters share this process: give back the environment, the threads, the default dtype and
    how tables are shown. What those before left is no garbage of this one, which may collect its
    own.
    """
    gc.freeze()
    environment, threads, dtype = (dict(os.environ), torch.get_num_threads(),
                                   torch.get_default_dtype())
    monkeypatch.setenv("IN_TEST", "1")
    pd.reset_option("display")
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def shown(outputs: list[dict]) -> list[str]:
    """What a reader sees of a cell's outputs as text, a figure as its size; tables without their
    markup, stderr left out.
    """
    texts = []
    for output in outputs:
        data = output.get("data", {})
        if output["output_type"] == "stream" and output["name"] == "stdout":
            texts.append("".join(output["text"]))
        elif html := "".join(data.get("text/html", "")):
            texts.append(unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.S)))
        elif data:
            texts.append("".join(data.get("text/markdown") or data.get("text/plain", "")))
    return sorted((" ".join(text.split()) for text in texts),
                  key=lambda text: text.startswith("<Figure"))


def agree(stored: str, now: str) -> bool:
    """Whether two texts are the same but for the last digits: a number may be off by two of its
    last place, or by 2%.
    """
    if NUMBER.sub("#", stored) != NUMBER.sub("#", now):
        return False
    for a, b in zip(NUMBER.findall(stored), NUMBER.findall(now)):
        values = [float(text.replace(",", "").replace("−", "-")) for text in (a, b)]
        mantissa, _, exponent = a.partition("e")
        place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        whole = place == 1 and not exponent
        if abs(values[0] - values[1]) > (0 if whole else max(2.01 * place, 0.02 * abs(values[0]))):
            return False
    return True


def test_agreement_of_outputs():
    assert (agree("loss 2.503 of 12 rows", "loss 2.501 of 12 rows")
            and agree("[1e-07, -0.5]", "[2e-07, -0.49]"))
    assert (not agree("loss 2.503", "loss 2.603") and not agree("12 rows", "13 rows")
            and not agree("is True", "is False"))


def test_a_figure_is_stored_small():
    [output] = CaptureShell().run("from modern_llm.figures import figure\nfig, ax = figure()\n"
                                  "ax.plot([1, 2]);")
    picture = Image.open(BytesIO(b64decode(output["data"]["image/png"])))
    assert picture.mode == "P" and picture.width == pytest.approx(600, abs=15)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_runs(path):
    notebook = read_nb(path)
    cells = {cell.id: cell for cell in notebook.cells
             if cell.cell_type == "code" and not cell.source.startswith(SKIPPED)}
    stored = {name: shown(cell.outputs) for name, cell in cells.items()}
    for cell in cells.values():
        cell.outputs = []
    shell = CaptureShell(path)
    atexit.unregister(shell.atexit_operations)  # sixty shells would be tidied up one by one
    # drawn once, as an output: not for a screen, too
    shell.displayhook.compute_format_data = lambda result: ({}, {})
    with working_directory(path.parent):
        try:
            shell.run_all(notebook, exc_stop=True, preproc=lambda cell: cell.get("id") not in cells)
        except Exception:
            sys.stderr.write(shell.prettytb(fname=path))
            pytest.fail(f"{path.name} failed: the traceback is above")
    for name, cell in cells.items():
        if any(word in cell.source for word in TRAINS) and not cell.source.startswith("#| export"):
            break
        now = shown(cell.outputs)
        same = len(now) == len(stored[name]) and all(map(agree, stored[name], now))
        assert same, (f"{path.name}, cell {name} stores\n  {stored[name]}\nbut shows\n  {now}\n"
                      "Run the chapter again and store what it shows.")
