"""What all commands share: where they print, how they show progress, and the options that most of them take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saferedir.runtime.loop import StepCallback

# Without markup: square brackets in messages are meant, as in saferedir[cpu].
console = Console(markup=False)
progress_console = Console(stderr=True)

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


@contextmanager
def progress(title: str) -> Iterator[StepCallback]:
    """A bar on the error stream, moved by calling what is given with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
