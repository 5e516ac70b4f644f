"""A language-model laboratory that reads like a book and runs like a pipeline."""

import os
import warnings

__version__ = "0.1.0"

# Progress bars are text everywhere, so that papermill's log and the stored notebooks can show them:
# no widgets wanted.
warnings.filterwarnings("ignore", message="IProgress not found")

# GPU memory in segments that grow, so that batches of many lengths leave no holes. torch reads this
# when it first uses a GPU; whoever has set it, under either name, has chosen.
if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
