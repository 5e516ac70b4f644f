"""A language-model laboratory that reads like a book and runs like a pipeline."""

import warnings

__version__ = "0.1.0"

# Progress bars are text everywhere, so that papermill's log and the stored notebooks can show them:
# no widgets wanted.
warnings.filterwarnings("ignore", message="IProgress not found")
