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
UNRANKED_BITS = 4  # the lowest of a float32, which hold the place while GREEDY sorts
PAIRS = tuple(combinations(range(TILE), 2))


class Selection(IntEnum):
    """How zeros are chosen, numbered as in `selection.cuh`.

    `TILES` keeps the best two of each row and each column of every tile of 4 x 4, so that weight
    and transpose have the same zeros. `ROWS` keeps the largest two of every four along a row, and
    of those that stay two of every four along a column for the transpose, which has more zeros.
    `GREEDY` goes through a tile's weights, the largest first, and keeps one while its row and its
    column have fewer than two: 8 of 16, sometimes 7, whose other places are in full lines.

    Source: GREEDY, `largest_abs_values_greedy` of torch._sparse_semi_structured_tile. ROWS, Lu et
        al. 2024, arXiv:2405.16325 (double-pruned backward).
    """

    TILES = 0
    ROWS = 1
    GREEDY = 2


def kept(
    weight: Float[Tensor, "out in"], selection: Selection
) -> tuple[Bool[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """The masks of the weight and, not transposed, of its transpose; True = keep.

    Edges are filled up with zeros to whole tiles. By magnitude; what is not finite counts as the
    largest. Of equal weights the first stays, in a tile in the order of rows; of equal tiles the
    first mask of `tile_masks`.
    """
    rows, columns = weight.shape
    sizes = F.pad(weight.detach().abs().float(), (0, -columns % TILE, 0, -rows % TILE))
    sizes = sizes.nan_to_num(LARGEST, LARGEST).clamp_max(LARGEST)
    forward, backward = _kept(sizes, selection)
    return forward[:rows, :columns], backward[:rows, :columns]


def _kept(sizes: Float[Tensor, "out in"], selection: Selection) -> tuple[Tensor, Tensor]:
    if selection is Selection.ROWS:
        of_rows = _two_of_four(sizes)
        left = sizes.masked_fill(~of_rows, 0)
        return of_rows, of_rows & _two_of_four(left.t()).t()
    choose = _best if selection is Selection.TILES else _greedy
    down, across = (side // TILE for side in sizes.shape)
    tiles = sizes.view(down, TILE, across, TILE).transpose(1, 2)
    chosen = choose(tiles.flatten(2)).view(down, across, TILE, TILE)
    mask = chosen.transpose(1, 2).reshape(sizes.shape)
    return mask, mask


def _best(tiles: Float[Tensor, "down across 16"]) -> Bool[Tensor, "down across 16"]:
    masks = tile_masks().to(tiles.device)
    return masks[(tiles.double() @ masks.double().t()).argmax(2)]


def _greedy(tiles: Float[Tensor, "down across 16"]) -> Bool[Tensor, "down across 16"]:
    ranked = tiles.view(torch.int32) >> UNRANKED_BITS
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    in_row, in_column = (torch.zeros_like(order[..., :TILE]) for _ in range(2))
    keep = torch.zeros_like(tiles, dtype=torch.bool)
    for rank in range(TILE * TILE):
        entry = order[..., rank, None]
        row, column = entry // TILE, entry % TILE
        free = (in_row.gather(-1, row) < 2) & (in_column.gather(-1, column) < 2)
        keep.scatter_(-1, entry, free)
        in_row.scatter_add_(-1, row, free.long())
        in_column.scatter_add_(-1, column, free.long())
    return keep


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
    forward, backward = kept(whole, selection)
    values = whole.to(dtype)
    return (
        _units(values, forward)[: rows // UNIT_ROWS],
        _units(values.t(), backward.t())[: columns // UNIT_ROWS],
    )


def _units(values: Tensor, mask: Tensor) -> Tensor:
    metadata = two_of_four.metadata_of(mask)
    kept = two_of_four.gather(values.masked_fill(~mask, 0), metadata)
    return arrange(Kind.W16, kept, metadata, None, values.dtype)
