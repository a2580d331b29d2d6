"""Unstructured weights as compressed sparse rows, in torch's words."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import compressed_rows
from secateur.formats.contract import (
    Format,
    Implementation,
    Packed,
    check_stored,
    dense_shape,
    why_no_weight,
    why_not_smaller,
)
from secateur.formats.csr import torch_csr
from secateur.formats.reference import REFERENCE


@dataclass(frozen=True)
class Csr(Format):
    """The nonzeros in row order, where each row starts, and the column of each.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[nonzeros]` |
    | `crow_indices` | int32 | `[out + 1]` |
    | `col_indices` | int32 | `[nonzeros]` |
    """

    name = "csr"
    tensors = compressed_rows.TENSORS
    implementations = (
        Implementation("torch_csr", torch_csr.linear, torch_csr.why_not),
        REFERENCE,
    )
    is_exact = True
    prune_to = "unstructured:0.9"

    def why_not(self, weight: Tensor) -> str | None:
        """By how much the packed weight is no smaller than the dense one, or None if it is."""
        if (problem := why_no_weight(weight, self)) is not None:
            return problem
        nonzeros = int(weight.count_nonzero())
        stored_bytes = nonzeros * (weight.itemsize + 4) + 4 * (weight.shape[0] + 1)
        return why_not_smaller(weight, self, stored_bytes)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for."""
        return int(weight.count_nonzero()) / max(1, weight.numel())

    def pack(self, weight: Tensor) -> Packed:
        """The nonzeros with their rows and columns; unpacking gives `weight`, any pattern.

        Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

        Cost: density x (dense bytes + 4 a weight), + 4 bytes a row: smaller than a float32 weight
            above half zeros, and than a 16-bit weight above two thirds.
        Raises: ValueError if a weight is not finite.
        Source: torch.sparse_csr, with 32-bit indices.
        """
        shape = dense_shape(weight)
        keep = weight != 0
        tensors = {"values": weight[keep], **compressed_rows.indices_of(keep)}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight, and 16 bytes per nonzero while it runs.
        """
        values, (out, width) = packed["values"], packed.shape
        rows = compressed_rows.rows_of(packed["crow_indices"], len(values)).long()
        dense = values.new_zeros(out, width)
        dense.view(-1)[rows * width + packed["col_indices"]] = values
        return dense

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if more is stored than there are weights.
        """
        check_stored(self, shape, stored)
        values = torch.zeros(stored, dtype=dtype, device="cpu")
        indices = compressed_rows.empty_indices(shape[0], stored)
        return Packed(self, shape, dtype, {"values": values, **indices})

    def why_broken(self, packed: Packed) -> str | None:
        """What is wrong with the indices of a weight of this shape, or None."""
        crow, col = packed["crow_indices"], packed["col_indices"]
        return compressed_rows.why_broken(crow, col, packed.shape[1], "row")
