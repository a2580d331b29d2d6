"""Unstructured weights as nonzeros and a bitmask: the smallest form below about 90 % zeros."""

from secateur.formats.bitmap import reference
from secateur.formats.bitmap.packed import (
    PackedBitmap,
    broken,
    density,
    empty,
    pack,
    unpack,
    why_not,
)
from secateur.formats.contract import Implementation
from secateur.formats.op import register

IMPLEMENTATIONS = (Implementation("reference", reference.linear, reference.why_not),)
LINEAR, UNPACK = register("bitmap", PackedBitmap, ("values", "bitmask"), unpack, IMPLEMENTATIONS)
packed_type = PackedBitmap
dequantised = None  # packing is exact

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedBitmap",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
