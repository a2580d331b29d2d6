"""A bit for every weight, 1 = keep: where the stored numbers of a weight with zeros anywhere are.

Bit `b` of byte `j` of a row is column 8j + b. A row starts on a byte of its own, and the unused
bits of its last byte are zero.
"""

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack(keep: Bool[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    """The bits of these weights."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    bits: Tensor = padded.unflatten(1, (-1, 8)) << _shifts(keep)
    return bits.sum(2, dtype=torch.uint8)


def unpack(bitmask: UInt8[Tensor, "out bytes"], columns: int) -> Bool[Tensor, "out in"]:
    """The inverse of `pack`."""
    bits: Tensor = (bitmask.unsqueeze(2) >> _shifts(bitmask)) & 1
    keep: Tensor = bits.flatten(1)[:, :columns].bool()
    return keep


def empty(rows: int, columns: int) -> UInt8[Tensor, "out bytes"]:
    """Zeros of the right size, for a loader to fill."""
    return torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8, device="cpu")


def why_broken(bitmask: UInt8[Tensor, "out bytes"], columns: int) -> str | None:
    """Which bits stand for no weight, or None."""
    used = columns % 8
    if used and bool((bitmask[:, -1] >> used).any()):
        return f"bitmask keeps columns from {columns} on, which the weight lacks"
    return None


def _shifts(like: Tensor) -> UInt8[Tensor, " 8"]:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
