"""2:4 weights rounded to 4-bit integers, a scale for every 128 inputs of an output or for all."""

from secateur.formats.contract import Implementation
from secateur.formats.op import register
from secateur.formats.semi24_int4 import decode, reference
from secateur.formats.semi24_int4.packed import (
    PackedSemi24Int4,
    broken,
    density,
    dequantised,
    empty,
    pack,
    unpack,
    why_not,
)

IMPLEMENTATIONS = (
    Implementation("decode", decode.linear, decode.why_not, ("units",), decode.arranged),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(
    "semi24_int4", PackedSemi24Int4, ("values", "metadata", "scales"), unpack, IMPLEMENTATIONS
)
packed_type = PackedSemi24Int4

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedSemi24Int4",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
