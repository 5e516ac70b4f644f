"""What the commands share: errors on one line, and tables. Imports no torch."""

from __future__ import annotations

import contextlib

import click


class Failure(click.ClickException):
    """An error of the user's making: one message, exit code 2, no traceback."""

    exit_code = 2


@contextlib.contextmanager
def said_in_one_line():
    """Turn the errors a user can mend into one message without a traceback."""
    from modern_llm.files import DamagedFolder
    from modern_llm.inputs import StageError

    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has enough
    except (ValueError, StageError, OSError, DamagedFolder) as error:
        raise Failure(str(error)) from error


def as_table(rows: list[dict]) -> str:
    """Rows as aligned text under their column names."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
    lines = [dict(zip(columns, columns)), *rows]
    return "\n".join("  ".join(str(row[c]).ljust(widths[c]) for c in columns).rstrip() for row in lines)
