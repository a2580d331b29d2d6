"""Which entries of each row are kept, as torch's compressed sparse rows have it, in 32 bits.

Shared by the formats that store kept weights, or kept blocks, in row order: row `i` has
`values[crow_indices[i]:crow_indices[i + 1]]`, and `col_indices` holds the column of each.
"""

import torch
from jaxtyping import Bool, Int32
from torch import Tensor

TENSORS = ("values", "crow_indices", "col_indices")


def indices_of(keep: Bool[Tensor, "rows columns"]) -> dict[str, Tensor]:
    """The two tensors of indices, by name."""
    crow_indices = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=keep.device)
    crow_indices[1:] = keep.sum(1).cumsum(0)
    col_indices = keep.nonzero()[:, 1].to(torch.int32)
    return {"crow_indices": crow_indices, "col_indices": col_indices}


def empty_indices(rows: int, stored: int) -> dict[str, Tensor]:
    """Both tensors of indices as zeros, for a loader to fill."""
    return {
        "crow_indices": torch.zeros(rows + 1, dtype=torch.int32, device="cpu"),
        "col_indices": torch.zeros(stored, dtype=torch.int32, device="cpu"),
    }


def rows_of(crow_indices: Int32[Tensor, " rows_and_1"], stored: int) -> Int32[Tensor, " stored"]:
    """The row that each stored entry belongs to."""
    counts = crow_indices.diff()
    owners = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return owners.repeat_interleave(counts, output_size=stored)


def starts_of(rows: Int32[Tensor, " stored"], count: int) -> Int32[Tensor, " rows_and_1"]:
    """`crow_indices` again from the row of each stored entry; `count` is the number of rows."""
    starts = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return starts


def why_broken(
    crow_indices: Int32[Tensor, " rows_and_1"],
    col_indices: Int32[Tensor, " stored"],
    columns: int,
    row: str,
) -> str | None:
    """What is wrong with the indices of a weight with this many columns, or None.

    `row` is what a row is called: of blocks or of weights.
    """
    crow, col = crow_indices.long(), col_indices  # differences may not overflow
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow.diff() < 0).any()):
        return f"crow_indices do not rise from 0 to {len(col)}"
    if bool(((col < 0) | (col >= columns)).any()):
        return f"col_indices leave 0..{columns - 1}"
    places = rows_of(crow_indices, len(col)).long() * columns + col
    if bool((places.diff() <= 0).any()):
        return f"col_indices do not ascend within a {row}"
    return None
