"""A 2:4 weight as its kept values and their 2-bit positions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.contract import check_dense, first_true

# Kept positions of a group of four, from its four "is not zero" bits (bit 0 = first column):
# first | second << 2 with first < second, the order that sparse `mma` demands. Fewer than two
# nonzeros take the lowest free columns. MISFIT marks more than two.
MISFIT = 0
_01, _02, _03, _12, _13, _23 = 0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110
NIBBLES = (
    _01, _01, _01, _01, _02, _02, _12, MISFIT,
    _03, _03, _13, MISFIT, _23, MISFIT, MISFIT, MISFIT,
)  # fmt: skip


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
    if weight.shape[1] % 4:
        raise ValueError(
            f"pack needs in_features that is a multiple of 4, got {tuple(weight.shape)}: "
            "leave this layer dense, or pad its inputs with zero columns"
        )
    nibbles = _nibbles(weight)
    if bool((nibbles == MISFIT).any()):
        row, first, kept = _crowded(weight, nibbles)
        raise ValueError(
            f"pack needs a 2:4 weight, row {row}, columns {first}..{first + 3} keeps {kept}: "
            "run prune_ with NM(2, 4) first"
        )
    groups = weight.unflatten(1, (-1, 4))
    picked = groups.gather(2, _positions(nibbles))
    return PackedSemi24(
        shape=(weight.shape[0], weight.shape[1]),
        values=picked.masked_fill(picked == 0, 0.0).flatten(1),
        metadata=_join(nibbles),
    )


def unpack(packed: PackedSemi24) -> Float[Tensor, "out in"]:
    """The dense weight.

    Cost: one dense weight, and eight bytes per kept value while it runs.
    """
    groups = packed.shape[1] // 4
    dense = packed.values.new_zeros(packed.shape[0], groups, 4)
    positions = _positions(_split(packed.metadata, groups))
    return dense.scatter_(2, positions, packed.values.unflatten(1, (groups, 2))).flatten(1)


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the weight is at most 2:4, else where it is not."""
    if weight.shape[1] % 4:
        return f"semi24 needs in_features that is a multiple of 4, got {tuple(weight.shape)}"
    nibbles = _nibbles(weight)
    if bool((nibbles == MISFIT).any()):
        row, first, kept = _crowded(weight, nibbles)
        return (
            "semi24 needs at most 2 nonzeros in every 4 consecutive inputs, "
            f"row {row} columns {first}..{first + 3} keep {kept}"
        )
    return None


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores values for: always half."""
    return 0.5


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedSemi24:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    if shape[1] % 4 or stored != shape[0]:
        raise ValueError(
            f"semi24 needs {shape[0]} rows of a multiple of 4 inputs, got {stored} x {shape[1]}: "
            "the description is damaged, save the model again"
        )
    return PackedSemi24(
        shape=shape,
        values=torch.zeros(shape[0], shape[1] // 2, dtype=dtype),
        metadata=torch.zeros(shape[0], (shape[1] // 4 + 1) // 2, dtype=torch.uint8),
    )


def broken(packed: PackedSemi24) -> str | None:
    """None if every group names two ascending columns, else the first that does not."""
    nibbles = _split(packed.metadata, packed.shape[1] // 4)
    wrong = (nibbles & 3) >= (nibbles >> 2)
    if bool(wrong.any()):
        row, group = first_true(wrong)
        return f"metadata of row {row} columns {4 * group}..{4 * group + 3} are not two ascending"
    return None


def _nibbles(weight: Float[Tensor, "out in"]) -> UInt8[Tensor, "out groups"]:
    bits = (weight != 0).unflatten(1, (-1, 4)).to(torch.uint8)
    code = bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2 | bits[..., 3] << 3
    return torch.tensor(NIBBLES, dtype=torch.uint8, device=weight.device)[code.int()]


def _crowded(weight: Tensor, nibbles: Tensor) -> tuple[int, int, int]:
    """Row, first column and number of nonzeros of the first group that keeps more than two."""
    row, group = first_true(nibbles == MISFIT)
    columns = slice(4 * group, 4 * group + 4)
    return row, 4 * group, int((weight[row, columns] != 0).sum())


def _positions(nibbles: UInt8[Tensor, "out groups"]) -> Tensor:
    """[out, groups, 2]: the two kept columns within each group, as indices of gather."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()


def _join(nibbles: UInt8[Tensor, "out groups"]) -> UInt8[Tensor, "out bytes"]:
    even = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def _split(metadata: UInt8[Tensor, "out bytes"], groups: int) -> UInt8[Tensor, "out groups"]:
    return torch.stack((metadata & 15, metadata >> 4), dim=2).flatten(1)[:, :groups]
