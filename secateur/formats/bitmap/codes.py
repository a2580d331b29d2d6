"""Unstructured weights rounded to codes of 4 bits: zeros, and what rounds to zero, are left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.bitmap import bitmask, gpu
from secateur.formats.contract import (
    Arrangement,
    Implementation,
    Packed,
    check_stored,
    dense_shape,
    why_no_weight,
    why_not_smaller,
)
from secateur.formats.kernels import bits
from secateur.formats.reference import REFERENCE
from secateur.patterns.grids import QUANTISABLE, Grid, Int4
from secateur.patterns.pattern import where_first

GROUP_SIZE = 128  # inputs, kept or not, that share a scale, where a row has several


@dataclass(frozen=True)
class BitmapInt4:
    """The codes that are not zero in row order, a bit for every weight, and scales.

    | tensor | type | shape |
    |---|---|---|
    | `values` | uint8, two codes a byte, the first in the low nibble | `[ceil(codes / 2)]` |
    | `bitmask` | uint8, see `bitmask.py` | `[out, ceil(in / 8)]` |
    | `scales` | the weight's | `[out, ceil(in / 128)]`, or `[out, 1]` without groups |

    Codes are two's complement, -7 to 7; behind an odd number of them four bits are zero. With
    `grouped` each 128 inputs of an output have a scale, else all of them.
    """

    grouped: bool = True
    implementations: tuple[Implementation, ...] = field(init=False, repr=False, compare=False)

    name = "bitmap_int4"
    tensors = ("values", "bitmask", "scales")
    is_exact = False
    prune_to = ""

    def __post_init__(self) -> None:
        able = gpu.implementations(bits.CODES, GROUPED if self.grouped else OF_ROWS)
        object.__setattr__(self, "implementations", (*able, REFERENCE))

    def __reduce__(self) -> tuple[type["BitmapInt4"], tuple[bool]]:
        """What it was made from: its implementations are code, which no pickle holds."""
        return BitmapInt4, (self.grouped,)

    def __str__(self) -> str:
        return self.name if self.grouped else f"{self.name}:channel"

    @property
    def grid(self) -> Grid:
        """The numbers that weights are rounded to."""
        return Int4(GROUP_SIZE if self.grouped else None)

    def why_not(self, weight: Tensor) -> str | None:
        """By how much the packed weight is no smaller than the dense one, or None if it is."""
        if (problem := why_no_weight(weight, self)) is not None:
            return problem
        if weight.dtype not in QUANTISABLE:
            return self._why_not_quantisable(weight.dtype)
        rows, columns = weight.shape
        groups = -(-columns // GROUP_SIZE) if self.grouped else 1
        stored = (int(weight.count_nonzero()) + 1) // 2 + rows * ((columns + 7) // 8)
        return why_not_smaller(weight, self, stored + rows * groups * weight.itemsize)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that is not zero; what rounds to zero is left out as well."""
        return int(weight.count_nonzero()) / max(1, weight.numel())

    def pack(self, weight: Tensor) -> Packed:
        """The weight rounded to the grid: lossy, unless it lies on that grid already.

        The scales are those that lose least, see `Grid.scales`. A weight that has been unpacked, or
        reconstructed with the same `grid`, lies on the grid and comes back bit for bit. (Not
        promised where its scale or a product underflows the dtype.)

        Cost: density x 4 bits + 1 bit a weight, and the scales: 0.195 of a 16-bit weight that is
            half zeros, in groups of 128.
        Raises: ValueError if a weight is not finite, and for a float64 weight.
        """
        shape = dense_shape(weight)
        if weight.dtype not in QUANTISABLE:
            raise ValueError(f"pack {self._why_not_quantisable(weight.dtype)}")
        scales = self.grid.scales(weight)
        every = self.grid.codes(weight, scales)
        keep = every != 0
        tensors = {"values": _stored(every[keep]), "bitmask": bitmask.pack(keep), "scales": scales}
        return Packed(self.like(shape, tensors), shape, scales.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight as scale x code, in float32: exact for 16-bit scales.

        Cost: one dense weight in float32, and nine bytes a weight while the bits are spread out.
        """
        keep = bitmask.unpack(packed["bitmask"], packed.shape[1])
        every = keep.new_zeros(packed.shape, dtype=torch.int8)
        every.masked_scatter_(keep, _codes(packed["values"]))
        return self.grid.dequantised(every, packed["scales"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if more is stored than there are weights.
        """
        check_stored(self, shape, stored)
        groups = -(-shape[1] // GROUP_SIZE) if self.grouped else 1
        tensors = {
            "values": torch.zeros(stored, dtype=torch.uint8, device="cpu"),
            "bitmask": bitmask.empty(*shape),
            "scales": torch.zeros(shape[0], groups, dtype=dtype, device="cpu"),
        }
        return Packed(self.like(shape, tensors), shape, dtype, tensors)

    def why_broken(self, packed: Packed) -> str | None:
        """How bits and codes disagree, which code or scale `pack` would not have made; or None."""
        if (problem := bitmask.why_broken(packed["bitmask"], packed.shape[1])) is not None:
            return problem
        codes = _codes(packed["values"])
        keep = bitmask.unpack(packed["bitmask"], packed.shape[1])
        kept = int(keep.sum())
        if len(packed["values"]) != (kept + 1) // 2:
            return f"bitmask keeps {kept} weights, but {len(codes)} codes are stored"
        if kept % 2 and int(codes[-1]):
            return f"values hold a code behind the {kept} that bitmask keeps"
        wrong = (codes[:kept] == 0) | (codes[:kept] < -self.grid.largest)
        if bool(wrong.any()):
            row, column = where_first(torch.zeros_like(keep).masked_scatter_(keep, wrong))
            code = int(codes[wrong.int().argmax()])
            return f"values of row {row} column {column} hold the code {code}"
        infinite = ~packed["scales"].isfinite()
        if bool(infinite.any()):
            row, group = where_first(infinite)
            return f"scales of row {row} group {group} are {packed['scales'][row, group]}"
        return None

    def like(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "BitmapInt4":
        """The format of this name that has these tensors, which tell whether there are groups.

        Where one group holds all inputs, the format with groups has the same tensors and is it.
        Scales of groups can be arranged among the codes, those of rows are always there.
        """
        scales = tensors.get("scales")
        of_rows = scales is not None and scales.shape[1] == 1 and shape[1] > GROUP_SIZE
        return FORMATS[of_rows]

    def _why_not_quantisable(self, dtype: torch.dtype) -> str:
        return (
            f"into {self} needs a float32, bfloat16 or float16 weight, got {dtype}: "
            "scale x code is computed in float32, cast the layer with .float() first"
        )


def _stored(codes: Int8[Tensor, " codes"]) -> UInt8[Tensor, " bytes"]:
    return two_of_four.pack_nibbles(codes.view(torch.uint8)[None] & 15)[0].contiguous()


def _codes(values: UInt8[Tensor, " bytes"]) -> Int8[Tensor, " codes"]:
    """All codes of these bytes, the last one too where it is none."""
    nibbles = two_of_four.unpack_nibbles(values[None], 2 * len(values))[0]
    return (nibbles ^ 8).view(torch.int8) - 8


def _arranged(packed: Packed) -> dict[str, Tensor]:
    keep = bitmask.unpack(packed["bitmask"], packed.shape[1])
    kept = _codes(packed["values"])[: int(keep.sum())]
    lines, starts = bits.arrange(bits.CODES, keep, kept, packed["scales"])
    return {"lines": lines, "starts": starts}


def _restored(packed: Packed) -> dict[str, Tensor]:
    held = packed["lines"], packed["starts"]
    keep, kept, scales = bits.restore(bits.CODES, *held, *packed.shape, packed.dtype)
    assert scales is not None
    found = {"values": _stored(kept), "bitmask": bitmask.pack(keep), "scales": scales}
    return found | {name: packed[name] for name in ("scales",) if name in packed.tensors}


GROUPED = Arrangement(("lines", "starts"), _arranged, _restored)
OF_ROWS = Arrangement(("lines", "starts", "scales"), _arranged, _restored)
FORMATS = (BitmapInt4(), BitmapInt4(grouped=False))
