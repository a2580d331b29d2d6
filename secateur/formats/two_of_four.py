"""Where the kept weights of a 2:4 weight are: one nibble for every group of four inputs.

Shared by the formats that store 2:4 weights, whatever they store for each kept one. A group's
nibble holds its first kept column in the low two bits and the second, always larger, in the high
two: the order that sparse `mma` demands. Byte `j` of a row of metadata holds group `2j` in its low
and `2j + 1` in its high nibble, so that four bytes read as a little-endian word list eight groups
from bit 0 upwards. With an odd number of groups the last high nibble is zero.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from secateur.patterns.pattern import where_first

# Kept positions of a group of four, from its four "is not zero" bits (bit 0 = first column):
# first | second << 2 with first < second, the order that sparse `mma` demands. Fewer than two
# nonzeros take the lowest free columns. MISFIT marks more than two.
MISFIT = 0
_01, _02, _03, _12, _13, _23 = 0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110
NIBBLES = (
    _01, _01, _01, _01, _02, _02, _12, MISFIT,
    _03, _03, _13, MISFIT, _23, MISFIT, MISFIT, MISFIT,
)  # fmt: skip


def metadata_of(weight: Shaped[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    """The nibbles of every group of four, two to a byte; -0.0 counts as zero.

    Raises: ValueError if a group has more than two nonzeros, or in_features is not a multiple of 4.
    """
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
    return pack_nibbles(nibbles)


def why_not(weight: Shaped[Tensor, "out in"], format: str) -> str | None:
    """Where the weight is not at most 2:4, or None."""
    if weight.shape[1] % 4:
        return f"{format} needs in_features that is a multiple of 4, got {tuple(weight.shape)}"
    nibbles = _nibbles(weight)
    if bool((nibbles == MISFIT).any()):
        row, first, kept = _crowded(weight, nibbles)
        return (
            f"{format} needs at most 2 nonzeros in every 4 consecutive inputs, "
            f"row {row} columns {first}..{first + 3} keep {kept}"
        )
    return None


def gather(
    dense: Shaped[Tensor, "out in"], metadata: UInt8[Tensor, "out bytes"]
) -> Shaped[Tensor, "out half_in"]:
    """The two kept entries of every group, the first column's first."""
    groups: Tensor = dense.unflatten(1, (-1, 4))
    return groups.gather(2, _positions(metadata, groups.shape[1])).flatten(1)


def scatter(
    kept: Shaped[Tensor, "out half_in"], metadata: UInt8[Tensor, "out bytes"]
) -> Shaped[Tensor, "out in"]:
    """The dense matrix with the kept entries at their columns and zeros elsewhere.

    Cost: one dense matrix, and eight bytes per kept entry while it runs.
    """
    rows, groups = len(kept), kept.shape[1] // 2
    dense, positions = kept.new_zeros(rows, groups, 4), _positions(metadata, groups)
    return dense.scatter_(2, positions, kept.unflatten(1, (groups, 2))).flatten(1)


def pack_nibbles(nibbles: UInt8[Tensor, "out nibbles"]) -> UInt8[Tensor, "out bytes"]:
    """The nibbles, two to a byte, the even one in the low half; an odd number ends on a zero."""
    even = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack_nibbles(packed: UInt8[Tensor, "out bytes"], count: int) -> UInt8[Tensor, "out nibbles"]:
    """The first `count` nibbles of every row; the reverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :count]


def empty_metadata(shape: tuple[int, int], stored: int, format: str) -> UInt8[Tensor, "out bytes"]:
    """Zeros of the size of this shape's metadata, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    if shape[1] % 4 or stored != shape[0]:
        raise ValueError(
            f"{format} needs {shape[0]} rows of a multiple of 4 inputs, got {stored} x {shape[1]}: "
            "the description is damaged, save the model again"
        )
    return torch.zeros(shape[0], (shape[1] // 4 + 1) // 2, dtype=torch.uint8, device="cpu")


def why_broken(metadata: UInt8[Tensor, "out bytes"], columns: int) -> str | None:
    """The first group that does not name two ascending columns, or None."""
    groups = columns // 4
    nibbles = unpack_nibbles(metadata, groups)
    wrong = (nibbles & 3) >= (nibbles >> 2)
    if bool(wrong.any()):
        row, group = where_first(wrong)
        return f"metadata of row {row} columns {4 * group}..{4 * group + 3} are not two ascending"
    if groups % 2 and bool((metadata[:, -1] >> 4).any()):
        return f"metadata name columns from {4 * groups} on, which the weight lacks"
    return None


def _nibbles(weight: Shaped[Tensor, "out in"]) -> UInt8[Tensor, "out groups"]:
    bits = (weight != 0).unflatten(1, (-1, 4)).to(torch.uint8)
    code = bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2 | bits[..., 3] << 3
    return torch.tensor(NIBBLES, dtype=torch.uint8, device=weight.device)[code.int()]


def _crowded(weight: Tensor, nibbles: Tensor) -> tuple[int, int, int]:
    """Row, first column and number of nonzeros of the first group that keeps more than two."""
    row, group = where_first(nibbles == MISFIT)
    columns = slice(4 * group, 4 * group + 4)
    return row, 4 * group, int((weight[row, columns] != 0).sum())


def _positions(metadata: UInt8[Tensor, "out bytes"], groups: int) -> Tensor:
    """[out, groups, 2]: the two kept columns within each group, as indices of gather."""
    nibbles = unpack_nibbles(metadata, groups)
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
