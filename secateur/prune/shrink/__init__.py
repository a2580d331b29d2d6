"""Structured pruning: heads, hidden units, experts and blocks go, and an ordinary model is left."""

from secateur.prune.shrink.report import ShrinkReport, Shrunk
from secateur.prune.shrink.verb import shrink_

__all__ = ["ShrinkReport", "Shrunk", "shrink_"]
