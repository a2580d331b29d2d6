"""A 2:4 weight as two 4-bit codes for every four inputs, their positions, and scales."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, first_true, why_not_quantisable
from secateur.patterns.grids import Int4

GROUP_SIZE = 128  # inputs, kept or not, that share a scale


@dataclass(frozen=True)
class PackedSemi24Int4:
    """Two codes for every four consecutive inputs, the columns they come from, and scales.

    Byte `g` of a row of `values` holds the two kept codes of group of four `g`: the first in its
    low, the second in its high nibble, two's complement, -7 to 7. The metadata is that of `semi24`.
    Column `s` of `scales` belongs to the inputs `128 s` to `128 s + 127` of the dense weight, or
    the only column to all of them.
    """

    shape: tuple[int, int]
    values: UInt8[Tensor, "out quarter_in"]
    metadata: UInt8[Tensor, "out eighth_in"]
    scales: Float[Tensor, "out scale_groups"]

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for all of a row of more than 128."""
        return None if self.scales.shape[1] == 1 and self.shape[1] > GROUP_SIZE else GROUP_SIZE

    @property
    def format(self) -> str:
        return "semi24_int4" if self.group_size else "semi24_int4:channel"

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "metadata": self.metadata, "scales": self.scales}


def pack(weight: Float[Tensor, "out in"], group_size: int | None = GROUP_SIZE) -> PackedSemi24Int4:
    """The 2:4 weight rounded to `Int4(group_size)`: lossy, unless it lies on that grid already.

    The scales are those that lose least, see `Int4.scales`. A weight that has been unpacked, or
    reconstructed with `grid=Int4(group_size)`, lies on the grid and comes back bit for bit. (Not
    promised where its scale or a product underflows the dtype.)

    Cost: 0.390625 bytes a weight with 16-bit scales, 0.195 of a 16-bit dense weight.
        (8 codes x 4 bits + 8 x 2 bits for 16 weights, 16 bits for 128)
    Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
        multiple of 4, if a weight is not finite, or for a float64 weight or another group_size.
    """
    check_quantisable(weight, "semi24_int4")
    if group_size not in (None, GROUP_SIZE):
        raise ValueError(
            f"semi24_int4 needs a group_size of {GROUP_SIZE}, or None for one scale per output, "
            f"got {group_size}: pack with one of them"
        )
    nibbles = two_of_four.nibbles_of(weight)
    grid = Int4(group_size)
    scales = grid.scales(weight)
    codes = two_of_four.gather(grid.codes(weight, scales), nibbles)
    return PackedSemi24Int4(
        shape=(weight.shape[0], weight.shape[1]),
        values=two_of_four.join(codes.view(torch.uint8) & 15),
        metadata=two_of_four.join(nibbles),
        scales=scales,
    )


def codes_of(packed: PackedSemi24Int4) -> Int8[Tensor, "out half_in"]:
    """The kept codes, two for every four inputs."""
    nibbles = two_of_four.split(packed.values, packed.shape[1] // 2)
    return (nibbles ^ 8).view(torch.int8) - 8


def dequantised(packed: PackedSemi24Int4) -> Float[Tensor, "out in"]:
    """The dense weight as scale x code, in float32: exact for 16-bit scales.

    Cost: one dense weight in float32, and eight bytes per kept code while it runs.
    """
    nibbles = two_of_four.split(packed.metadata, packed.shape[1] // 4)
    dense = two_of_four.scatter(codes_of(packed), nibbles)
    return Int4(packed.group_size).dequantised(dense, packed.scales)


def unpack(packed: PackedSemi24Int4) -> Float[Tensor, "out in"]:
    """The dense weight in the layer's dtype, each scale x code rounded once.

    Cost: as `dequantised`, and one dense weight.
    """
    return dequantised(packed).to(packed.dtype)


def why_not(weight: Float[Tensor, "out in"], group_size: int | None = GROUP_SIZE) -> str | None:
    """None if the weight is at most 2:4 and no float64, else what it is."""
    problem = why_not_quantisable(weight, "semi24_int4")
    return problem or two_of_four.why_not(weight, "semi24_int4")


def density(weight: Float[Tensor, "out in"], group_size: int | None = GROUP_SIZE) -> float:
    """The fraction of the weight that `pack` stores codes for: always half."""
    return 0.5


def empty(
    shape: tuple[int, int], stored: int, dtype: torch.dtype, group_size: int | None = GROUP_SIZE
) -> PackedSemi24Int4:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    groups = 1 if group_size is None else -(-shape[1] // group_size)
    return PackedSemi24Int4(
        shape=shape,
        metadata=two_of_four.empty_metadata(shape, stored, "semi24_int4"),
        values=torch.zeros(shape[0], shape[1] // 4, dtype=torch.uint8, device="cpu"),
        scales=torch.zeros(shape[0], groups, dtype=dtype, device="cpu"),
    )


def broken(packed: PackedSemi24Int4) -> str | None:
    """None if positions, codes and scales are such as `pack` makes, else what is wrong."""
    problem = two_of_four.broken(packed.metadata, packed.shape[1] // 4)
    if problem is not None:
        return problem
    outside = two_of_four.split(packed.values, packed.shape[1] // 2) == 8
    if bool(outside.any()):
        row, kept = first_true(outside)
        return f"values of row {row} columns {kept // 2 * 4}..{kept // 2 * 4 + 3} hold the code -8"
    return two_of_four.broken_scales(packed.scales)
