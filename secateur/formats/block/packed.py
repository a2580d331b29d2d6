"""A weight as its nonzero blocks, in torch's BSR words."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from secateur.formats.contract import check_dense


@dataclass(frozen=True)
class PackedBlock:
    """The nonzero blocks of a weight in row order, and where they are.

    Row of blocks `i` owns `values[crow_indices[i]:crow_indices[i + 1]]`; `col_indices` holds the
    column of blocks of each, ascending within a row.
    """

    shape: tuple[int, int]
    values: Float[Tensor, "blocks rows cols"]
    crow_indices: Int32[Tensor, " row_blocks_and_1"]
    col_indices: Int32[Tensor, " blocks"]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def format(self) -> str:
        return f"block:{self.block[0]}x{self.block[1]}"

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


def pack(weight: Float[Tensor, "out in"], block: tuple[int, int] = (64, 64)) -> PackedBlock:
    """The nonzero blocks of the weight; `unpack(pack(w))` is `w`, bit for bit within kept blocks.

    A block is kept if one of its weights is not zero (-0.0 is zero), so any weight of a fitting
    shape packs; one without a zero block costs more than dense.

    Cost: density of blocks x dense bytes, + 4 bytes a kept block and a row of blocks.
    Raises: ValueError if the block does not divide the shape, or a weight is not finite.
    Source: the block compressed row form of torch.sparse_bsr, with 32-bit indices.
    """
    check_dense(weight)
    problem = _misfit(weight, block)
    if problem is not None:
        raise ValueError(f"{problem}: choose rows and columns that divide it")
    tiles = _tiles(weight, block)
    keep = _keep(weight, block)
    crow_indices = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow_indices[1:] = keep.sum(1).cumsum(0)
    return PackedBlock(
        shape=(weight.shape[0], weight.shape[1]),
        values=tiles[keep],
        crow_indices=crow_indices,
        col_indices=keep.nonzero()[:, 1].to(torch.int32),
    )


def unpack(packed: PackedBlock) -> Float[Tensor, "out in"]:
    """The dense weight.

    Cost: one dense weight and one pass over the blocks.
    """
    rows, cols = packed.block
    grid = packed.shape[0] // rows, packed.shape[1] // cols
    tiles = packed.values.new_zeros(*grid, rows, cols)
    tiles[block_rows(packed), packed.col_indices.long()] = packed.values
    return tiles.transpose(1, 2).reshape(packed.shape)


def block_rows(packed: PackedBlock) -> Int32[Tensor, " blocks"]:
    """The row of blocks that each stored block belongs to."""
    counts = packed.crow_indices.diff()
    owners = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return owners.repeat_interleave(counts, output_size=len(packed.col_indices))


def why_not(weight: Float[Tensor, "out in"], block: tuple[int, int]) -> str | None:
    """None if some block is zero, else the reason why storing blocks would gain nothing."""
    problem = _misfit(weight, block)
    if problem is None and bool(_keep(weight, block).all()):
        return f"no {block[0]}x{block[1]} block is zero: nothing to gain"
    return problem


def density(weight: Float[Tensor, "out in"], block: tuple[int, int]) -> float:
    """The fraction of the weight that `pack` stores values for."""
    return float(_keep(weight, block).float().mean())


def empty(
    shape: tuple[int, int], stored: int, dtype: torch.dtype, block: tuple[int, int]
) -> PackedBlock:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the block does not divide the shape, or more is stored than there is.
    """
    rows, cols = block
    if shape[0] % rows or shape[1] % cols or stored > (shape[0] // rows) * (shape[1] // cols):
        raise ValueError(
            f"block:{rows}x{cols} needs a shape that holds {stored} blocks, got {shape}: "
            "the description is damaged, save the model again"
        )
    return PackedBlock(
        shape=shape,
        values=torch.zeros(stored, rows, cols, dtype=dtype, device="cpu"),
        crow_indices=torch.zeros(shape[0] // rows + 1, dtype=torch.int32, device="cpu"),
        col_indices=torch.zeros(stored, dtype=torch.int32, device="cpu"),
    )


def broken(packed: PackedBlock) -> str | None:
    """None if the indices are those of a weight of this shape, else what is wrong with them."""
    crow, col = packed.crow_indices.long(), packed.col_indices  # differences may not overflow
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow.diff() < 0).any()):
        return f"crow_indices do not rise from 0 to {len(col)}"
    column_blocks = packed.shape[1] // packed.block[1]
    if bool(((col < 0) | (col >= column_blocks)).any()):
        return f"col_indices leave 0..{column_blocks - 1}"
    if bool(((block_rows(packed).long() * column_blocks + col).diff() <= 0).any()):
        return "col_indices do not ascend within a row of blocks"
    return None


def _misfit(weight: Tensor, block: tuple[int, int]) -> str | None:
    out, cols = weight.shape
    if out % block[0] or cols % block[1]:
        name = f"{block[0]}x{block[1]}"
        return f"block:{name} needs a weight whose shape is a multiple of {name}, got {out}x{cols}"
    return None


def _tiles(
    weight: Float[Tensor, "out in"], block: tuple[int, int]
) -> Float[Tensor, "row_blocks col_blocks rows cols"]:
    rows, cols = block
    grid = weight.shape[0] // rows, weight.shape[1] // cols
    return weight.reshape(grid[0], rows, grid[1], cols).transpose(1, 2)


def _keep(
    weight: Float[Tensor, "out in"], block: tuple[int, int]
) -> Bool[Tensor, "row_blocks col_blocks"]:
    return (_tiles(weight, block) != 0).any(-1).any(-1)
