"""What papermill loads as it starts (setup.py, "papermill.engine"): where a cell refused in one
line, papermill's own command ends in that line instead of in a traceback of its own code. No torch.
"""

from __future__ import annotations

import sys

from papermill.engines import NBClientEngine as Engine  # as every notebook is executed
from papermill.exceptions import PapermillExecutionError

__all__ = ["Engine", "end_in_one_line"]

_as_before = sys.excepthook


def end_in_one_line(kind: type[BaseException], error: BaseException, trace) -> None:
    """The last words of a process that an error ends: those of a refusal (`messages.UserError`)
    alone, of all else what Python says.
    """
    if isinstance(error, PapermillExecutionError) and len(error.traceback) == 1:
        print(error.traceback[0], file=sys.stderr)
    else:
        _as_before(kind, error, trace)


sys.excepthook = end_in_one_line
