"""2:4 weights: at most two nonzeros in every four consecutive inputs, half the values stored."""

from secateur.formats.contract import Implementation
from secateur.formats.semi24 import decode, reference
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

IMPLEMENTATIONS = (
    Implementation("decode", decode.linear, decode.why_not, ("units",), decode.arranged),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(IMPLEMENTATIONS)
packed_type = PackedSemi24
dequantised = None  # packing is exact

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedSemi24",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
