"""What the packs of a weight that trains in 2:4 keep, in torch: what defines the kernel's results.

Slow and readable; it serves a CPU, and the kernel is held to it.
"""

from enum import IntEnum
from functools import cache
from itertools import combinations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from secateur.formats import two_of_four
from secateur.formats.kernels.decode24.arrange import UNIT_COLUMNS, UNIT_ROWS, Kind, arrange
from secateur.patterns.keep import keep_top

TILE = 4  # rows and columns; two of each stay
LARGEST = 2.0**100  # what is not finite counts as this, so that sums of a tile stay finite
PAIRS = tuple(combinations(range(TILE), 2))


class Selection(IntEnum):
    """How zeros are chosen, numbered as in `selection.cuh`.

    `TILES` keeps the best two of each row and each column of every tile of 4 x 4, so that weight
    and transpose have the same zeros. `ROWS` keeps the largest two of every four along a row, and
    of those that stay two of every four along a column for the transpose, which has more zeros.
    """

    TILES = 0
    ROWS = 1


def kept(
    weight: Float[Tensor, "out in"], selection: Selection
) -> tuple[Bool[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Two places of every four along rows, and two of every four along columns; True for these.

    The weight keeps the first, its transpose what both keep. Sides are multiples of 4. By
    magnitude; what is not finite counts as the largest. Of equal weights along a line the first
    stays, of equal tiles the first mask of `tile_masks`.
    """
    sizes = weight.detach().abs().float()
    sizes = sizes.nan_to_num(LARGEST, LARGEST).clamp_max(LARGEST)
    if selection is Selection.TILES:
        tiles = sizes.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)
        masks = tile_masks().to(weight.device)
        worth = tiles.flatten(2).double() @ masks.double().t()
        best = masks[worth.argmax(2)].unflatten(2, (TILE, TILE))
        mask = best.transpose(1, 2).reshape(weight.shape)
        return mask, mask
    of_rows = _two_of_four(sizes)
    left = sizes.masked_fill(~of_rows, 0)
    return of_rows, _two_of_four(left.t()).t()


@cache
def tile_masks() -> Bool[Tensor, "90 16"]:
    """All masks of a tile that keep two of each row and each column, in the kernel's order.

    First those whose upper two rows keep the same columns, then those where they share one, then
    those where they share none.
    """
    two = [sum(1 << column for column in pair) for pair in PAIRS]
    found = []
    for a, b, c, d in ((a, b, c, d) for a in two for b in two for c in two for d in two):
        rows = [[bits >> column & 1 for column in range(TILE)] for bits in (a, b, c, d)]
        if all(sum(column) == 2 for column in zip(*rows, strict=True)):
            found.append(rows)
    found.sort(key=_order)
    return torch.tensor(found, device="cpu").flatten(1).bool()


def _order(rows: list[list[int]]) -> tuple[int, ...]:
    """Where `best_of_tile` of selection.cuh comes to this mask."""
    upper = [a + b for a, b in zip(rows[0], rows[1], strict=True)]
    once = tuple(column for column in range(TILE) if upper[column] == 1)
    if not once:
        return 0, PAIRS.index(tuple(column for column in range(TILE) if rows[0][column]))
    if len(once) == 2:
        j, k = once
        return 1, PAIRS.index((j, k)), upper.index(2), rows[0][k], rows[2][k]
    return 2, *_way(rows[0]), *_way(rows[2])


def _way(row: list[int]) -> tuple[int, int, int]:
    """Of two rows that keep each column once, by what the first keeps: the order of the six."""
    return int(row[0] == row[1]), row[1], row[3]


def _two_of_four(sizes: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
    return keep_top(sizes.unflatten(1, (-1, TILE)), 2).flatten(1)


def pack(
    weight: Float[Tensor, "out in"], dtype: torch.dtype, selection: Selection
) -> tuple[UInt8[Tensor, "tiles units bytes"], UInt8[Tensor, "other_tiles other_units bytes"]]:
    """Units of the weight and of its transpose in this dtype, as `decode24.arrange` has them.

    Both sides are multiples of 64.
    """
    rows, columns = weight.shape
    missing = -columns % UNIT_COLUMNS, -rows % UNIT_COLUMNS
    whole = F.pad(weight.detach(), (0, missing[0], 0, missing[1]))
    of_rows, of_columns = kept(whole, selection)
    values = whole.to(dtype)
    units = _units(values, of_rows)[: rows // UNIT_ROWS]
    left = values.masked_fill(~of_rows, 0)
    return units, _units(left.t(), of_columns.t())[: columns // UNIT_ROWS]


def _units(values: Tensor, places: Tensor) -> Tensor:
    metadata = two_of_four.metadata_of(places)
    return arrange(Kind.W16, two_of_four.gather(values, metadata), metadata, None, values.dtype)
