"""Shared by all tests: every run and cache goes to a temporary folder, no test reaches a model hub,
and the longest files begin first.
"""

import gc
import os
import tempfile

import pytest

LONGEST = ["test_notebooks", "test_slurm", "test_readme", "test_pretrain", "test_docs",
           "test_jupyterlab", "test_pipeline", "test_faults", "test_grid", "test_distributed"]

# Set before anything of the package is imported, also for the notebooks' kernels and for the
# workers, which inherit it: one cache for all.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _scratch = tempfile.TemporaryDirectory(prefix="modern-llm-tests-")
    os.environ["MODERN_LLM_CACHE"] = os.path.join(_scratch.name, "cache")
else:
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads than cores only wait for each other
os.environ["MODERN_LLM_RUNS"] = os.path.join(
    os.path.dirname(os.environ["MODERN_LLM_CACHE"]), os.environ.get("PYTEST_XDIST_WORKER", "runs"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Nobody pulls the plug here: waiting for the disk was a fifteenth of the time. The processes that
# tests start do wait, those of test_faults.py among them.
os.fsync = lambda handle: None


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Data from neither a mirror nor the hub's cache of this machine."""
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker is left alone with one of them at the end;
    thorough tests are asked for.
    """
    if not os.environ.get("MODERN_LLM_THOROUGH_TESTS"):
        for item in filter(lambda item: item.get_closest_marker("thorough"), items):
            item.add_marker(pytest.mark.skip(reason="thorough: set MODERN_LLM_THOROUGH_TESTS=1"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST
                                else len(LONGEST))


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it after every test."""
    gc.freeze()
