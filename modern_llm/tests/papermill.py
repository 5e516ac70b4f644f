"""Papermill's own command, without a library that costs every start of it three seconds."""

import sys

from modern_llm.runs.launch import SLOW_AND_UNUSED

# a kernel that was told nothing finds its notebook by the words after "papermill"
COMMAND = [sys.executable, "-c",
           f"import sys; del sys.argv[0]; sys.modules[{SLOW_AND_UNUSED!r}] = None; "
           "from papermill.__main__ import papermill; papermill()", "papermill"]
