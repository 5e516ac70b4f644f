"""`python -m modern_llm.cli`: the command line without its script."""

from modern_llm.cli import main

main(prog_name="modern-llm")
