"""The command line: every command is a thin call of a Python function, which is imported when it is needed."""

from .main import main

__all__ = ["main"]
