"""`python -m saferedir.runtime` is `saferedir`."""

from saferedir.runtime.command_line.entry import main

main()
