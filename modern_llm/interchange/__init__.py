"""Models in the files of others: Hugging Face folders and GGUF, read and written."""
