"""Where the kept weights of a 4:8 weight are: a bit for every input, a byte for every eight.

Shared by the formats that store 4:8 weights, whatever they store for each kept one. Bit `b` of
byte `j` of a row of metadata is input 8j + b, as in a `bitmap`; 1 = keep. Four bits of each byte
are set: a group with fewer nonzeros keeps zeros too, those of its lowest free columns.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from secateur.patterns.pattern import where_first

KEPT, GROUP = 4, 8


def _filled(bits: int) -> int:
    """The mask that keeps these columns and the lowest others; 0 if these are too many."""
    missing = KEPT - bits.bit_count()
    if missing < 0:
        return MISFIT
    free = [column for column in range(GROUP) if not bits >> column & 1]
    return bits | sum(1 << column for column in free[:missing])


MISFIT = 0
MASKS = tuple(map(_filled, range(2**GROUP)))  # by the "is not zero" bits of a group, bit 0 = first
# The kept columns of a group, in ascending order, by its mask; of other masks nothing is asked.
COLUMNS = tuple(
    tuple(column for column in range(GROUP) if mask >> column & 1)
    if mask.bit_count() == KEPT
    else tuple(range(KEPT))
    for mask in range(2**GROUP)
)


def metadata_of(weight: Shaped[Tensor, "out in"]) -> UInt8[Tensor, "out groups"]:
    """The mask of every group of eight; -0.0 counts as zero.

    Raises: ValueError if a group has more than four nonzeros, or in_features is no multiple of 8.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(
            f"pack needs in_features that is a multiple of 8, got {tuple(weight.shape)}: "
            "leave this layer dense, or pad its inputs with zero columns"
        )
    masks = _masks(weight)
    if bool((masks == MISFIT).any()):
        row, first, kept = _crowded(weight, masks)
        raise ValueError(
            f"pack needs a 4:8 weight, row {row}, columns {first}..{first + 7} keeps {kept}: "
            "run prune_ with NM(4, 8) first"
        )
    return masks


def why_not(weight: Shaped[Tensor, "out in"], format: str) -> str | None:
    """Where the weight is not at most 4:8, or None."""
    if weight.shape[1] % GROUP:
        return f"{format} needs in_features that is a multiple of 8, got {tuple(weight.shape)}"
    masks = _masks(weight)
    if bool((masks == MISFIT).any()):
        row, first, kept = _crowded(weight, masks)
        return (
            f"{format} needs at most 4 nonzeros in every 8 consecutive inputs, "
            f"row {row} columns {first}..{first + 7} keep {kept}"
        )
    return None


def gather(
    dense: Shaped[Tensor, "out in"], metadata: UInt8[Tensor, "out groups"]
) -> Shaped[Tensor, "out half_in"]:
    """The four kept entries of every group, the first column's first."""
    groups: Tensor = dense.unflatten(1, (-1, GROUP))
    return groups.gather(2, _positions(metadata)).flatten(1)


def scatter(
    kept: Shaped[Tensor, "out half_in"], metadata: UInt8[Tensor, "out groups"]
) -> Shaped[Tensor, "out in"]:
    """The dense matrix with the kept entries at their columns and zeros elsewhere.

    Cost: one dense matrix, and eight bytes per kept entry while it runs.
    """
    rows, groups = metadata.shape
    dense = kept.new_zeros(rows, groups, GROUP)
    return dense.scatter_(2, _positions(metadata), kept.unflatten(1, (groups, KEPT))).flatten(1)


def empty_metadata(shape: tuple[int, int], stored: int, format: str) -> UInt8[Tensor, "out groups"]:
    """Zeros of the size of this shape's metadata, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    if shape[1] % GROUP or stored != shape[0]:
        raise ValueError(
            f"{format} needs {shape[0]} rows of a multiple of 8 inputs, got {stored} x {shape[1]}: "
            "the description is damaged, save the model again"
        )
    return torch.zeros(shape[0], shape[1] // GROUP, dtype=torch.uint8, device="cpu")


def why_broken(metadata: UInt8[Tensor, "out groups"], columns: int) -> str | None:
    """The first group that does not keep four columns, or None."""
    counts = torch.tensor([mask.bit_count() for mask in range(2**GROUP)], device=metadata.device)
    wrong = counts[metadata.int()] != KEPT
    if bool(wrong.any()):
        row, group = where_first(wrong)
        first, kept = GROUP * group, int(metadata[row, group]).bit_count()
        return f"metadata of row {row} columns {first}..{first + 7} keep {kept}, not 4"
    return None


def _masks(weight: Shaped[Tensor, "out in"]) -> UInt8[Tensor, "out groups"]:
    bits = (weight != 0).unflatten(1, (-1, GROUP)).to(torch.uint8)
    shifts = torch.arange(GROUP, dtype=torch.uint8, device=weight.device)
    code = (bits << shifts).sum(2, dtype=torch.uint8)
    return torch.tensor(MASKS, dtype=torch.uint8, device=weight.device)[code.int()]


def _crowded(weight: Tensor, masks: Tensor) -> tuple[int, int, int]:
    """Row, first column and number of nonzeros of the first group that keeps more than four."""
    row, group = where_first(masks == MISFIT)
    columns = slice(GROUP * group, GROUP * (group + 1))
    return row, GROUP * group, int((weight[row, columns] != 0).sum())


def _positions(metadata: UInt8[Tensor, "out groups"]) -> Tensor:
    """[out, groups, 4]: the kept columns within each group, as indices of gather."""
    return torch.tensor(COLUMNS, device=metadata.device)[metadata.int()]
