"""Which channels go: those with the smallest weights, or those nearest to all others."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.compat.torchao.groups import Group
from secateur.compat.torchao.structured.sparsifier import BaseStructuredSparsifier
from secateur.core.float64 import in_float64

# The distances between a layer's channels: [channels, weights] -> [channels, channels].
Distance = Callable[[Tensor], Tensor]


class SaliencyPruner(BaseStructuredSparsifier):
    """Drops the channels whose weights have the smallest L1 norm: `int(level * n)` of n units.

    A unit is a set of channels that go together; its norm is the sum over the config's tensors.
    `sparsity_level` is a setting of each tensor, or of all in `defaults`.

    Raises:
        ValueError: by `prepare`, if a tensor has no level in [0, 1); by `step`, if none would stay.
    """

    def complete(self, group: Group) -> Group:
        return _with_level(group)

    def update_mask(
        self, module: nn.Module, tensor_name: str, tensor_fqn: str, sparsity_level: float
    ) -> None:
        """Choose the channels of one tensor, together with those that they depend on."""
        self.keep(tensor_fqn, self.least(tensor_fqn, _l1, lambda n: int(sparsity_level * n)))


class LSTMSaliencyPruner(BaseStructuredSparsifier):
    """`SaliencyPruner` for the weights of recurrent layers: hidden units go, from every gate.

    The norm of a unit is the sum over its rows in all gates, layers and directions of the module,
    as far as the config names their tensors: one `nn.LSTM` has one hidden size.

    Raises:
        ValueError: as `SaliencyPruner`, and by `prepare` for tensors of other modules.
    """

    def complete(self, group: Group) -> Group:
        if not isinstance(group["module"], nn.RNNBase) or "weight" not in group["tensor_name"]:
            raise ValueError(
                f"LSTMSaliencyPruner needs weights of recurrent layers, {group['tensor_fqn']} is "
                f"none: use SaliencyPruner for a {type(group['module']).__name__}"
            )
        return _with_level(group)

    def update_mask(
        self, module: nn.Module, tensor_name: str, tensor_fqn: str, sparsity_level: float
    ) -> None:
        """Choose the hidden units, the same for each tensor of the module."""
        self.keep(tensor_fqn, self.least(tensor_fqn, _l1, lambda n: int(sparsity_level * n)))


class FPGMPruner(BaseStructuredSparsifier):
    """Drops the `round(level * n)` channels nearest to all others, which can stand in for them.

    A channel's score is the sum of its distances to the other channels of its tensor, so the lowest
    score is next to the geometric median. `dist` is 2 or None for Euclidean distances, 1 for sums
    of absolute differences, or a function `[channels, weights] -> [channels, channels]`.

    Source: He et al., Filter Pruning via Geometric Median, arXiv:1811.00250, eq. 4 to 6.

    Raises:
        ValueError: for an unknown `dist`, and as `SaliencyPruner`.
    """

    def __init__(self, sparsity_level: float = 0.5, dist: int | Distance | None = None) -> None:
        if not callable(dist) and dist not in (None, 1, 2):
            raise ValueError(f"FPGMPruner needs dist to be None, 1, 2 or a function, got {dist!r}")
        super().__init__({"sparsity_level": sparsity_level})
        self.dist = dist

    def complete(self, group: Group) -> Group:
        return _with_level(group)

    def update_mask(
        self, module: nn.Module, tensor_name: str, tensor_fqn: str, sparsity_level: float
    ) -> None:
        """Choose the channels of one tensor, together with those that they depend on."""
        # Distances are exact in float64; a user's function gets the weight's own dtype.
        score = self._compute_distance if callable(self.dist) else self._exact_distance
        self.keep(tensor_fqn, self.least(tensor_fqn, score, lambda n: round(sparsity_level * n)))

    def _compute_distance(self, t: Float[Tensor, "channels ..."]) -> Float[Tensor, " channels"]:
        """For each channel, an index of the first dimension, the sum of its distances to all."""
        rows = t.flatten(1)
        if callable(self.dist):
            return self.dist(rows).abs().sum(1)
        # By differences: computed by products, small distances would be rounding noise.
        p = float(self.dist or 2)
        return torch.cdist(rows, rows, p, "donot_use_mm_for_euclid_dist").sum(1)

    def _exact_distance(self, t: Float[Tensor, "channels ..."]) -> Float[Tensor, " channels"]:
        return self._compute_distance(in_float64(t))


def _l1(rows: Float[Tensor, "channels weights"]) -> Float[Tensor, " channels"]:
    return in_float64(rows).abs().sum(1)


def _with_level(group: Group) -> Group:
    level: Any = group.get("sparsity_level")
    if not isinstance(level, (int, float)) or not 0 <= level < 1:
        raise ValueError(
            f"{group['tensor_fqn']} needs a sparsity_level in [0, 1), got {level!r}: it is the "
            "share of its channels that go"
        )
    return group
