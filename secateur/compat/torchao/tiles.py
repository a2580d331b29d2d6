"""A matrix cut into tiles: blocks of rows and columns, filled up with zeros at the edges."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F


def tiled(
    matrix: Shaped[Tensor, "out in"], tile: Sequence[int]
) -> Shaped[Tensor, "rows cols elements"]:
    """The tiles of a matrix, each as a row of its elements."""
    height, width = tile
    padded = F.pad(matrix, (0, -matrix.shape[1] % width, 0, -matrix.shape[0] % height))
    tiles: Tensor = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    flat: Tensor = tiles.transpose(1, 2).flatten(2)
    return flat


def untiled(
    tiles: Shaped[Tensor, "rows cols elements"], tile: Sequence[int], shape: Sequence[int]
) -> Shaped[Tensor, "out in"]:
    """The matrix of this shape that has these tiles."""
    whole: Tensor = tiles.unflatten(2, tuple(tile)).transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[: shape[0], : shape[1]]


def tile_means(matrix: Float[Tensor, "out in"], tile: Sequence[int]) -> Float[Tensor, "rows cols"]:
    """The mean of each tile; at the edges, of the part that lies in the matrix."""
    return tiled(matrix, tile).sum(-1) / tiled(torch.ones_like(matrix), tile).sum(-1)
