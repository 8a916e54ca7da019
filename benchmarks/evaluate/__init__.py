"""The evaluation, one command a table: `python -m benchmarks.evaluate --help`. An interrupted one goes on where it was."""

from __future__ import annotations

import typer

from benchmarks.evaluate import everything, method, robustness, training

app = typer.Typer(help="Measure the shipped safety: one command a table, results as JSON.", no_args_is_help=True)
for part in (everything, method, robustness, training):
    app.add_typer(part.app)
