"""Safety training and calibration: `python -m saferedir_torch --help`."""

from __future__ import annotations

import typer

from saferedir.engines.errors import OutputError, SafeRedirError
from saferedir.engines.printable import printable
from saferedir_torch.command_line import calibrate, train

app = typer.Typer(help="Train and calibrate safety modules.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(train.app)
app.add_typer(calibrate.app)


def main() -> None:
    """Run a command; what a user can cause ends in one line and the error's exit code."""
    try:
        app()
    except SafeRedirError as error:
        typer.echo(f"error: {printable(error)}", err=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        typer.echo(f"error: {printable(error)}", err=True)
        raise SystemExit(OutputError.exit_code) from None


if __name__ == "__main__":
    main()
