"""A dense weight as 8-bit integer codes, and a scale for every output."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Int8 as Int8Tensor
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, first_true, why_not_quantisable
from secateur.patterns.grids import Int8


@dataclass(frozen=True)
class PackedInt8Dynamic:
    """A code for every weight, zero or not, and a scale a row.

    Codes are -127 to 127.
    """

    shape: tuple[int, int]
    values: Int8Tensor[Tensor, "out in"]
    scales: Float[Tensor, "out 1"]

    @property
    def format(self) -> str:
        return "int8_dynamic"

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "scales": self.scales}


def pack(weight: Float[Tensor, "out in"]) -> PackedInt8Dynamic:
    """The weight rounded to `Int8()`: lossy, unless it lies on that grid already.

    The scales are those that lose least, see `Int8.scales`. A weight that has been unpacked lies on
    the grid and comes back bit for bit. (Not promised where its scale or a product underflows the
    dtype.)

    Cost: a byte a weight and a scale a row, half of a 16-bit dense weight.
    Raises: ValueError if a weight is not finite, or for a float64 weight.
    """
    check_quantisable(weight, "int8_dynamic")
    scales = Int8().scales(weight)
    codes = Int8().codes(weight, scales)
    return PackedInt8Dynamic((weight.shape[0], weight.shape[1]), codes.contiguous(), scales)


def codes_of(packed: PackedInt8Dynamic) -> Int8Tensor[Tensor, "out in"]:
    """The code of every weight."""
    return packed.values


def dequantised(packed: PackedInt8Dynamic) -> Float[Tensor, "out in"]:
    """The dense weight as scale x code, in float32: exact for 16-bit scales."""
    return Int8().dequantised(codes_of(packed), packed.scales)


def unpack(packed: PackedInt8Dynamic) -> Float[Tensor, "out in"]:
    """The dense weight in the layer's dtype, each scale x code rounded once.

    Cost: two dense weights, one in float32.
    """
    return dequantised(packed).to(packed.dtype)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None for any weight but one in float64: it needs no zeros."""
    return why_not_quantisable(weight, "int8_dynamic")


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores codes for: all of it."""
    return 1.0


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedInt8Dynamic:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    if stored != shape[0]:
        raise ValueError(
            f"int8_dynamic needs {shape[0]} rows of codes, got {stored}: "
            "the description is damaged, save the model again"
        )
    values = torch.zeros(shape, dtype=torch.int8, device="cpu")
    return PackedInt8Dynamic(shape, values, torch.zeros(shape[0], 1, dtype=dtype, device="cpu"))


def broken(packed: PackedInt8Dynamic) -> str | None:
    """None if codes and scales are such as `pack` makes, else what is wrong."""
    outside = packed.values == -128
    if bool(outside.any()):
        row, column = first_true(outside)
        return f"values of row {row} column {column} hold the code -128"
    return two_of_four.broken_scales(packed.scales)
