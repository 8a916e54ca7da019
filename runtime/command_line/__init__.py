"""The command line. Needs the extra `cli` (typer and rich); everything heavier is imported by the command that needs it."""
