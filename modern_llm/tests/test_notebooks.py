"""Every chapter runs from top to bottom: its assertions are the package's first tests."""

from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook  # not a test itself

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_runs(path):
    passed, _ = run_notebook(path, skip_flags=("slow", "gpu"), showerr=True)
    assert passed, f"{path.name} failed: the traceback is above"
