"""The command line `rbpfx`: one module per command, and what they share."""

from rbpfx.cli.main import main

__all__ = ["main"]
