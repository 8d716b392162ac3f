"""The `envd` command: `commands.py` parses and calls, the other files ask and print. Everything heavy is imported by
the command that needs it."""

from .commands import app, main

__all__ = ["app", "main"]
