"""Unstructured weights as nonzeros and a bitmask: the smallest form below about 90 % zeros."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.bitmap import bitmask, gpu
from secateur.formats.contract import (
    Arrangement,
    Format,
    Packed,
    check_stored,
    dense_shape,
    why_no_weight,
    why_not_smaller,
)
from secateur.formats.kernels import bits
from secateur.formats.reference import REFERENCE


def _arranged(packed: Packed) -> dict[str, Tensor]:
    keep = bitmask.unpack(packed["bitmask"], packed.shape[1])
    lines, starts = bits.arrange(bits.FLOATS, keep, packed["values"])
    return {"lines": lines, "starts": starts}


def _restored(packed: Packed) -> dict[str, Tensor]:
    held = packed["lines"], packed["starts"]
    keep, values, _ = bits.restore(bits.FLOATS, *held, *packed.shape, packed.dtype)
    return {"values": values, "bitmask": bitmask.pack(keep)}


LINES = Arrangement(("lines", "starts"), _arranged, _restored)


@dataclass(frozen=True)
class Bitmap(Format):
    """The nonzeros in row order, and a bit for every weight.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[nonzeros]` |
    | `bitmask` | uint8 | `[out, ceil(in / 8)]` |

    The bits are described in `bitmask.py`.
    """

    name = "bitmap"
    tensors = ("values", "bitmask")
    implementations = (*gpu.implementations(bits.FLOATS, LINES), REFERENCE)
    is_exact = True

    def why_not(self, weight: Tensor) -> str | None:
        """By how much the packed weight is no smaller than the dense one, or None if it is."""
        if (problem := why_no_weight(weight, self)) is not None:
            return problem
        mask_bytes = weight.shape[0] * ((weight.shape[1] + 7) // 8)
        value_bytes = int(weight.count_nonzero()) * weight.itemsize
        return why_not_smaller(weight, self, value_bytes + mask_bytes)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for."""
        return int(weight.count_nonzero()) / max(1, weight.numel())

    def pack(self, weight: Tensor) -> Packed:
        """The nonzeros and their bitmask; unpacking gives `weight`, any pattern, any sparsity.

        Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

        Cost: density x dense bytes, + 1 bit a weight: 0.5625 of a 16-bit weight that is half zeros.
        Raises: ValueError if a weight is not finite.
        """
        shape = dense_shape(weight)
        keep = weight != 0
        tensors = {"values": weight[keep], "bitmask": bitmask.pack(keep)}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight, and nine bytes a weight while the bits are spread out.
        """
        dense = packed["values"].new_zeros(packed.shape)
        keep = bitmask.unpack(packed["bitmask"], packed.shape[1])
        return dense.masked_scatter_(keep, packed["values"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if more is stored than there are weights.
        """
        check_stored(self, shape, stored)
        values = torch.zeros(stored, dtype=dtype, device="cpu")
        return Packed(self, shape, dtype, {"values": values, "bitmask": bitmask.empty(*shape)})

    def why_broken(self, packed: Packed) -> str | None:
        """How bits and values disagree, or which bits stand for no weight; or None."""
        columns, stored = packed.shape[1], len(packed["values"])
        kept = int(bitmask.unpack(packed["bitmask"], columns).sum())
        if (problem := bitmask.why_broken(packed["bitmask"], columns)) is None and kept != stored:
            return f"bitmask keeps {kept} weights, but {stored} values are stored"
        return problem
