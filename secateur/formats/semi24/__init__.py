"""2:4 weights: at most two nonzeros in every four consecutive inputs, half the values stored."""

from secateur.formats.contract import Implementation
from secateur.formats.semi24 import reference
from secateur.formats.semi24.ops import register
from secateur.formats.semi24.packed import (
    PackedSemi24,
    broken,
    density,
    empty,
    pack,
    unpack,
    why_not,
)

IMPLEMENTATIONS = (Implementation("reference", reference.linear, reference.why_not),)
LINEAR, UNPACK = register(IMPLEMENTATIONS)
packed_type = PackedSemi24

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedSemi24",
    "broken",
    "density",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
