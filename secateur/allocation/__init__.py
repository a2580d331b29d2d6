"""How much of the sparsity each layer should bear: measured first, then allocated."""

from secateur.allocation.sensitivity import Sensitivity, read_sensitivity, sense

__all__ = ["Sensitivity", "read_sensitivity", "sense"]
