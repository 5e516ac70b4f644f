"""The tests. None of them needs what jsonschema does with this library: three seconds of every
process that reads a notebook.
"""

import sys

from modern_llm.runs.launch import SLOW_AND_UNUSED

sys.modules.setdefault(SLOW_AND_UNUSED, None)
