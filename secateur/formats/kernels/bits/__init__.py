"""Products by weights with zeros anywhere, stored as a bit for each weight and what is not zero."""

from secateur.formats.kernels.bits.arrange import CODES, FLOATS, Numbers, arrange, restore
from secateur.formats.kernels.bits.multiply import (
    MOST_TOKENS,
    multiply,
    multiply_expanded,
    why_not,
)

__all__ = [
    "CODES",
    "FLOATS",
    "MOST_TOKENS",
    "Numbers",
    "arrange",
    "multiply",
    "multiply_expanded",
    "restore",
    "why_not",
]
