"""Block-sparse weights: whole tiles kept or dropped, stored in torch's BSR words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.formats import compressed_rows
from secateur.formats.block import cpu, gpu, simd
from secateur.formats.contract import Format, Implementation, Packed, dense_shape, why_no_weight
from secateur.formats.reference import REFERENCE


@dataclass(frozen=True)
class Blocks(Format):
    """The nonzero blocks of a weight in row order, and where they are.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[blocks, rows, cols]` |
    | `crow_indices` | int32 | `[out / rows + 1]` |
    | `col_indices` | int32 | `[blocks]` |

    Row of blocks `i` owns `values[crow_indices[i]:crow_indices[i + 1]]`; `col_indices` holds the
    column of blocks of each, ascending within a row.
    """

    rows: int
    cols: int

    name = "block"
    tensors = compressed_rows.TENSORS
    implementations = (
        gpu.DECODE,
        gpu.PREFILL,
        Implementation("simd", simd.linear, simd.why_not, simd.BY_COLUMN, bind=simd.bind),
        Implementation("cpu", cpu.linear, cpu.why_not, cpu.BLOCK_ROWS),
        REFERENCE,
    )
    is_exact = True

    def __str__(self) -> str:
        return f"{self.name}:{self.rows}x{self.cols}"

    @property
    def prune_to(self) -> str:
        """Blocks of the same size, few enough to gain."""
        return f"{self}@0.8"

    def like(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "Blocks":
        """The format whose blocks are as large as these tensors'."""
        if "values" in tensors:
            return Blocks(*tensors["values"].shape[1:])
        return Blocks(*tensors["by_column"].shape[:0:-1])

    def why_not(self, weight: Tensor) -> str | None:
        """Why storing blocks would gain nothing, or None if some block is zero."""
        problem = why_no_weight(weight, self) or self._misfit(weight)
        if problem is None and bool(self._keep(weight).all()):
            return f"no {self.rows}x{self.cols} block is zero: nothing to gain"
        return problem

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for."""
        return float(self._keep(weight).float().mean())

    def pack(self, weight: Tensor) -> Packed:
        """The nonzero blocks of the weight; unpacking gives it bit for bit within kept blocks.

        A block is kept if one of its weights is not zero (-0.0 is zero), so any weight of a fitting
        shape packs; one without a zero block costs more than dense.

        Cost: density of blocks x dense bytes, + 4 bytes a kept block and a row of blocks.
        Raises: ValueError if the block does not divide the shape, or a weight is not finite.
        Source: the block compressed row form of torch.sparse_bsr, with 32-bit indices.
        """
        shape = dense_shape(weight)
        problem = self._misfit(weight)
        if problem is not None:
            raise ValueError(f"{problem}: choose rows and columns that divide it")
        keep = self._keep(weight)
        tensors = {"values": self._tiles(weight)[keep], **compressed_rows.indices_of(keep)}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight and one pass over the blocks.
        """
        values, (out, width) = packed["values"], packed.shape
        tiles = values.new_zeros(out // self.rows, width // self.cols, self.rows, self.cols)
        rows = compressed_rows.rows_of(packed["crow_indices"], len(values))
        tiles[rows, packed["col_indices"].long()] = values
        return tiles.transpose(1, 2).reshape(packed.shape)

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if the block does not divide the shape, or more is stored than there is.
        """
        down, across = shape[0] // self.rows, shape[1] // self.cols
        if shape != (down * self.rows, across * self.cols) or stored > down * across:
            raise ValueError(
                f"{self} needs a shape that holds {stored} blocks, got {shape}: "
                "the description is damaged, save the model again"
            )
        values = torch.zeros(stored, self.rows, self.cols, dtype=dtype, device="cpu")
        indices = compressed_rows.empty_indices(down, stored)
        return Packed(self, shape, dtype, {"values": values, **indices})

    def why_broken(self, packed: Packed) -> str | None:
        """What is wrong with the indices of a weight of this shape, or None."""
        crow, col = packed["crow_indices"], packed["col_indices"]
        across = packed.shape[1] // self.cols
        return compressed_rows.why_broken(crow, col, across, "row of blocks")

    def _misfit(self, weight: Float[Tensor, "out in"]) -> str | None:
        out, width = weight.shape
        if out % self.rows or width % self.cols:
            size = f"{self.rows}x{self.cols}"
            return f"{self} needs a weight whose shape is a multiple of {size}, got {out}x{width}"
        return None

    def _tiles(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "down across rows cols"]:
        down, across = weight.shape[0] // self.rows, weight.shape[1] // self.cols
        return weight.reshape(down, self.rows, across, self.cols).transpose(1, 2)

    def _keep(self, weight: Float[Tensor, "out in"]) -> Bool[Tensor, "down across"]:
        return (self._tiles(weight) != 0).any(-1).any(-1)


def parse(text: str) -> Blocks | None:
    """The format that `block:64x64` names; None for the name of another format.

    Raises: ValueError for a block without rows and columns.
    """
    name, _, options = text.partition(":")
    if name != Blocks.name:
        return None
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options)
    if sizes is None:
        raise ValueError(
            f"format 'block' needs its rows and columns, got {text!r}: write 'block:64x64'"
        )
    return Blocks(int(sizes[1]), int(sizes[2]))
