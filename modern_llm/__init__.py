"""A language-model laboratory that reads like a book and runs like a pipeline."""

__version__ = "0.1.0"
