"""Block-sparse weights: whole tiles kept or dropped, stored in torch's BSR words."""

from secateur.formats.block import cpu, reference
from secateur.formats.block.packed import (
    PackedBlock,
    broken,
    density,
    empty,
    pack,
    unpack,
    why_not,
)
from secateur.formats.contract import Implementation
from secateur.formats.op import register

IMPLEMENTATIONS = (
    Implementation("cpu", cpu.linear, cpu.why_not, ("block_rows",), cpu.arrange),
    Implementation("reference", reference.linear, reference.why_not),
)
LINEAR, UNPACK = register(
    "block", PackedBlock, ("values", "crow_indices", "col_indices"), unpack, IMPLEMENTATIONS
)
packed_type = PackedBlock
dequantised = None  # packing is exact

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR",
    "UNPACK",
    "PackedBlock",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "packed_type",
    "unpack",
    "why_not",
]
