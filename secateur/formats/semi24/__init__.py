"""2:4 weights: at most two nonzeros in every four consecutive inputs, half the values stored."""

from secateur.formats.contract import Implementation
from secateur.formats.op import register
from secateur.formats.semi24 import cusparselt, decode, dense, reference
from secateur.formats.semi24.packed import (
    PackedSemi24,
    broken,
    density,
    empty,
    pack,
    unpack,
    why_not,
)

# In order of preference where nothing was measured. Above 64 tokens that is cuSPARSELt: on an H200
# dense was the faster one of most shapes at 256 tokens, but not at 1024, and holds more bytes.
IMPLEMENTATIONS = (
    Implementation("decode", decode.linear, decode.why_not, ("units",), decode.arranged),
    Implementation(
        "cusparselt", cusparselt.linear, cusparselt.why_not, ("blob",), cusparselt.arranged
    ),
    Implementation("dense", dense.linear, dense.why_not, ("weight",), dense.arranged),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register("semi24", PackedSemi24, ("values", "metadata"), unpack, IMPLEMENTATIONS)
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
