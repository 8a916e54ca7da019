"""Entry point of `saferedir`: runs the application, turns typed errors into one line and an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys

from saferedir.engines.errors import OutputError, SafeRedirError
from saferedir.engines.printable import printable


class _OneLine(logging.Formatter):
    """Messages of one line that no terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main() -> None:
    """Run the command line and exit: 0 done, 2 to 9 by the tree in `saferedir.engines.errors`, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # under a locale of ASCII, letters that it lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        from saferedir.runtime.command_line.app import app
    except ImportError as error:
        print(f"error: the command line needs the package {error.name}; install saferedir[cli]", file=sys.stderr)
        sys.exit(4)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SafeRedirError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:  # who reads has seen enough
        _leave(1)
    except OSError as error:  # what a command writes to files is typed already
        print(f"error: standard output cannot be written ({error.strerror or error})", file=sys.stderr)
        _leave(OutputError.exit_code)


def _leave(code: int) -> None:
    """Exit without what could not be written to stdout, which Python would try again and complain of."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
