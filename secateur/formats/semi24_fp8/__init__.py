"""2:4 weights rounded to 8-bit floats, a scale for every output."""

from secateur.formats.contract import Implementation
from secateur.formats.op import register
from secateur.formats.semi24_fp8 import decode, reference
from secateur.formats.semi24_fp8.packed import (
    PackedSemi24Fp8,
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
    "semi24_fp8", PackedSemi24Fp8, ("values", "metadata", "scales"), unpack, IMPLEMENTATIONS
)
packed_type = PackedSemi24Fp8

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedSemi24Fp8",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
