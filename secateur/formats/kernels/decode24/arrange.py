"""A packed 2:4 weight as the decode kernel reads it: units of 16 rows x 128 columns, in lane order.

One arrangement serves every launch configuration, so that a layer holds one, whatever its tokens.
The layout is drawn at the head of `kernel.cu`; the last unit of a row is padded with zeros.
"""

from enum import IntEnum

import torch
from jaxtyping import UInt8
from torch import Tensor

UNIT_ROWS = 16
UNIT_COLUMNS = 128
ROWS_AT_ONCE = 4096  # whose codes are 32-bit words at one time, not the whole weight's


class Kind(IntEnum):
    """How the kernel reads values; numbered as in `kernel.cu`."""

    W16 = 0
    INT8 = 1
    FP8 = 2
    INT4 = 3


# By the format's name: how the kernel reads it, and whether groups of 128 columns have scales.
FORMATS = {
    "semi24": (Kind.W16, False),
    "semi24_int4": (Kind.INT4, True),
    "semi24_int4:channel": (Kind.INT4, False),
    "semi24_int8": (Kind.INT8, False),
    "semi24_fp8": (Kind.FP8, False),
}
VALUE_BYTES = {Kind.W16: 2048, Kind.INT8: 1024, Kind.FP8: 1024, Kind.INT4: 512}
META_BYTES = 256
SCALE_BYTES = 32


def unit_bytes(kind: Kind, grouped: bool) -> int:
    """Bytes of 16 rows x 128 columns."""
    return VALUE_BYTES[kind] + META_BYTES + (SCALE_BYTES if grouped else 0)


def arrange(
    kind: Kind, codes: Tensor, metadata: Tensor, scales: Tensor | None, dtype: torch.dtype
) -> UInt8[Tensor, "tiles units bytes"]:
    """The units of a weight whose kept numbers are `codes`, [out, in / 2].

    codes are 16-bit floats (W16), int8 (INT8, INT4: -7..7) or e4m3 bits as uint8 (FP8); `scales`,
    [out, groups], only where each group of 128 columns has its own; `dtype` is the activations'.

    Cost: the arranged bytes, and 4096 rows of codes as 32-bit words while it runs.
    """
    parts = [
        _arrange(kind, *rows, dtype)
        for rows in zip(
            codes.split(ROWS_AT_ONCE),
            metadata.split(ROWS_AT_ONCE),
            [None] * len(codes) if scales is None else scales.split(ROWS_AT_ONCE),
            strict=False,
        )
    ]
    units = torch.cat(parts)
    if units.is_cuda:
        # the kernel reads weights before it waits for the kernels ahead of it: they must be there
        torch.cuda.current_stream(units.device).synchronize()
    return units


def _arrange(
    kind: Kind, codes: Tensor, metadata: Tensor, scales: Tensor | None, dtype: torch.dtype
) -> Tensor:
    columns = 2 * codes.shape[1]
    missing = -columns % UNIT_COLUMNS
    words = _words(kind, _bits(kind, codes, missing), dtype)
    places = torch.nn.functional.pad(metadata, (0, missing // 8), value=0b0100_0100)
    parts = [words, _metadata(places)]
    if scales is not None:
        parts.append(_scales(scales))
    return torch.cat([part.view(torch.uint8).flatten(2) for part in parts], dim=2)


def _bits(kind: Kind, codes: Tensor, missing: int) -> Tensor:
    """Each code as int32, in fragment order: [tiles, units, step, g, t, b, h, e].

    Row 8h + g of the tile; of the 16 kept columns of a step of 32, column 8b + 2t + e.
    """
    bits = codes.view(torch.int16).int() & 0xFFFF if kind is Kind.W16 else codes.int()
    bits = torch.nn.functional.pad(bits, (0, missing // 2))
    tiles = bits.shape[0] // UNIT_ROWS
    return bits.view(tiles, 2, 8, -1, 4, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)


def _words(kind: Kind, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The registers of operand A, or what they are made from, in the order lanes load them."""
    if kind is Kind.W16:
        # [tiles, units, step, g, t, (b, h)]: 16 bytes a lane and step
        return _pair(bits).contiguous()
    if kind is Kind.INT4:
        # one word for a step's four registers i = 2b + h: 16 bytes a lane, its four steps
        word = torch.zeros_like(bits[..., 0, 0, 0])
        for b in range(2):
            for h in range(2):
                i = 2 * b + h
                for e in range(2):
                    code = bits[..., b, h, e]
                    sign, magnitude = (code < 0).int(), code.abs()
                    word |= sign << (15 + 16 * e - 4 * i) % 32 | magnitude << (16 * e - 4 * i) % 32
        return word.permute(0, 1, 3, 4, 2).contiguous()
    word = _int8_words(bits) if kind is Kind.INT8 else _fp8_words(bits, dtype)
    # [tiles, units, half, g, t, step of the half, b]: two loads of 16 bytes a lane
    tiles, count, _, *rest = word.shape
    halves = word.view(tiles, count, 2, 2, *rest)
    return halves.permute(0, 1, 2, 4, 5, 3, 6).contiguous()


def _pair(bits: Tensor) -> Tensor:
    """Two 16-bit numbers in a word, e = 0 in the low half."""
    return bits[..., 0] | bits[..., 1] << 16


def _int8_words(bits: Tensor) -> Tensor:
    """H = 0 in place (sign at 15, magnitude from 0), h = 1 rotated right by eight."""
    signed = _pair((bits < 0).int() << 15 | bits.abs())
    second = signed[..., 1]
    return signed[..., 0] | (second >> 8 & 0xFFFFFF) | second << 24


def _fp8_words(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """H = 0 in place; the bits of h = 1 fill the gaps: see `expand` in kernel.cu."""
    sign, rest = bits >> 7 & 1, bits & 0x7F
    first, second = (..., 0, slice(None)), (..., 1, slice(None))
    if dtype == torch.float16:
        place = sign[first] << 15 | rest[first] << 7
        gaps = sign[second] << 14 | rest[second]
    else:
        place = sign[first] << 15 | rest[first] << 4
        gaps = sign[second] << 11 | (rest[second] & 15) | (rest[second] >> 4) << 12
    return _pair(place | gaps)


def _metadata(metadata: Tensor) -> Tensor:
    """[tiles, units, g, t, pair of steps]: row g in the low half of a word, row g + 8 in the high.

    A row's two bytes, as they are stored, are the four nibbles of 16 columns.
    """
    nibbles = metadata.contiguous().view(torch.int16).int() & 0xFFFF
    tiles = nibbles.shape[0] // UNIT_ROWS
    rows = nibbles.view(tiles, 2, 8, -1, 2, 4)
    words = rows[:, 0] | rows[:, 1] << 16  # [tiles, g, units, pair, t]
    arranged: Tensor = words.permute(0, 2, 1, 4, 3).contiguous()
    return arranged


def _scales(scales: Tensor) -> Tensor:
    """[tiles, units, g]: rows g and g + 8 in a word."""
    bits = scales.contiguous().view(torch.int16).int() & 0xFFFF
    rows = bits.view(bits.shape[0] // UNIT_ROWS, 2, 8, -1)
    return (rows[:, 0] | rows[:, 1] << 16).permute(0, 2, 1).contiguous()
