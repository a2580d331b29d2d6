"""Reconstruction: functions `(weight, statistic..., pattern) -> Solution` to move kept weights."""

from secateur.reconstruct.alps import alps
from secateur.reconstruct.blockwise import Blockwise, blockwise
from secateur.reconstruct.estimate import Estimate, estimate
from secateur.reconstruct.lowrank import (
    Compensated,
    CompensationReport,
    compensate,
    compensation,
)
from secateur.reconstruct.oats import low_rank_part
from secateur.reconstruct.presets import best, thorough
from secateur.reconstruct.refit import refit, refitted
from secateur.reconstruct.solution import Solution
from secateur.reconstruct.sparsegpt import sparsegpt
from secateur.reconstruct.swap import swap, swapped

__all__ = [
    "Blockwise",
    "Compensated",
    "CompensationReport",
    "Estimate",
    "Solution",
    "alps",
    "best",
    "blockwise",
    "compensate",
    "compensation",
    "estimate",
    "low_rank_part",
    "refit",
    "refitted",
    "sparsegpt",
    "swap",
    "swapped",
    "thorough",
]
