"""How sparse each layer should be: sensitivities are measured first, then patterns allocated."""

from secateur.allocation.budget import Allocation, Costs, Point, allocate, monotone
from secateur.allocation.choices import DENSE_CHOICE
from secateur.allocation.equalize import equalize
from secateur.allocation.evolve import Evolved, evolve
from secateur.allocation.formulas import erk, owl
from secateur.allocation.sensitivity import Sensitivity, read_sensitivity, sensitivity
from secateur.allocation.threshold import threshold

__all__ = [
    "DENSE_CHOICE",
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
    "sensitivity",
    "threshold",
]
