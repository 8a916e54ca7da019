"""Entry point of `saferedir`: runs the application, turns typed errors into one line and an exit code."""

from __future__ import annotations

import logging
import sys

from saferedir.engines.errors import SafeRedirError


def main() -> None:
    """Run the command line and exit: 0 done, 2 to 7 by the tree in `saferedir.engines.errors`, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        from saferedir.runtime.command_line.app import app
    except ImportError as error:
        print(f"error: the command line needs the package {error.name}; install saferedir[cli]", file=sys.stderr)
        sys.exit(4)
    try:
        app()
    except SafeRedirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
