"""What the commands share: errors on one line, and tables. Imports no torch."""

from __future__ import annotations

import contextlib

import click


class Failure(click.ClickException):
    """An error of the user's making: one message, exit code 2, no traceback."""

    exit_code = 2


@contextlib.contextmanager
def one_line_errors():
    """Turn the errors a user can fix into one message without a traceback; damaged files are exit
    code 1.
    """
    from modern_llm.files import DamagedFolder
    from modern_llm.messages import StageError

    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has enough
    except DamagedFolder as error:
        raise click.ClickException(str(error)) from error
    except (ValueError, StageError, OSError) as error:
        raise Failure(str(error)) from error


def printable(value: object) -> str:
    """A value as text that a terminal shows as it stands: control characters and lone surrogates
    are written out, as in `\\n`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                   for c in str(value))


def as_table(rows: list[dict]) -> str:
    """Rows as aligned text under their column names."""
    columns = list(rows[0])
    lines = [dict(zip(columns, columns)),
             *({c: printable(row[c]) for c in columns} for row in rows)]
    widths = {c: max(len(line[c]) for line in lines) for c in columns}
    return "\n".join("  ".join(line[c].ljust(widths[c]) for c in columns).rstrip()
                     for line in lines)
