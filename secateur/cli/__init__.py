"""The command line: the library's verbs for models in folders, a file for each command.

transformers, matplotlib and whatever else is slow to import are imported where they are used.
"""

from secateur.cli.commands import app

__all__ = ["app"]
