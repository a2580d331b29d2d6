"""An unstructured weight as compressed sparse rows, in torch's words."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from secateur.formats.contract import check_dense


@dataclass(frozen=True)
class PackedCsr:
    """The nonzeros in row order, where each row starts, and the column of each."""

    shape: tuple[int, int]
    values: Float[Tensor, " nonzeros"]
    crow_indices: Int32[Tensor, " out_and_1"]
    col_indices: Int32[Tensor, " nonzeros"]

    @property
    def format(self) -> str:
        return "csr"

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, in the order of the operator's arguments."""
        return {
            "values": self.values,
            "crow_indices": self.crow_indices,
            "col_indices": self.col_indices,
        }


def pack(weight: Float[Tensor, "out in"]) -> PackedCsr:
    """The nonzeros with their rows and columns; `unpack(pack(w))` equals `w`, any pattern.

    Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

    Cost: density x (dense bytes + 4 a weight), + 4 bytes a row: smaller than a float32 weight above
        half zeros, and than a 16-bit weight above two thirds.
    Raises: ValueError if a weight is not finite.
    Source: torch.sparse_csr, with 32-bit indices.
    """
    check_dense(weight)
    keep = weight != 0
    crow_indices = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow_indices[1:] = keep.sum(1).cumsum(0)
    return PackedCsr(
        shape=(weight.shape[0], weight.shape[1]),
        values=weight[keep],
        crow_indices=crow_indices,
        col_indices=keep.nonzero()[:, 1].to(torch.int32),
    )


def unpack(packed: PackedCsr) -> Float[Tensor, "out in"]:
    """The dense weight.

    Cost: one dense weight, and 16 bytes per nonzero while it runs.
    """
    dense = packed.values.new_zeros(packed.shape)
    dense.view(-1)[_places(packed)] = packed.values
    return dense


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the packed weight is smaller than the dense one, else by how much it is not."""
    nonzeros = int(weight.count_nonzero())
    stored_bytes = nonzeros * (weight.itemsize + 4) + 4 * (weight.shape[0] + 1)
    ratio = stored_bytes / max(1, weight.nbytes)
    if ratio >= 1:
        return f"csr would store {ratio:.2f}x the bytes of the dense weight: nothing to gain"
    return None


def density(weight: Float[Tensor, "out in"]) -> float:
    """The fraction of the weight that `pack` stores values for."""
    return int(weight.count_nonzero()) / max(1, weight.numel())


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedCsr:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if more is stored than there are weights.
    """
    if stored > shape[0] * shape[1]:
        raise ValueError(
            f"csr needs at most {shape[0] * shape[1]} values, got {stored}: "
            "the description is damaged, save the model again"
        )
    return PackedCsr(
        shape=shape,
        values=torch.zeros(stored, dtype=dtype, device="cpu"),
        crow_indices=torch.zeros(shape[0] + 1, dtype=torch.int32, device="cpu"),
        col_indices=torch.zeros(stored, dtype=torch.int32, device="cpu"),
    )


def broken(packed: PackedCsr) -> str | None:
    """None if the indices are those of a weight of this shape, else what is wrong with them."""
    crow, col = packed.crow_indices.long(), packed.col_indices  # differences may not overflow
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow.diff() < 0).any()):
        return f"crow_indices do not rise from 0 to {len(col)}"
    if bool(((col < 0) | (col >= packed.shape[1])).any()):
        return f"col_indices leave 0..{packed.shape[1] - 1}"
    if bool((_places(packed).diff() <= 0).any()):
        return "col_indices do not ascend within a row"
    return None


def _places(packed: PackedCsr) -> Int64[Tensor, " nonzeros"]:
    """Where each value stands in the flattened weight."""
    counts = packed.crow_indices.diff()
    rows = torch.arange(packed.shape[0], device=counts.device)
    rows = rows.repeat_interleave(counts, output_size=len(packed.values))
    return rows * packed.shape[1] + packed.col_indices
