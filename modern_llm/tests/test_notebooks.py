"""Every chapter runs from top to bottom: its assertions are the package's first tests."""

import os
from pathlib import Path

import pytest
import torch
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "nbs").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def as_before():
    """Chapters share this process: give back the environment, the threads and the default dtype they may change."""
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_runs(path):
    passed, _ = run_notebook(path, skip_flags=("slow", "gpu"), showerr=True)
    assert passed, f"{path.name} failed: the traceback is above"
