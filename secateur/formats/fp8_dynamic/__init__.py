"""Dense weights and inputs rounded to 8-bit floats: a scale for every output and every token."""

from secateur.formats.contract import Implementation
from secateur.formats.fp8_dynamic import reference, torch_scaled
from secateur.formats.fp8_dynamic.packed import (
    PackedFp8Dynamic,
    broken,
    density,
    dequantised,
    empty,
    pack,
    unpack,
    why_not,
)
from secateur.formats.op import register

IMPLEMENTATIONS = (
    Implementation("torch", torch_scaled.linear, torch_scaled.why_not),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(
    "fp8_dynamic", PackedFp8Dynamic, ("values", "scales"), unpack, IMPLEMENTATIONS
)
packed_type = PackedFp8Dynamic

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedFp8Dynamic",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
