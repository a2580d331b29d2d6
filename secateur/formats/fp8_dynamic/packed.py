"""A dense weight as 8-bit float codes, and a scale for every output."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, first_true, why_not_quantisable
from secateur.patterns.grids import Fp8

NAN = 0x7F  # the bits of e4m3fn's only NaN, but for the sign


@dataclass(frozen=True)
class PackedFp8Dynamic:
    """A code for every weight, zero or not, and a scale a row.

    `values` are the bits of float8_e4m3fn, as bytes, since casting a module casts every buffer of a
    floating dtype.
    """

    shape: tuple[int, int]
    values: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out 1"]

    @property
    def format(self) -> str:
        return "fp8_dynamic"

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "scales": self.scales}


def pack(weight: Float[Tensor, "out in"]) -> PackedFp8Dynamic:
    """The weight rounded to `Fp8()`: lossy, unless it lies on that grid already.

    The scales are those that lose least, see `Fp8.scales`. A weight that has been unpacked lies on
    the grid and comes back bit for bit. (Not promised where its scale or a product underflows the
    dtype.)

    Cost: a byte a weight and a scale a row, half of a 16-bit dense weight.
    Raises: ValueError if a weight is not finite, or for a float64 weight.
    """
    check_quantisable(weight, "fp8_dynamic")
    scales = Fp8().scales(weight)
    codes = Fp8().codes(weight, scales).view(torch.uint8)
    return PackedFp8Dynamic((weight.shape[0], weight.shape[1]), codes.contiguous(), scales)


def codes_of(packed: PackedFp8Dynamic) -> Float[Tensor, "out in"]:
    """The code of every weight as float8_e4m3fn."""
    return packed.values.view(torch.float8_e4m3fn)


def dequantised(packed: PackedFp8Dynamic) -> Float[Tensor, "out in"]:
    """The dense weight as scale x code, in float32: exact for 16-bit scales."""
    return Fp8().dequantised(codes_of(packed), packed.scales)


def unpack(packed: PackedFp8Dynamic) -> Float[Tensor, "out in"]:
    """The dense weight in the layer's dtype, each scale x code rounded once.

    Cost: two dense weights, one in float32.
    """
    return dequantised(packed).to(packed.dtype)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None for any weight but one in float64: it needs no zeros."""
    return why_not_quantisable(weight, "fp8_dynamic")


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores codes for: all of it."""
    return 1.0


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedFp8Dynamic:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    if stored != shape[0]:
        raise ValueError(
            f"fp8_dynamic needs {shape[0]} rows of codes, got {stored}: "
            "the description is damaged, save the model again"
        )
    values = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    return PackedFp8Dynamic(shape, values, torch.zeros(shape[0], 1, dtype=dtype, device="cpu"))


def broken(packed: PackedFp8Dynamic) -> str | None:
    """None if codes and scales are such as `pack` makes, else what is wrong."""
    outside = packed.values & 0x7F == NAN
    if bool(outside.any()):
        row, column = first_true(outside)
        return f"values of row {row} column {column} hold a NaN"
    return two_of_four.broken_scales(packed.scales)
