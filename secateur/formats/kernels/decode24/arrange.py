"""A packed weight as the decode kernel reads it: units of 16 rows x 128 columns.

One arrangement serves every launch configuration, so that a layer holds one, whatever its tokens.
The layout, in lane order, is drawn at the head of `units.cuh`, and what is other in units of 4:8 at
that of `of_eight.cuh`; the last unit of a row is padded with zeros.
"""

from collections.abc import Iterator
from enum import IntEnum
from itertools import product
from math import ceil

import torch
from jaxtyping import UInt8
from torch import Tensor

from secateur.formats.kernels.gpu import why_not_16_bits

UNIT_ROWS = 16
UNIT_COLUMNS = 128
MULTIPLE = 64  # columns: the last unit may be padded by half
ROWS_AT_ONCE = 4096  # whose codes are 32-bit words at one time, not the whole weight's


class Structure(IntEnum):
    """Which columns have values; numbered as in `units.cuh`."""

    TWO_OF_FOUR = 0
    FOUR_OF_EIGHT = 1
    ALL = 2


class Kind(IntEnum):
    """How the kernel reads values, and of which columns they are: 8 times the structure more."""

    W16 = 0
    INT8 = 1
    FP8 = 2
    INT4 = 3
    W16_48 = 8
    INT4_48 = 11
    INT8_ALL = 17
    INT4_ALL = 19

    @property
    def numbers(self) -> "Kind":
        """How values are stored; numbered as in `units.cuh`."""
        return Kind(self % 8)

    @property
    def structure(self) -> Structure:
        return Structure(self // 8)

    @property
    def on_dense_cores(self) -> bool:
        """Whether the dense tensor cores multiply, not the sparse ones."""
        return self.structure is not Structure.TWO_OF_FOUR

    @property
    def kept(self) -> float:
        """The share of columns that have values."""
        return 1.0 if self.structure is Structure.ALL else 0.5


# By the format's name: how the kernel reads it, and whether groups of 128 columns have scales.
FORMATS = {
    "semi24": (Kind.W16, False),
    "semi24_int4": (Kind.INT4, True),
    "semi24_int4:channel": (Kind.INT4, False),
    "semi24_int8": (Kind.INT8, False),
    "semi24_fp8": (Kind.FP8, False),
    "semi48": (Kind.W16_48, False),
    "semi48_int4": (Kind.INT4_48, True),
    "semi48_int4:channel": (Kind.INT4_48, False),
    "int4": (Kind.INT4_ALL, True),
    "int4:channel": (Kind.INT4_ALL, False),
    "int8": (Kind.INT8_ALL, False),
}
NUMBER_BITS = {Kind.W16: 16, Kind.INT8: 8, Kind.FP8: 8, Kind.INT4: 4}  # `numbers`
META_BYTES = 256
SCALE_BYTES = 32
# What stands where a unit has no columns: the first two of four, twice a byte, or four of eight.
NO_COLUMNS = {Structure.TWO_OF_FOUR: 0b0100_0100, Structure.FOUR_OF_EIGHT: 0b0000_1111}
# The dimensions that `_bits` gives to codes, in the codes' own order.
ORDERS = {
    Structure.TWO_OF_FOUR: (0, 6, 3, 1, 2, 5, 4, 7),
    Structure.FOUR_OF_EIGHT: (0, 6, 3, 1, 2, 4, 5, 7),
    Structure.ALL: (0, 7, 4, 1, 2, 5, 3, 6, 8),  # once a step's two are apart
}
# Four bits, the lowest first, each in a byte of its own.
SPREAD = tuple(sum((bits >> c & 1) << 8 * c for c in range(4)) for bits in range(16))


def unit_bytes(kind: Kind, grouped: bool) -> int:
    """Bytes of 16 rows x 128 columns."""
    return sum(_part_bytes(kind, grouped))


def value_bytes(kind: Kind) -> int:
    """Bytes of the values of 16 rows x 128 columns."""
    return round(UNIT_ROWS * UNIT_COLUMNS * kind.kept) * NUMBER_BITS[kind.numbers] // 8


def _part_bytes(kind: Kind, grouped: bool) -> tuple[int, int, int]:
    """Bytes of a unit's values, metadata and scales."""
    metadata = 0 if kind.structure is Structure.ALL else META_BYTES
    return value_bytes(kind), metadata, SCALE_BYTES if grouped else 0


def why_no_units(
    kernel: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why such a weight has no units for the kernel of this name, and what to do, or None."""
    if (problem := why_not_16_bits(kernel, dtype, device)) is not None:
        return problem
    rows, columns = shape
    if rows % UNIT_ROWS or columns % MULTIPLE:
        return (
            f"{kernel} needs out_features that is a multiple of {UNIT_ROWS} and in_features of "
            f"{MULTIPLE}, got {rows} x {columns}: pad the layer with zeros"
        )
    return None


def arrange(
    kind: Kind, codes: Tensor, metadata: Tensor | None, scales: Tensor | None, dtype: torch.dtype
) -> UInt8[Tensor, "tiles units bytes"]:
    """The units of a weight whose kept numbers are `codes`, [out, in / 2], or [out, in] if all are.

    codes are 16-bit floats (W16), int8 (INT8, INT4: -7..7) or e4m3 bits as uint8 (FP8); `metadata`
    says which columns they are of, as `two_of_four` or `four_of_eight` has it, and is None if of
    all; `scales`, [out, groups], only where each group of 128 columns has its own; `dtype` is the
    activations'.

    Cost: the arranged bytes twice, and 4096 rows of codes as 32-bit words while it runs.
    """
    parts = [
        _arrange(kind, *rows, dtype)
        for rows in zip(
            codes.split(ROWS_AT_ONCE),
            [None] * len(codes) if metadata is None else metadata.split(ROWS_AT_ONCE),
            [None] * len(codes) if scales is None else scales.split(ROWS_AT_ONCE),
            strict=False,
        )
    ]
    units = torch.cat(parts)
    if units.is_cuda:
        # the kernel reads weights before it waits for the kernels ahead of it: they must be there
        torch.cuda.current_stream(units.device).synchronize()
    return units


def restore(
    kind: Kind,
    units: UInt8[Tensor, "tiles units bytes"],
    grouped: bool,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The codes, metadata and scales that `arrange` was given, bit for bit; scales if `grouped`.

    `columns` are the weight's inputs, `dtype` is the activations', which is that of W16's codes and
    of the scales.

    Cost: the restored bytes twice, and 4096 rows of codes as 32-bit words while it runs.
    """
    parts = units.split(ROWS_AT_ONCE // UNIT_ROWS)
    restored = [_restore(kind, tiles, grouped, columns, dtype) for tiles in parts]
    codes, metadata, scales = (torch.cat(rows) for rows in zip(*restored, strict=True))
    every = kind.structure is Structure.ALL
    return codes, None if every else metadata, scales if grouped else None


def _arrange(
    kind: Kind, codes: Tensor, metadata: Tensor | None, scales: Tensor | None, dtype: torch.dtype
) -> Tensor:
    missing = -round(codes.shape[1] / kind.kept) % UNIT_COLUMNS
    of_eight = kind.structure is Structure.FOUR_OF_EIGHT
    if metadata is not None and of_eight:
        codes = _from_both_ends(codes, metadata)
    parts = [_words(kind, _bits(kind, codes, missing), dtype)]
    if metadata is not None:
        value = NO_COLUMNS[kind.structure]
        places = torch.nn.functional.pad(metadata, (0, missing // 8), value=value)
        parts.append(_metadata_of_eight(places) if of_eight else _metadata(places))
    if scales is not None:
        parts.append(_scales(scales))
    return torch.cat([part.view(torch.uint8).flatten(2) for part in parts], dim=2)


def _restore(
    kind: Kind, units: Tensor, grouped: bool, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    words, places, scales = units.split(_part_bytes(kind, grouped), dim=2)
    codes = _codes(kind, _bits_of_words(kind, words, dtype), dtype)[:, : round(columns * kind.kept)]
    of_groups = _rows_of_scales(scales, dtype)
    if kind.structure is Structure.ALL:
        return codes, places, of_groups
    of_eight = kind.structure is Structure.FOUR_OF_EIGHT
    rows = _rows_of_metadata_of_eight(places) if of_eight else _rows_of_metadata(places)
    metadata = rows[:, : ceil(columns / 8)]
    if of_eight:
        codes = _from_both_ends(codes, metadata)
    return codes, metadata, of_groups


# Each step is followed by its inverse. Words are little-endian, as on the GPU.


def _bits(kind: Kind, codes: Tensor, missing: int) -> Tensor:
    """Each code in fragment order: [tiles, units, step, g, t, b, h, e]; int16 for W16, else int32.

    Row 8h + g of the tile; of the 16 kept columns of a step of 32, column 8b + 2t + e, and for 4:8
    column 4t + 2b + e. Where all are kept a step has 16 columns: column 8t + 4j + 2b + e of 32 for
    step j of two.
    """
    bits = codes.view(torch.int16) if kind.numbers is Kind.W16 else codes.int()
    bits = torch.nn.functional.pad(bits, (0, round(missing * kind.kept)))
    tiles = bits.shape[0] // UNIT_ROWS
    if kind.structure is Structure.ALL:
        pairs = bits.view(tiles, 2, 8, -1, 4, 4, 2, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1, 8)
        return pairs.flatten(2, 3)
    if kind.structure is Structure.FOUR_OF_EIGHT:
        return bits.view(tiles, 2, 8, -1, 4, 4, 2, 2).permute(0, 3, 4, 2, 5, 6, 1, 7)
    return bits.view(tiles, 2, 8, -1, 4, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)


def _codes(kind: Kind, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in / 2] or [out, in], with the columns that were missing."""
    stored = {Kind.W16: torch.int16, Kind.FP8: torch.uint8}.get(kind.numbers, torch.int8)
    if kind.structure is Structure.ALL:
        bits = bits.unflatten(2, (4, 2))
    rows = bits.to(stored).permute(ORDERS[kind.structure]).reshape(len(bits) * UNIT_ROWS, -1)
    return rows.view(dtype) if kind.numbers is Kind.W16 else rows


def _from_both_ends(codes: Tensor, metadata: Tensor) -> Tensor:
    """The four codes of each group of eight, those of its last four columns in descending order.

    Its own inverse.
    """
    numbers = torch.arange(4, device=codes.device)
    first = _spread(metadata & 15)  # how many of the first four columns are kept, in the high byte
    first = (first * 0x01010101 >> 24).long().unsqueeze(2)
    order = torch.where(numbers < first, numbers, first + 3 - numbers)
    bits = codes.view(torch.int16) if codes.itemsize == 2 else codes  # gather may change NaNs
    groups: Tensor = bits.unflatten(1, (-1, 4))
    return groups.gather(2, order).flatten(1).view(codes.dtype)


def _spread(nibbles: Tensor) -> Tensor:
    """Each nibble's bits in the bytes of a word."""
    return torch.tensor(SPREAD, dtype=torch.int32, device=nibbles.device)[nibbles.int()]


def _words(kind: Kind, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The registers of operand A, or what they are made from, in the order lanes load them."""
    if kind.numbers is Kind.W16:
        # [tiles, units, step, g, t, (b, h, e)]: 16 bytes a lane and step
        return bits.contiguous()
    if kind.numbers is Kind.INT4:
        # [tiles, units, load, g, t, step of the load]: 16 bytes a lane, four steps
        fours: Tensor = _int4_words(bits, kind.structure).unflatten(2, (-1, 4))
        return fours.permute(0, 1, 2, 4, 5, 3).contiguous()
    word = _int8_words(bits) if kind.numbers is Kind.INT8 else _fp8_words(bits, dtype)
    # [tiles, units, load, g, t, step of the load, b]: 16 bytes a lane, two steps
    halves: Tensor = word.unflatten(2, (-1, 2))
    return halves.permute(0, 1, 2, 4, 5, 3, 6).contiguous()


def _bits_of_words(kind: Kind, words: Tensor, dtype: torch.dtype) -> Tensor:
    """[tiles, units, step, g, t, b, h, e]."""
    if kind.numbers is Kind.W16:
        bits: Tensor = words.view(torch.int16).unflatten(2, (4, 8, 4, 2, 2, 2))
        return bits
    if kind.numbers is Kind.INT4:
        fours: Tensor = words.view(torch.int32).unflatten(2, (-1, 8, 4, 4))
        return _int4_bits(fours.permute(0, 1, 2, 5, 3, 4).flatten(2, 3), kind.structure)
    halves = words.view(torch.int32).unflatten(2, (-1, 8, 4, 2, 2))
    word = halves.permute(0, 1, 2, 5, 3, 4, 6).flatten(2, 3)
    return _int8_bits(word) if kind.numbers is Kind.INT8 else _fp8_bits(word, dtype)


def _pair(bits: Tensor) -> Tensor:
    """Two 16-bit numbers in a word, e = 0 in the low half."""
    return bits[..., 0] | bits[..., 1] << 16


def _unpair(word: Tensor) -> Tensor:
    """[..., e], from 0 to 0xFFFF."""
    return torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), dim=-1)


def _int4_places(structure: Structure) -> Iterator[tuple[int, int, int, int, int]]:
    """Where a step's word holds the code of register i = 2b + h: b, h, e, bits of sign, magnitude.

    The word rotated left by 4i has the sign at 15 and the magnitude from 0, or 16 above for e = 1.
    For 4:8 code 2b + e has a byte: rotated right by 4h, the sign is on top and the magnitude below.
    """
    for b, h, e in product(range(2), repeat=3):
        if structure is Structure.FOUR_OF_EIGHT:
            byte = 8 * (2 * b + e) + 4 * h
            yield b, h, e, (byte + 7) % 32, byte
        else:
            by = 16 * e - 4 * (2 * b + h)
            yield b, h, e, (15 + by) % 32, by % 32


def _int4_words(bits: Tensor, structure: Structure) -> Tensor:
    """One word for a step's four registers."""
    word = torch.zeros_like(bits[..., 0, 0, 0])
    for b, h, e, sign, magnitude in _int4_places(structure):
        code = bits[..., b, h, e]
        word |= (code < 0).int() << sign | code.abs() << magnitude
    return word


def _int4_bits(word: Tensor, structure: Structure) -> Tensor:
    bits = word.new_empty(*word.shape, 2, 2, 2)
    for b, h, e, sign, magnitude in _int4_places(structure):
        bits[..., b, h, e] = _signed(word >> sign & 1, word >> magnitude & 7)
    return bits


def _signed(sign: Tensor, magnitude: Tensor) -> Tensor:
    return torch.where(sign.bool(), -magnitude, magnitude)


def _int8_words(bits: Tensor) -> Tensor:
    """H = 0 in place (sign at 15, magnitude from 0), h = 1 rotated right by eight."""
    signed = _pair((bits < 0).int() << 15 | bits.abs())
    second = signed[..., 1]
    return signed[..., 0] | (second >> 8 & 0xFFFFFF) | second << 24


def _int8_bits(word: Tensor) -> Tensor:
    second = word << 8 | (word >> 24 & 0xFF)
    signed = _unpair(torch.stack((word, second), dim=-1))
    return _signed(signed >> 15, signed & 0x7F)


def _fp8_words(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """H = 0 in place; the bits of h = 1 fill the gaps: see `expand_word` in units.cuh."""
    sign, rest = bits >> 7 & 1, bits & 0x7F
    first, second = (..., 0, slice(None)), (..., 1, slice(None))
    if dtype == torch.float16:
        place = sign[first] << 15 | rest[first] << 7
        gaps = sign[second] << 14 | rest[second]
    else:
        place = sign[first] << 15 | rest[first] << 4
        gaps = sign[second] << 11 | (rest[second] & 15) | (rest[second] >> 4) << 12
    return _pair(place | gaps)


def _fp8_bits(word: Tensor, dtype: torch.dtype) -> Tensor:
    both = _unpair(word)
    sign = both >> 15
    if dtype == torch.float16:
        first = sign << 7 | (both >> 7 & 0x7F)
        second = (both >> 14 & 1) << 7 | (both & 0x7F)
    else:
        first = sign << 7 | (both >> 4 & 0x7F)
        second = (both >> 11 & 1) << 7 | (both & 15) | (both >> 12 & 7) << 4
    return torch.stack((first, second), dim=-2)


def _metadata(metadata: Tensor) -> Tensor:
    """[tiles, units, g, t, pair of steps, h]: rows g and g + 8 in a word.

    A row's two bytes, as they are stored, are the four nibbles of 16 columns.
    """
    nibbles = metadata.contiguous().view(torch.int16)
    rows = nibbles.view(len(nibbles) // UNIT_ROWS, 2, 8, -1, 2, 4)
    return rows.permute(0, 3, 2, 5, 4, 1).contiguous()


def _rows_of_metadata(places: Tensor) -> Tensor:
    """[out, bytes], with those that were missing."""
    words: Tensor = places.view(torch.int16).unflatten(2, (8, 4, 2, 2))
    rows = words.permute(0, 5, 2, 1, 4, 3)
    return rows.reshape(len(places) * UNIT_ROWS, -1).view(torch.uint8)


def _metadata_of_eight(metadata: Tensor) -> Tensor:
    """[tiles, units, g, t, pair of steps]: what of_eight.cuh says, of a lane's two rows.

    A stored byte has a bit for each column of a group.
    """
    masks = metadata.view(len(metadata) // UNIT_ROWS, 2, 8, -1, 2, 2, 4)
    masks = masks.permute(0, 3, 2, 6, 4, 5, 1)  # [tiles, units, g, t, pair, step, h]
    word = torch.zeros_like(masks[..., 0, 0], dtype=torch.int32)
    for step, h, half in product(range(2), repeat=3):
        nibbles = masks[..., step, h] >> 4 * half & 15
        word |= _spread(nibbles) << 4 * step + 2 * h + half
    return word.contiguous()


def _rows_of_metadata_of_eight(places: Tensor) -> Tensor:
    """[out, bytes], with those that were missing."""
    words: Tensor = places.view(torch.int32).unflatten(2, (8, 4, 2))
    masks = torch.zeros(*words.shape, 2, 2, dtype=torch.int32, device=words.device)
    for step, h, half, column in product(range(2), range(2), range(2), range(4)):
        bit = words >> 8 * column + 4 * step + 2 * h + half & 1
        masks[..., step, h] |= bit << 4 * half + column
    rows = masks.to(torch.uint8).permute(0, 6, 2, 1, 4, 5, 3)
    return rows.reshape(len(places) * UNIT_ROWS, -1)


def _scales(scales: Tensor) -> Tensor:
    """[tiles, units, g, h]: rows g and g + 8 in a word."""
    rows = scales.view(len(scales) // UNIT_ROWS, 2, 8, -1)
    return rows.permute(0, 3, 2, 1).contiguous()


def _rows_of_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, units]."""
    words: Tensor = scales.view(dtype).unflatten(2, (-1, 2))
    rows = words.permute(0, 3, 2, 1)
    return rows.reshape(len(scales) * UNIT_ROWS, -1)
