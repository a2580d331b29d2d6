"""The decode kernel: `x @ W.T` at 1 to 64 tokens, one kernel for all number types and structures.

Shared by `semi24`, `semi48`, their quantised forms, and `int4` and `int8`: each says how its packed
weight is arranged, the kernel does the rest. `kernel.cu` tells how it works, `units.cuh` draws the
layout.
"""

from secateur.formats.kernels.decode24.arrange import FORMATS, Kind, arrange, restore
from secateur.formats.kernels.decode24.config import PLAIN, Fusion
from secateur.formats.kernels.decode24.multiply import (
    multiply,
    multiply_into,
    why_not,
    why_not_fused,
)

__all__ = [
    "FORMATS",
    "PLAIN",
    "Fusion",
    "Kind",
    "arrange",
    "multiply",
    "multiply_into",
    "restore",
    "why_not",
    "why_not_fused",
]
