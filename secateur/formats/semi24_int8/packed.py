"""A 2:4 weight as two 8-bit integer codes for every four inputs, their positions, and scales."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from jaxtyping import Int8 as Int8Tensor
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, first_true, why_not_quantisable
from secateur.patterns.grids import Int8


@dataclass(frozen=True)
class PackedSemi24Int8:
    """Two codes for every four consecutive inputs, the columns they come from, a scale a row.

    The codes of a row lie in the order of their columns, -127 to 127. The metadata is that of
    `semi24`.
    """

    shape: tuple[int, int]
    values: Int8Tensor[Tensor, "out half_in"]
    metadata: UInt8[Tensor, "out eighth_in"]
    scales: Float[Tensor, "out 1"]

    @property
    def format(self) -> str:
        return "semi24_int8"

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "metadata": self.metadata, "scales": self.scales}


def pack(weight: Float[Tensor, "out in"]) -> PackedSemi24Int8:
    """The 2:4 weight rounded to `Int8()`: lossy, unless it lies on that grid already.

    The scales are those that lose least, see `Int8.scales`. A weight that has been unpacked, or
    reconstructed with `grid=Int8()`, lies on the grid and comes back bit for bit. (Not promised
    where its scale or a product underflows the dtype.)

    Cost: 0.625 bytes a weight and a scale a row, 0.3125 of a 16-bit dense weight.
        (8 codes x 8 bits + 8 x 2 bits for 16 weights)
    Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
        multiple of 4, if a weight is not finite, or for a float64 weight.
    """
    check_quantisable(weight, "semi24_int8")
    nibbles = two_of_four.nibbles_of(weight)
    scales = Int8().scales(weight)
    return PackedSemi24Int8(
        shape=(weight.shape[0], weight.shape[1]),
        values=two_of_four.gather(Int8().codes(weight, scales), nibbles),
        metadata=two_of_four.join(nibbles),
        scales=scales,
    )


def codes_of(packed: PackedSemi24Int8) -> Int8Tensor[Tensor, "out in"]:
    """The code of every weight, 0 where none is kept.

    Cost: one byte a weight, and eight bytes per kept code while it runs.
    """
    nibbles = two_of_four.split(packed.metadata, packed.shape[1] // 4)
    return two_of_four.scatter(packed.values, nibbles)


def dequantised(packed: PackedSemi24Int8) -> Float[Tensor, "out in"]:
    """The dense weight as scale x code, in float32: exact for 16-bit scales.

    Cost: one dense weight in float32, and eight bytes per kept code while it runs.
    """
    return Int8().dequantised(codes_of(packed), packed.scales)


def unpack(packed: PackedSemi24Int8) -> Float[Tensor, "out in"]:
    """The dense weight in the layer's dtype, each scale x code rounded once.

    Cost: as `dequantised`, and one dense weight.
    """
    return dequantised(packed).to(packed.dtype)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the weight is at most 2:4 and no float64, else what it is."""
    problem = why_not_quantisable(weight, "semi24_int8")
    return problem or two_of_four.why_not(weight, "semi24_int8")


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores codes for: always half."""
    return 0.5


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedSemi24Int8:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    return PackedSemi24Int8(
        shape=shape,
        metadata=two_of_four.empty_metadata(shape, stored, "semi24_int8"),
        values=torch.zeros(shape[0], shape[1] // 2, dtype=torch.int8, device="cpu"),
        scales=torch.zeros(shape[0], 1, dtype=dtype, device="cpu"),
    )


def broken(packed: PackedSemi24Int8) -> str | None:
    """None if positions, codes and scales are such as `pack` makes, else what is wrong."""
    problem = two_of_four.broken(packed.metadata, packed.shape[1] // 4)
    if problem is not None:
        return problem
    outside = packed.values == -128
    if bool(outside.any()):
        row, kept = first_true(outside)
        first = kept // 2 * 4
        return f"values of row {row} columns {first}..{first + 3} hold the code -128"
    return two_of_four.broken_scales(packed.scales)
