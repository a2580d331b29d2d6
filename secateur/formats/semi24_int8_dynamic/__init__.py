"""2:4 weights and inputs rounded to 8-bit integers: a scale for every output and every token."""

from secateur.formats.contract import Implementation
from secateur.formats.kernels import prefill24
from secateur.formats.op import register
from secateur.formats.semi24_int8 import decode
from secateur.formats.semi24_int8_dynamic import cusparselt, prefill, reference
from secateur.formats.semi24_int8_dynamic.packed import (
    PackedSemi24Int8Dynamic,
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
    Implementation(
        *("prefill", prefill.linear, prefill.why_not, ("tiles",), prefill.arranged),
        activations=prefill24.ACTIVATIONS,
    ),
    Implementation(
        "cusparselt", cusparselt.linear, cusparselt.why_not, ("blob", "alpha"), cusparselt.arranged
    ),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(
    "semi24_int8_dynamic",
    PackedSemi24Int8Dynamic,
    ("values", "metadata", "scales"),
    unpack,
    IMPLEMENTATIONS,
)
packed_type = PackedSemi24Int8Dynamic

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedSemi24Int8Dynamic",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
