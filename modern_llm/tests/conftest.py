"""Shared by all tests: every run and cache goes to a temporary folder, and no test reaches a model hub."""

import os
import tempfile

# One cache for the whole session, also for the notebooks' kernels; set before anything of the package is imported.
_scratch = tempfile.TemporaryDirectory(prefix="modern-llm-tests-")
os.environ["MODERN_LLM_RUNS"] = os.path.join(_scratch.name, "runs")
os.environ["MODERN_LLM_CACHE"] = os.path.join(_scratch.name, "cache")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
