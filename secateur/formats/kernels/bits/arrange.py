"""A weight with zeros anywhere as the kernels for bits read it: units in lines, in lane order.

One arrangement serves every number of tokens, so that a layer holds one. The layout is drawn at the
head of `lanes.cuh`. Rows are filled up to whole tiles and columns to whole units, with nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Bool, Float, Int32, Int64, Shaped
from torch import Tensor

UNIT_ROWS = 16
LANES = 32
LINE_BYTES = 4 * LANES
GROUP = 128  # columns that share a scale
WEIGHTS_AT_ONCE = 2**24  # arranged at one time: some 30 bytes each, not the whole weight's


@dataclass(frozen=True)
class Numbers:
    """How a kept weight is stored, in `bits` bits, and how many columns a unit has."""

    bits: int
    unit_columns: int

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def lane_weights(self) -> int:
        """Of a unit."""
        return UNIT_ROWS * self.unit_columns // LANES

    @property
    def bit_lines(self) -> int:
        return self.lane_weights // 32

    @property
    def scale_lines(self) -> int:
        """Two scales a lane, of rows g and g + 8, where numbers are codes."""
        return 0 if self.bits == 16 else self.unit_columns // GROUP * UNIT_ROWS // (2 * LANES)

    @property
    def head(self) -> int:
        """Lines of a unit before its numbers."""
        return self.bit_lines + self.scale_lines


FLOATS = Numbers(16, 256)
CODES = Numbers(4, 512)  # of 4 bits, two's complement


def arrange(
    numbers: Numbers,
    keep: Bool[Tensor, "out in"],
    values: Shaped[Tensor, " kept"],
    scales: Float[Tensor, "out groups"] | None = None,
) -> tuple[Int32[Tensor, "stages words"], Int32[Tensor, "tiles ends"]]:
    """The lines of a weight, and where each unit starts: `keep` says where its values are.

    Values are 16-bit floats or, as int8, codes of 4 bits, whose `scales` are of groups of 128
    columns, or of rows if there is one. Lines are one run of words, whatever their shape: a row of
    it is as long as the largest unit, so that this is known without reading any of them.

    Cost: the arranged bytes twice, and 30 bytes for each of `WEIGHTS_AT_ONCE` weights.
    """
    rows, columns = keep.shape
    tiles, units = ceil(rows / UNIT_ROWS), ceil(columns / numbers.unit_columns)
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    parts, sizes = list[Tensor](), list[Tensor]()
    for first in _row_blocks(rows, columns):
        here = slice(first.start, min(first.stop, rows))
        own = values[int(before[here.start]) : int(before[here.stop])]
        dense = own.new_zeros(len(first), units * numbers.unit_columns)
        of_rows = keep.new_zeros(dense.shape)
        of_rows[: here.stop - here.start, :columns] = keep[here]
        dense[of_rows] = own
        bits, ordered = (_in_lanes(x, numbers) for x in (of_rows, dense))
        heads = [_words(bits, 1)]
        if scales is not None:
            heads.append(_scale_words(scales[here], len(first), units, numbers))
        part, size = _lines(bits, ordered, torch.cat(heads, 2), numbers)
        parts.append(part)
        sizes.append(size)
    size = torch.cat(sizes)
    ends = size.flatten().cumsum(0).to(torch.int32).view(tiles, units)
    begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]]).unsqueeze(1)
    largest = int(size.max()) * LANES
    run = torch.cat(parts)
    run = torch.nn.functional.pad(run, (0, -len(run) % largest))
    lines, starts = run.view(-1, largest), torch.cat([begins, ends], dim=1)
    if lines.is_cuda:
        # the kernel reads weights before it waits for the kernels ahead of it: they must be there
        torch.cuda.current_stream(lines.device).synchronize()
    return lines, starts


def restore(
    numbers: Numbers,
    lines: Int32[Tensor, "stages words"],
    starts: Int32[Tensor, "tiles ends"],
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Bool[Tensor, "out in"], Shaped[Tensor, " kept"], Float[Tensor, "out groups"] | None]:
    """The inverse of `arrange`, bit for bit, of a layer of this dtype.

    Scales, where numbers are codes, are those of groups, also of a weight whose rows have one each.
    """
    run, units = lines.view(-1, LANES), starts.shape[1] - 1
    keeps, values, scales = list[Tensor](), list[Tensor](), list[Tensor]()
    for first in _row_blocks(rows, columns):
        tile = slice(first.start // UNIT_ROWS, first.stop // UNIT_ROWS)
        begin, end = starts[tile, :-1].flatten().long(), starts[tile, 1:].flatten().long()
        most = int((end - begin).max())
        at = begin[:, None] + torch.arange(most, device=run.device)
        words = run[at.clamp_(max=len(run) - 1)].transpose(1, 2)
        bits = _fields(words[..., : numbers.bit_lines], 1).bool()
        stored = _fields(words[..., numbers.head :], numbers.bits)
        order = (bits.cumsum(2) - 1).clamp_(0, max(0, stored.shape[2] - 1))
        found = stored.gather(2, order) if stored.shape[2] else torch.zeros_like(order)
        found = found.to(torch.int16).view(dtype) if numbers is FLOATS else (found ^ 8) - 8
        past = min(first.stop, rows) - first.start
        keep = _in_rows(bits, units, numbers)[:past, :columns]
        keeps.append(keep)
        values.append(_in_rows(found, units, numbers)[:past, :columns][keep])
        if numbers.scale_lines:
            of_rows = words[..., numbers.bit_lines : numbers.head]
            scales.append(_scales_of(of_rows, units, dtype)[:past, : ceil(columns / GROUP)])
    kept = torch.cat(values)
    if numbers is FLOATS:
        return torch.cat(keeps), kept, None
    return torch.cat(keeps), kept.to(torch.int8), torch.cat(scales)


def _row_blocks(rows: int, columns: int) -> Iterator[range]:
    """Rows of whole tiles, so many at a time."""
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns) // UNIT_ROWS) * UNIT_ROWS
    whole = ceil(rows / UNIT_ROWS) * UNIT_ROWS
    return (range(first, min(first + step, whole)) for first in range(0, whole, step))


def _in_lanes(x: Tensor, numbers: Numbers) -> Tensor:
    """[rows, columns] as [units, lanes, weights of a lane], each lane's in the nibbles' order."""
    # rows are (tile, r, g), columns (unit, s, t, j, i): lanes.cuh
    width = numbers.unit_columns
    parts = x.view(-1, 2, 8, x.shape[1] // width, width // 32, 4, 2, 4)
    return parts.permute(0, 3, 2, 5, 4, 6, 1, 7).reshape(-1, LANES, numbers.lane_weights)


def _in_rows(x: Tensor, units: int, numbers: Numbers) -> Tensor:
    """The inverse of `_in_lanes`."""
    width = numbers.unit_columns
    parts = x.view(-1, units, 8, 4, width // 32, 2, 2, 4)
    return parts.permute(0, 6, 2, 1, 4, 3, 5, 7).reshape(-1, units * width)


def _scale_words(
    scales: Float[Tensor, "rows groups"], rows: int, units: int, numbers: Numbers
) -> Int32[Tensor, "units lanes lines"]:
    """Lane (g, q)'s scales of rows g and g + 8 in group q of a unit, as a line for each unit."""
    groups = numbers.unit_columns // GROUP
    every = scales if scales.shape[1] > 1 else scales.expand(-1, units * groups)
    every = every[:, : units * groups]
    whole = every.new_zeros(rows, units * groups)
    whole[: len(every), : every.shape[1]] = every
    # rows are (tile, r, g), columns (unit, q); where q has four values, a line has all lanes
    parts = whole.view(-1, 2, 8, units, groups).permute(0, 3, 2, 4, 1).contiguous()
    words: Tensor = parts.view(torch.int32).view(-1, LANES, 1)
    return words


def _scales_of(
    words: Int32[Tensor, "units lanes lines"], units: int, dtype: torch.dtype
) -> Float[Tensor, "rows groups"]:
    """The inverse of `_scale_words`."""
    parts: Tensor = words.flatten().view(dtype).view(-1, units, 8, 4, 2)
    return parts.permute(0, 4, 2, 1, 3).reshape(-1, units * 4)


def _words(fields: Shaped[Tensor, "... fields"], bits: int) -> Int32[Tensor, "... words"]:
    """Fields of `bits` bits, the first one lowest, in words of 32."""
    shifts = torch.arange(0, 32, bits, device=fields.device)
    parts = fields.unflatten(-1, (-1, 32 // bits)).long() & (2**bits - 1)
    words = (parts << shifts).sum(-1)
    signed: Tensor = words - (words >> 31 << 32)  # two's complement
    return signed.to(torch.int32)


def _fields(words: Int32[Tensor, "... words"], bits: int) -> Int64[Tensor, "... fields"]:
    """The inverse of `_words`."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    fields: Tensor = words.long().unsqueeze(-1) >> shifts & (2**bits - 1)
    return fields.flatten(-2)


def _lines(
    bits: Bool[Tensor, "units lanes weights"],
    ordered: Shaped[Tensor, "units lanes weights"],
    head: Int32[Tensor, "units lanes head"],
    numbers: Numbers,
) -> tuple[Int32[Tensor, " words"], Int64[Tensor, " units"]]:
    """The words of these units, and how many lines each has."""
    counts = bits.sum(2)
    needed = -(-counts.amax(1) // numbers.per_word)
    most = int(needed.max())
    fields = ordered.view(torch.int16) if numbers is FLOATS else ordered
    front = fields.new_zeros(*bits.shape[:2], most * numbers.per_word)
    filled = torch.arange(front.shape[2], device=bits.device) < counts.unsqueeze(2)
    front[filled] = fields[bits]
    lines = torch.cat([head, _words(front, numbers.bits)], 2).transpose(1, 2)
    size = needed + numbers.head
    there = torch.arange(lines.shape[1], device=bits.device) < size.unsqueeze(1)
    return lines[there].flatten(), size
