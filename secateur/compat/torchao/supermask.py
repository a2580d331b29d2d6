"""SupermaskLinear: a linear layer that learns which of its blocks are zero."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.compat.torchao.tiles import tile_means
from secateur.patterns.keep import count_zeros, keep_top


class SupermaskLinear(nn.Linear):
    """A linear layer that keeps the blocks with the highest scores, and learns scores and weights.

    `scores` has one entry per block of `blocksize` x `blocksize` weights; blocks at the edges may
    be smaller. The forward has exactly `round(sparsity_level * blocks)` zero blocks; ties keep the
    lower index. Gradients pass the mask unchanged: a score gets its block's gradient times weight,
    a weight its dense gradient, so that a block that returns has been trained in the meantime.

    `from_linear` starts from the mean magnitudes of the blocks. The constructor draws random
    weights, and starts from theirs. `fixed_mask` and `fixed_weight` keep either from learning.

    Source: edge-popup, Ramanujan et al., arXiv:1911.13299, section 3, on blocks.
    Raises:
        ValueError: if the blocksize is below 1, or the sparsity leaves no block.
    """

    def __init__(
        self,
        sparsity_level: float,
        blocksize: int,
        fixed_mask: bool,
        fixed_weight: bool,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if blocksize < 1:
            raise ValueError(f"SupermaskLinear needs a blocksize of at least 1, got {blocksize}")
        grid = math.ceil(out_features / blocksize), math.ceil(in_features / blocksize)
        most = 1 - 1 / (grid[0] * grid[1])
        if not 0 <= sparsity_level <= most:
            raise ValueError(
                f"SupermaskLinear needs a sparsity_level from 0 to {most:g}, got "
                f"{sparsity_level:g}: of {grid[0]}x{grid[1]} blocks one has to stay"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.sparsity_level = sparsity_level
        self.blocksize = blocksize
        self.scores = nn.Parameter(_magnitudes(self.weight, blocksize), not fixed_mask)
        self.weight.requires_grad = not fixed_weight

    @classmethod
    def from_linear(
        cls, linear: nn.Module, sparsity_level: float = 0.0, blocksize: int = 1
    ) -> "SupermaskLinear":
        """A layer with a copy of these weights that keeps the blocks of largest magnitude.

        Raises:
            ValueError: if this is no linear layer, or as the class.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"SupermaskLinear needs an nn.Linear, got a {type(linear).__name__}: choose "
                "layers with filter_fn"
            )
        weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
        new = cls(
            *(sparsity_level, blocksize, False, False, *sizes),
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            new.weight.copy_(weight)
            new.scores.copy_(_magnitudes(weight, blocksize))
            if linear.bias is not None:
                new.bias.copy_(linear.bias)
        return new.train(linear.training)

    @classmethod
    def to_linear(cls, supermask_linear: "SupermaskLinear") -> nn.Linear:
        """An ordinary layer with a copy of the weights and exact zeros for the masked blocks."""
        weight = supermask_linear.weight.detach()
        linear = nn.Linear(
            supermask_linear.in_features,
            supermask_linear.out_features,
            bias=supermask_linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(weight.masked_fill(~supermask_linear._keep(), 0))
            if supermask_linear.bias is not None:
                linear.bias.copy_(supermask_linear.bias)
        return linear.train(supermask_linear.training)

    def get_mask(self) -> Float[Tensor, "out in"]:
        """The mask, 1 = keep, in the weight's dtype; gradients pass unchanged to the scores."""
        scores = self._spread(self.scores)
        return self._keep().to(scores.dtype) + (scores - scores.detach())

    def forward(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        weight = self.weight.detach()
        zeroed = weight.masked_fill(~self._keep(), 0)
        scores = self._spread(self.scores)
        # both differences are 0 and only add a gradient
        straight = (self.weight - weight) + weight * (scores - scores.detach())
        return F.linear(input, zeroed + straight, self.bias)

    def _keep(self) -> Bool[Tensor, "out in"]:
        scores = self.scores.detach().flatten()
        keep = keep_top(scores, len(scores) - count_zeros(self.sparsity_level, len(scores)))
        return self._spread(keep.view_as(self.scores))

    def _spread(self, blocks: Tensor) -> Tensor:
        """The entries of the blocks, repeated for each weight."""
        b = self.blocksize
        whole: Tensor = blocks.repeat_interleave(b, 0).repeat_interleave(b, 1)
        return whole[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sparsity_level={self.sparsity_level:g}, "
            f"blocksize={self.blocksize}"
        )


def _magnitudes(weight: Tensor, b: int) -> Float[Tensor, "row_blocks column_blocks"]:
    """The mean magnitude of each block."""
    means = tile_means(weight.detach().float().abs(), (b, b))
    return means.to(weight.dtype)
