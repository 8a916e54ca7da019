"""What all commands share: where they print, how they show progress, and the options that most of them take.

Names in bundles, files and requests are others' text: what a terminal would obey is printed as an escape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from saferedir.engines.printable import printable
from saferedir.runtime.ticket import StepCallback

BundleOption = Annotated[str, typer.Option("--bundle", help="Bundle folder, or the name of an embedded one.")]
DigestOption = Annotated[
    str | None,
    typer.Option(
        "--bundle-digest",
        envvar="SAFEREDIR_BUNDLE_DIGEST",
        help="SHA-256 of the bundle's manifest, as `inspect` prints it; no other bundle is opened.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads on the CPU; SAFEREDIR_THREADS, or the cores that may be used, by default.")
]


class PlainConsole(Console):
    """Prints others' text as text: neither markup nor emoji codes nor what a terminal would obey."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)


console = PlainConsole()


def print_json(value: Any) -> None:
    """Print `value` as JSON in ASCII, which is the same under every locale; a number that is not finite is null."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(text: str) -> None:
    """Say something on the error stream that does not end the command."""
    typer.echo(f"warning: {printable(text)}", err=True)


@contextmanager
def progress(title: str) -> Iterator[StepCallback]:
    """A bar on the error stream, moved by calling what is given with (done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=PlainConsole(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
