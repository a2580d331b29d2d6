"""How codes are stored, and the weight that they stand for.

| grid | `values` | type |
|---|---|---|
| 4 bits | two codes a byte, the first in the low nibble, two's complement | uint8 |
| 8-bit integers | a code each | int8 |
| 8-bit floats | the bits of a float8_e4m3fn each | uint8 |

Floats are stored as bytes because a module that is cast casts every buffer of a floating dtype, and
codes must stay. Without a pattern every weight has a code; of a 2:4 weight the two kept of every
four inputs have one, of a 4:8 weight the four of eight, in the order of their columns, and
`metadata` says which these are.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import Packed
from secateur.formats.positions import POSITIONS
from secateur.patterns import NM
from secateur.patterns.grids import Grid
from secateur.patterns.pattern import where_first


def stored(grid: Grid, codes: Shaped[Tensor, "out kept"]) -> Shaped[Tensor, "out bytes"]:
    """The codes as `values` holds them."""
    if grid.bits == 4:
        return two_of_four.pack_nibbles(codes.view(torch.uint8) & 15)
    return codes.view(torch.uint8 if codes.dtype.is_floating_point else codes.dtype).contiguous()


def empty(grid: Grid, rows: int, kept: int) -> Shaped[Tensor, "out bytes"]:
    """Zeros of the size of `values` for so many codes a row."""
    zeros = torch.zeros(rows, kept, dtype=torch.int8, device="cpu")
    return stored(grid, zeros.view(grid.code_dtype))


def kept_codes(grid: Grid, packed: Packed) -> Shaped[Tensor, "out kept"]:
    """The codes that are stored, in the grid's `code_dtype`."""
    values = packed["values"]
    if grid.bits == 4:
        kept = packed.shape[1] // (2 if "metadata" in packed.tensors else 1)
        return (two_of_four.unpack_nibbles(values, kept) ^ 8).view(torch.int8) - 8
    return values.view(grid.code_dtype)


def codes_of(grid: Grid, pattern: NM | None, packed: Packed) -> Shaped[Tensor, "out in"]:
    """The code of every weight, 0 where none is kept.

    Cost: one byte a weight, and where half are kept eight bytes per code while it runs.
    """
    kept = kept_codes(grid, packed)
    if pattern is None:
        return kept
    bits, metadata = kept.view(torch.uint8), packed["metadata"]
    return POSITIONS[pattern].scatter(bits, metadata).view(grid.code_dtype)


def why_broken(grid: Grid, pattern: NM | None, packed: Packed) -> str | None:
    """The first code outside the grid or scale that is not finite, or None."""
    kept = kept_codes(grid, packed)
    outside = ~(kept.half().abs() <= grid.largest)  # float16 holds every code; NaN is not less
    if bool(outside.any()):
        row, column = where_first(outside)
        what = "a NaN" if kept.dtype.is_floating_point else f"the code {kept[row, column]}"
        if pattern is not None:
            first = column // pattern.n * pattern.m
            return f"values of row {row} columns {first}..{first + pattern.m - 1} hold {what}"
        return f"values of row {row} column {column} hold {what}"
    return _why_not_finite(packed["scales"])


def _why_not_finite(scales: Float[Tensor, "out groups"]) -> str | None:
    infinite = ~scales.isfinite()
    if bool(infinite.any()):
        row, group = where_first(infinite)
        return f"scales of row {row} group {group} are {scales[row, group]}"
    return None
