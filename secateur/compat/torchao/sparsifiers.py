"""Sparsifiers that look at weights alone: by the norm of blocks or the distance to the diagonal."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.fake_sparsity import mask_of, original_of, set_mask, unmasked
from secateur.compat.torchao.groups import Group
from secateur.compat.torchao.names import in_short
from secateur.compat.torchao.tiles import tile_means, tiled, untiled
from secateur.criteria import magnitude, magnitude_l2
from secateur.model import layers as _layers
from secateur.patterns import keep_top

# The score of a weight's elements: W^2 for 2 or None, |W| for 1, or a function of the weight.
Norm = int | Callable[[Tensor], Tensor] | None


class WeightNormSparsifier(BaseSparsifier):
    """Zeros in the blocks of a weight with the smallest norm, in all of a block or in part of it.

    A share `sparsity_level` of the blocks, those with the smallest mean norm, gets zeros at its
    `zeros_per_block` smallest elements; None means the whole block. 2:4 is
    `WeightNormSparsifier(1.0, (1, 4), 2)`. A block is (rows, cols) of the weight as `[out, in]`;
    the columns of a Conv2d are its input channels, position by position. A block that reaches
    beyond the weight is cut off, and gets as many zeros as the others, or all that fit.

    Counts are exact: `round(sparsity_level * n)` of n blocks, halves rounded to even, but below
    level 1 at least one block is left alone; levels outside [0, 1] count as 0 or 1. Ties keep the
    lower index. Every step chooses among the masked weights, so zeros stay zeros unless the level
    falls; then the largest hidden weights come back first.

    Raises:
        ValueError: at construction and by `prepare`, if a level is no number, a block has no size,
            a block has fewer elements than zeros, a norm is unknown or a tensor is no matrix; by
            `step`, if a norm gives negative numbers or NaN.
    """

    def __init__(
        self,
        sparsity_level: float = 0.5,
        sparse_block_shape: Sequence[int] = (1, 4),
        zeros_per_block: int | None = None,
        norm: Norm = None,
    ) -> None:
        defaults = {
            "sparsity_level": sparsity_level,
            "sparse_block_shape": sparse_block_shape,
            "zeros_per_block": zeros_per_block,
        }
        _require_blocks("WeightNormSparsifier", defaults)
        _norm_function(norm)
        self.norm = norm
        super().__init__(defaults)

    def complete(self, group: Group) -> Group:
        _require_blocks(group["tensor_fqn"], group)
        _norm_function(group.get("norm"))
        _require_matrix(group)
        zeros = group["zeros_per_block"]
        whole = math.prod(group["sparse_block_shape"])
        return {**group, "zeros_per_block": whole if zeros is None else zeros}

    def update_mask(
        self,
        module: nn.Module,
        tensor_name: str,
        sparsity_level: float,
        sparse_block_shape: Sequence[int],
        zeros_per_block: int,
        norm: Norm = None,
        module_fqn: str = "",
        tensor_fqn: str = "",
    ) -> None:
        """Choose the mask of one tensor; its own `norm` overrides the sparsifier's.

        The names are only used in messages.
        """
        original = _as_matrix(module, original_of(module, tensor_name))
        kept = _as_matrix(module, mask_of(module, tensor_name)) != 0
        hidden = _norm_function(self.norm if norm is None else norm)(original).float()
        if not (hidden >= 0).all():
            raise ValueError(
                f"step needs norms of at least 0, got {float(hidden.min()):g} for "
                f"{tensor_fqn or tensor_name}: repair its weight, or the norm"
            )
        score = hidden.masked_fill(~kept, 0)
        keep = _keep(score, hidden, sparsity_level, sparse_block_shape, zeros_per_block)
        set_mask(module, tensor_name, _like_tensor(module, keep))

    def norm_fn(self, weight: Tensor) -> Tensor:
        """The score of each element of a weight."""
        return _norm_function(self.norm)(weight)

    def _make_tensor_mask(
        self,
        data: Float[Tensor, "out in"],
        input_shape: Sequence[int],
        sparsity_level: float,
        sparse_block_shape: Sequence[int],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "out in"]:
        """The mask, 0 in the share of whole blocks of smallest mean; also written to `mask`."""
        whole = math.prod(sparse_block_shape)
        return _into(mask, _keep(data, data, sparsity_level, sparse_block_shape, whole).to(data))

    def _make_block_mask(
        self,
        data: Float[Tensor, "out in"],
        sparse_block_shape: Sequence[int],
        zeros_per_block: int,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "out in"]:
        """The mask, 0 at the smallest elements of every block; also written to `mask`."""
        return _into(mask, _keep(data, data, 1.0, sparse_block_shape, zeros_per_block).to(data))


class NearlyDiagonalSparsifier(BaseSparsifier):
    """Zeros everywhere but in a band of width `nearliness` around the diagonal.

    The width is odd: 1 is the diagonal, 3 adds a neighbour on either side, 0 or less is all zeros.

    Raises:
        ValueError: at construction and by `prepare`, if the width is even, reaches beyond the
            matrix, or the tensor is no matrix.
    """

    def __init__(self, nearliness: int = 1) -> None:
        _require_odd(nearliness)
        super().__init__({"nearliness": nearliness})

    def complete(self, group: Group) -> Group:
        nearliness, fqn = group["nearliness"], group["tensor_fqn"]
        _require_odd(nearliness)
        shape = tuple(unmasked(group["module"], group["tensor_name"]).shape)
        if len(shape) != 2:
            raise ValueError(f"a band needs a matrix, {fqn} is of shape {shape}: leave it out")
        if nearliness > 0 and nearliness // 2 >= min(shape):
            raise ValueError(
                f"nearliness needs to be at most {2 * min(shape) - 1} for {fqn} of shape {shape}, "
                f"got {nearliness}: choose a narrower band"
            )
        return group

    def update_mask(
        self,
        module: nn.Module,
        tensor_name: str,
        nearliness: int,
        module_fqn: str = "",
        tensor_fqn: str = "",
    ) -> None:
        """Choose the mask of one tensor."""
        mask = mask_of(module, tensor_name)
        rows, columns = (torch.arange(n, device=mask.device) for n in mask.shape)
        keep = (rows[:, None] - columns).abs() <= nearliness // 2
        set_mask(module, tensor_name, keep if nearliness > 0 else torch.zeros_like(keep))


# --- blocks --------------------------------------------------------------------------------------


def _keep(
    score: Float[Tensor, "out in"],
    hidden: Float[Tensor, "out in"],
    level: float,
    block: Sequence[int],
    zeros: int,
) -> Bool[Tensor, "out in"]:
    """The mask, True where the block is kept, or the element within its block."""
    whole = math.prod(block)
    tiles, behind = tiled(score, block), tiled(hidden, block)
    means, means_behind = tile_means(score, block), tile_means(hidden, block)
    keep = keep_top(
        _in_order(means, means_behind).flatten(), means.numel() - _affected(level, means.numel())
    ).view(*means.shape, 1)
    if zeros < whole:
        # What a block lacks at the edge counts as kept, so that zeros lie inside the weight.
        real = tiled(torch.ones_like(score), block)
        order = _in_order(tiles, behind).masked_fill(real == 0, math.inf)
        keep = keep | keep_top(order, whole - zeros)
    return untiled(keep.expand(*means.shape, whole), block, score.shape)


def _into(mask: Tensor | None, values: Tensor) -> Tensor:
    """The mask with these values as its data, or the values if there is no mask."""
    if mask is None:
        return values
    mask.data = values
    return mask


def _in_order(score: Tensor, hidden: Tensor) -> Tensor:
    """The scores, with what is 0 only because it is masked ordered by what the mask hides."""
    return torch.where(score > 0, score, -1 / hidden)


def _affected(level: float, n: int) -> int:
    return n if level >= 1 else min(round(max(level, 0) * n), n - 1)


def _as_matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """The weight of a Conv2d as `[out, in]`; a matrix unchanged."""
    return tensor if tensor.dim() == 2 else _layers.matrix(module, tensor)


def _like_tensor(module: nn.Module, rows: Tensor) -> Tensor:
    return _layers.from_matrix(module, rows) if isinstance(module, nn.Conv2d) else rows


# --- refusals ------------------------------------------------------------------------------------


def _require_blocks(what: str, settings: dict[str, Any]) -> None:
    level, zeros = settings["sparsity_level"], settings["zeros_per_block"]
    if not isinstance(level, Real) or math.isnan(level):
        raise ValueError(
            f"{what} needs a sparsity_level that is a number, got {level!r}: 0.5 zeroes in half of "
            "the blocks"
        )
    block = settings["sparse_block_shape"]
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(
            f"{what} needs a sparse_block_shape of two sizes >= 1, got {block!r}: (1, 4) is four "
            "inputs of one output"
        )
    if zeros is not None and not 0 <= zeros <= math.prod(block):
        raise ValueError(
            f"{what} needs zeros_per_block from 0 to the {math.prod(block)} elements of a "
            f"{block[0]}x{block[1]} block, got {zeros}: None is the whole block"
        )


def _norm_function(norm: Norm) -> Callable[[Tensor], Tensor]:
    if callable(norm):
        return norm
    if norm not in (None, 1, 2):
        raise ValueError(
            f"norm needs to be 1, 2 or a function of the weight, got {norm!r}: a function may be "
            f"lambda weight: weight.abs() ** {norm}"
        )
    return magnitude if norm == 1 else magnitude_l2


def _require_matrix(group: Group) -> None:
    module, tensor_name = group["module"], group["tensor_name"]
    shape = tuple(unmasked(module, tensor_name).shape)
    convolution = isinstance(module, nn.Conv2d) and tensor_name == "weight"
    if len(shape) == 2 or convolution:
        return
    raise ValueError(
        f"blocks need a matrix or the weight of a Conv2d, {group['tensor_fqn']} of "
        f"{type(module).__name__} is of shape {shape}: leave it out"
    )


def _require_odd(nearliness: int) -> None:
    if not isinstance(nearliness, Integral) or (nearliness > 0 and nearliness % 2 == 0):
        raise ValueError(
            f"nearliness needs to be an odd number, got {in_short(nearliness)}: a band has the "
            "diagonal in its middle"
        )
