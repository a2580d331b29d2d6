"""A 2:4 weight as two 8-bit floats for every four inputs, their positions, and scales."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, first_true, why_not_quantisable
from secateur.patterns.grids import Fp8

NAN = 0x7F  # the bits of e4m3fn's only NaN, but for the sign


@dataclass(frozen=True)
class PackedSemi24Fp8:
    """Two codes for every four consecutive inputs, the columns they come from, a scale a row.

    `values` are the bits of float8_e4m3fn, to be read with `.view(torch.float8_e4m3fn)`: as bytes,
    because a module that is cast casts every buffer of a floating dtype, and the codes must stay.
    They lie in the order of their columns. The metadata is that of `semi24`.
    """

    shape: tuple[int, int]
    values: UInt8[Tensor, "out half_in"]
    metadata: UInt8[Tensor, "out eighth_in"]
    scales: Float[Tensor, "out 1"]

    @property
    def format(self) -> str:
        return "semi24_fp8"

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "metadata": self.metadata, "scales": self.scales}


def pack(weight: Float[Tensor, "out in"]) -> PackedSemi24Fp8:
    """The 2:4 weight rounded to `Fp8()`: lossy, unless it lies on that grid already.

    The scales are those that lose least, see `Fp8.scales`. A weight that has been unpacked, or
    reconstructed with `grid=Fp8()`, lies on the grid and comes back bit for bit. (Not promised
    where its scale or a product underflows the dtype.)

    Cost: 0.625 bytes a weight and a scale a row, 0.3125 of a 16-bit dense weight.
        (8 codes x 8 bits + 8 x 2 bits for 16 weights)
    Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
        multiple of 4, if a weight is not finite, or for a float64 weight.
    """
    check_quantisable(weight, "semi24_fp8")
    nibbles = two_of_four.nibbles_of(weight)
    scales = Fp8().scales(weight)
    codes = Fp8().codes(weight, scales).view(torch.uint8)
    return PackedSemi24Fp8(
        shape=(weight.shape[0], weight.shape[1]),
        values=two_of_four.gather(codes, nibbles),
        metadata=two_of_four.join(nibbles),
        scales=scales,
    )


def codes_of(packed: PackedSemi24Fp8) -> Float[Tensor, "out in"]:
    """The code of every weight as float8_e4m3fn, 0 where none is kept.

    Cost: one byte a weight, and eight bytes per kept code while it runs.
    """
    nibbles = two_of_four.split(packed.metadata, packed.shape[1] // 4)
    return two_of_four.scatter(packed.values, nibbles).view(torch.float8_e4m3fn)


def dequantised(packed: PackedSemi24Fp8) -> Float[Tensor, "out in"]:
    """The dense weight as scale x code, in float32: exact for 16-bit scales.

    Cost: one dense weight in float32, and eight bytes per kept code while it runs.
    """
    return Fp8().dequantised(codes_of(packed), packed.scales)


def unpack(packed: PackedSemi24Fp8) -> Float[Tensor, "out in"]:
    """The dense weight in the layer's dtype, each scale x code rounded once.

    Cost: as `dequantised`, and one dense weight.
    """
    return dequantised(packed).to(packed.dtype)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the weight is at most 2:4 and no float64, else what it is."""
    problem = why_not_quantisable(weight, "semi24_fp8")
    return problem or two_of_four.why_not(weight, "semi24_fp8")


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores codes for: always half."""
    return 0.5


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedSemi24Fp8:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    return PackedSemi24Fp8(
        shape=shape,
        metadata=two_of_four.empty_metadata(shape, stored, "semi24_fp8"),
        values=torch.zeros(shape[0], shape[1] // 2, dtype=torch.uint8, device="cpu"),
        scales=torch.zeros(shape[0], 1, dtype=dtype, device="cpu"),
    )


def broken(packed: PackedSemi24Fp8) -> str | None:
    """None if positions, codes and scales are such as `pack` makes, else what is wrong."""
    problem = two_of_four.broken(packed.metadata, packed.shape[1] // 4)
    if problem is not None:
        return problem
    outside = packed.values & 0x7F == NAN
    if bool(outside.any()):
        row, kept = first_true(outside)
        return f"values of row {row} columns {kept // 2 * 4}..{kept // 2 * 4 + 3} hold a NaN"
    return two_of_four.broken_scales(packed.scales)
