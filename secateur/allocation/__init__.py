"""How much of the sparsity each layer should bear: measured first, then allocated."""

from secateur.allocation.budget import DENSE, Allocation, Costs, Point, allocate, monotone
from secateur.allocation.evolve import Evolved, evolve
from secateur.allocation.formulas import erk, owl
from secateur.allocation.sensitivity import Sensitivity, read_sensitivity, sense
from secateur.allocation.threshold import equalize

__all__ = [
    "DENSE",
    "Allocation",
    "Costs",
    "Evolved",
    "Point",
    "Sensitivity",
    "allocate",
    "equalize",
    "erk",
    "evolve",
    "monotone",
    "owl",
    "read_sensitivity",
    "sense",
]
