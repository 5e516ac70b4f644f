"""What a user is told: a line beside the work, and errors that name the value, the place and the
remedy.
"""

from __future__ import annotations

import sys
from pathlib import Path

from modern_llm.files import read_json


class StageError(RuntimeError):
    """The stage cannot start. The message names the value, the place and the remedy."""


class Preempted(BaseException):
    """SIGTERM or SIGUSR1 came, a scheduler's warning: what runs ends now and goes on at its next
    start.
    """


def say(text: str) -> None:
    """A line for whoever watches, not for the notebook's record: it may name times and places."""
    print(text, file=sys.stderr, flush=True)


def read_record(path: Path) -> dict:
    """A JSON object that a stage wrote. StageError if it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{path} is damaged ({getattr(error, 'what', error)})") from error
