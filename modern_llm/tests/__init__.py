"""The tests. None of them needs what jsonschema does with this library: three seconds of every
process that reads a notebook.
"""

import sys

sys.modules.setdefault("rfc3987_syntax", None)
