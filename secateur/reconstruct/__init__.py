"""Reconstruction: functions `(weight, statistic..., pattern) -> Solution` moving kept weights."""

from secateur.reconstruct.solution import Solution
from secateur.reconstruct.sparsegpt import sparsegpt

__all__ = ["Solution", "sparsegpt"]
