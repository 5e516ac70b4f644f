"""What a user is told: a line beside the work, and errors that name the value, the place and the
remedy. A leaf, no torch.
"""

from __future__ import annotations

import sys


class UserError:
    """What its user can mend, or has asked for: the message says how, and where it came up does not
    help. Mixed into exceptions, of which a notebook, in JupyterLab or by papermill, then shows the
    message alone.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class StageError(UserError, RuntimeError):
    """The stage cannot start. The message names the value, the place and the remedy."""


class Preempted(UserError, BaseException):
    """SIGTERM or SIGUSR1 came, a scheduler's warning: what runs ends now and goes on at its next
    start.
    """


def say(text: str) -> None:
    """A line for whoever watches, not for the notebook's record: it may name times and places."""
    print(text, file=sys.stderr, flush=True)
