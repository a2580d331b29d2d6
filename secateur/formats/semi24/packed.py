"""A 2:4 weight as its kept values and their 2-bit positions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_dense


@dataclass(frozen=True)
class PackedSemi24:
    """Two values for every four consecutive inputs, and the columns they come from.

    A group's metadata is one nibble: its first kept column in the low two bits, the second, always
    larger, in the high two. Byte `j` of a row holds group `2j` in its low and `2j + 1` in its high
    nibble, so that four bytes read as a little-endian word list eight groups from bit 0 upwards.
    With an odd number of groups the last high nibble is zero.
    """

    shape: tuple[int, int]
    values: Float[Tensor, "out half_in"]
    metadata: UInt8[Tensor, "out eighth_in"]

    @property
    def format(self) -> str:
        return "semi24"

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {"values": self.values, "metadata": self.metadata}


def pack(weight: Float[Tensor, "out in"]) -> PackedSemi24:
    """The 2:4 weight as its kept values and their 2-bit positions; `unpack(pack(w))` equals `w`.

    A group with fewer than two nonzeros stores explicit zeros, so any weight that is *at most* 2:4
    packs. Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

    Cost: 0.5625 of the bytes of a 16-bit dense weight.   (8 values + 8 x 2 bits for 16 weights)
    Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
        multiple of 4, or if a weight is not finite.
    Source: PTX ISA, sparse `mma.sp` operand A; layout is ours, arranged per kernel on load.
    """
    check_dense(weight)
    nibbles = two_of_four.nibbles_of(weight)
    kept = two_of_four.gather(weight, nibbles)
    return PackedSemi24(
        shape=(weight.shape[0], weight.shape[1]),
        values=kept.masked_fill(kept == 0, 0.0),
        metadata=two_of_four.join(nibbles),
    )


def unpack(packed: PackedSemi24) -> Float[Tensor, "out in"]:
    """The dense weight.

    Cost: one dense weight, and eight bytes per kept value while it runs.
    """
    nibbles = two_of_four.split(packed.metadata, packed.shape[1] // 4)
    return two_of_four.scatter(packed.values, nibbles)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the weight is at most 2:4, else where it is not."""
    return two_of_four.why_not(weight, "semi24")


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores values for: always half."""
    return 0.5


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedSemi24:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    metadata = two_of_four.empty_metadata(shape, stored, "semi24")
    return PackedSemi24(
        shape, torch.zeros(shape[0], shape[1] // 2, dtype=dtype, device="cpu"), metadata
    )


def broken(packed: PackedSemi24) -> str | None:
    """None if every group names two ascending columns, else the first that does not."""
    return two_of_four.broken(packed.metadata, packed.shape[1] // 4)
