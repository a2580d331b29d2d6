"""A weight with zeros anywhere as the kernels for bits read it: units in lines, in lane order.

One arrangement serves every number of tokens, so that a layer holds one. The layout is drawn at the
head of `lanes.cuh`. Rows are filled up to whole tiles and columns to whole units, with nothing.
"""

from collections.abc import Iterator
from math import ceil

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

UNIT_ROWS = 16
UNIT_COLUMNS = 256
LANES = 32
LANE_WEIGHTS = UNIT_ROWS * UNIT_COLUMNS // LANES  # of a unit
BIT_LINES = LANE_WEIGHTS // 32
LINE_BYTES = 4 * LANES
WEIGHTS_AT_ONCE = 2**24  # arranged at one time: some 30 bytes each, not the whole weight's


def arrange(
    keep: Bool[Tensor, "out in"], values: Float[Tensor, " kept"]
) -> tuple[Int32[Tensor, "stages words"], Int32[Tensor, "tiles ends"]]:
    """The lines of a weight, and where each unit starts: `keep` says where its values are.

    Lines are one run of words, whatever their shape: a row of it is as long as the largest unit,
    so that this is known without reading any of them.

    Cost: the arranged bytes twice, and 30 bytes for each of `WEIGHTS_AT_ONCE` weights.
    """
    rows, columns = keep.shape
    tiles, units = ceil(rows / UNIT_ROWS), ceil(columns / UNIT_COLUMNS)
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    parts, sizes = list[Tensor](), list[Tensor]()
    for first in _row_blocks(rows, columns):
        here = slice(first.start, min(first.stop, rows))
        own = values[int(before[here.start]) : int(before[here.stop])]
        dense = own.new_zeros(len(first), units * UNIT_COLUMNS)
        of_rows = keep.new_zeros(dense.shape)
        of_rows[: here.stop - here.start, :columns] = keep[here]
        dense[of_rows] = own
        part, size = _lines(_in_lanes(of_rows), _in_lanes(dense))
        parts.append(part)
        sizes.append(size)
    size = torch.cat(sizes)
    ends = size.flatten().cumsum(0).to(torch.int32).view(tiles, units)
    begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]]).unsqueeze(1)
    largest = int(size.max()) * LANES
    run = torch.cat(parts)
    run = torch.nn.functional.pad(run, (0, -len(run) % largest))
    return run.view(-1, largest), torch.cat([begins, ends], dim=1)


def restore(
    lines: Int32[Tensor, "stages words"],
    starts: Int32[Tensor, "tiles ends"],
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Bool[Tensor, "out in"], Float[Tensor, " kept"]]:
    """The inverse of `arrange`, bit for bit."""
    run, units = lines.flatten(), starts.shape[1] - 1
    numbers = run.view(torch.int16).view(dtype)
    keeps, values = list[Tensor](), list[Tensor]()
    for first in _row_blocks(rows, columns):
        tile = slice(first.start // UNIT_ROWS, first.stop // UNIT_ROWS)
        begin = starts[tile, :-1].flatten().long()
        at = begin[:, None] * LANES + torch.arange(BIT_LINES * LANES, device=run.device)
        words = run[at].view(-1, BIT_LINES, LANES).transpose(1, 2)
        shifts = torch.arange(32, dtype=torch.int32, device=run.device)
        bits = (words.unsqueeze(3) >> shifts & 1).bool().flatten(2)
        dense = numbers.new_zeros(bits.shape)
        dense[bits] = numbers[_places(bits, begin)[bits]]
        end = min(first.stop, rows) - first.start
        keep = _in_rows(bits, units)[:end, :columns]
        keeps.append(keep)
        values.append(_in_rows(dense, units)[:end, :columns][keep])
    return torch.cat(keeps), torch.cat(values)


def _row_blocks(rows: int, columns: int) -> Iterator[range]:
    """Rows of whole tiles, so many at a time."""
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns) // UNIT_ROWS) * UNIT_ROWS
    whole = ceil(rows / UNIT_ROWS) * UNIT_ROWS
    return (range(first, min(first + step, whole)) for first in range(0, whole, step))


def _in_lanes(x: Tensor) -> Tensor:
    """[rows, columns] as [units, lanes, weights of a lane], each lane's in the nibbles' order."""
    # rows are (tile, r, g), columns (unit, s, t, j, i): lanes.cuh
    parts = x.view(-1, 2, 8, x.shape[1] // UNIT_COLUMNS, UNIT_COLUMNS // 32, 4, 2, 4)
    return parts.permute(0, 3, 2, 5, 4, 6, 1, 7).reshape(-1, LANES, LANE_WEIGHTS)


def _in_rows(x: Tensor, units: int) -> Tensor:
    """The inverse of `_in_lanes`."""
    parts = x.view(-1, units, 8, 4, UNIT_COLUMNS // 32, 2, 2, 4)
    return parts.permute(0, 6, 2, 1, 4, 3, 5, 7).reshape(-1, units * UNIT_COLUMNS)


def _lines(
    bits: Bool[Tensor, "units lanes weights"], dense: Float[Tensor, "units lanes weights"]
) -> tuple[Int32[Tensor, " words"], Int64[Tensor, " units"]]:
    """The words of these units, and how many lines each has."""
    size = BIT_LINES + (bits.sum(2).amax(1) + 1) // 2
    begin = size.cumsum(0) - size
    run = torch.zeros(int(size.sum()) * LANES, dtype=torch.int32, device=bits.device)
    weights = 2 ** torch.arange(32, dtype=torch.int64, device=bits.device)
    words = (bits.view(*bits.shape[:2], BIT_LINES, 32) * weights).sum(3)
    words = (words - (words >> 31 << 32)).to(torch.int32)  # two's complement
    at = begin[:, None] * LANES + torch.arange(BIT_LINES * LANES, device=bits.device)
    run[at] = words.transpose(1, 2).flatten(1)
    run.view(torch.int16)[_places(bits, begin)[bits]] = dense[bits].view(torch.int16)
    return run, size


def _places(
    bits: Bool[Tensor, "units lanes weights"], begin: Int64[Tensor, " units"]
) -> Int64[Tensor, "units lanes weights"]:
    """Where each kept number lies in the run, in numbers of 16 bits; nonsense for the others."""
    order = bits.cumsum(2) - 1
    lane = torch.arange(LANES, device=bits.device)[:, None]
    line = begin[:, None, None] + BIT_LINES + order // 2
    return (line * LANES + lane) * 2 + order % 2
