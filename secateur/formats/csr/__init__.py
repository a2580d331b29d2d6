"""Unstructured weights as compressed sparse rows, in torch's words."""

from secateur.formats.contract import Implementation
from secateur.formats.csr import reference, torch_csr
from secateur.formats.csr.packed import (
    PackedCsr,
    broken,
    density,
    empty,
    pack,
    unpack,
    why_not,
)
from secateur.formats.op import register

IMPLEMENTATIONS = (
    Implementation("torch_csr", torch_csr.linear, torch_csr.why_not, (), torch_csr.arrange),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(
    "csr", PackedCsr, ("values", "crow_indices", "col_indices"), unpack, IMPLEMENTATIONS
)
packed_type = PackedCsr
dequantised = None  # packing is exact

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedCsr",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
