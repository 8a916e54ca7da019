"""Commands of the training package, found by entry point and loaded when they are run: the runtime does not know it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import typer

from saferedir.engines.errors import MissingDependencyError

GROUP = "saferedir.commands"
COMMANDS = {
    "train": "Train a safety module. Needs `saferedir[torch]`.",
    "calibrate": "Set a module's thresholds, and the promise that goes with them. Needs `saferedir[torch]`.",
    "attack": "Attack whatever keeps a model from drawing a concept. Needs `saferedir[torch]`.",
}


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`. Options, `--help` among them, are the commands' own."""
    passed = {"ignore_unknown_options": True, "allow_extra_args": True}
    for name, said in COMMANDS.items():
        app.command(name, help=said, add_help_option=False, context_settings=passed)(_running(name))


def _running(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        (found,) = entry_points(group=GROUP, name=name)
        try:
            command = found.load()
        except ImportError as error:
            raise MissingDependencyError(f"{name} needs the package {error.name}; install saferedir[torch]") from error
        command(context.args, prog_name=f"saferedir {name}")

    return run
