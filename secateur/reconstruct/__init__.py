"""Reconstruction: functions `(weight, statistic..., pattern) -> Solution` moving kept weights."""

from secateur.reconstruct.alps import alps
from secateur.reconstruct.refit import refit, refitted
from secateur.reconstruct.solution import Solution
from secateur.reconstruct.sparsegpt import sparsegpt

__all__ = ["Solution", "alps", "refit", "refitted", "sparsegpt"]
