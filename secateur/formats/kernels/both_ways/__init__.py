"""A weight that trains in 2:4, packed for the forward pass and, transposed, for the backward."""

from secateur.formats.kernels.both_ways import reference
from secateur.formats.kernels.both_ways.pack import empty, pack, why_not
from secateur.formats.kernels.both_ways.reference import Selection

__all__ = ["Selection", "empty", "pack", "reference", "why_not"]
