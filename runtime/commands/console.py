"""Run a command: errors as one sentence, exit statuses, tables; both commands share it."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from turbochain.runtime.errors import InputError, TurbochainError

Command = Callable[[argparse.Namespace], None]


def run(parser: argparse.ArgumentParser, command: Command, argv: Sequence[str] | None) -> int:
    """Parse and carry out; returns the exit status: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.

    A traceback is printed with `--debug` only.
    """
    parser.set_defaults(debug=False)
    add_debug(parser)
    arguments = parser.parse_args(argv)
    try:
        command(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: cancelled", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader (head, less) has gone; say nothing
        return 0
    except TurbochainError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        message = f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return 1


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add `--debug`, which may stand before or after a subcommand."""
    help = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=help)


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows as aligned columns; the first row is the heading, columns after the first `left` are
    right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def size(count: float) -> str:
    """Return bytes as text: 512 B, 3.4 MiB, 4.8 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def size_of(value: str) -> tuple[int, int]:
    """Return width and height in pixels of WIDTHxHEIGHT; InputError if it is no such value."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)
    if not match:
        raise InputError(f"--size {value}: width x height was expected, such as 512x512")
    return int(match[1]), int(match[2])
