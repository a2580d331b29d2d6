"""The command line: the same verbs as the library, for models in folders.

transformers, matplotlib and everything slow are imported inside the verbs that use them.
"""

from secateur.cli.commands import app

__all__ = ["app"]
