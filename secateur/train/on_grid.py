"""Weights on a grid, trained: latent weights and scales stand in for them, and are rounded."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.float64 import in_float64
from secateur.model import layers as _layers
from secateur.model.layers import gradient_of, parameters_of, weight_of
from secateur.patterns.grids import Grid
from secateur.train.distil import Trained

SHARE_OF_SCALES = 0.1  # of the learning rate, both in units of their root mean square


class Latent(NamedTuple):
    """A layer's weight before it is rounded, with its scales, and which of it is kept."""

    weight: Float[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    mask: Bool[Tensor, "out in"]


class OnGrid:
    """Latent weights of some layers, whose own weights follow them on the grid.

    Before a forward the layers get what the latent weights round to, as `dtypes` store it; after a
    backward the gradients of the layers' weights go straight through to latent weights and scales.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        latent: Mapping[str, Latent],
        grid: Grid,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._layers, self._grid, self._dtypes = layers, grid, dtypes
        self._masks = {name: found.mask for name, found in latent.items()}
        self.weights = {n: nn.Parameter(found.weight.float()) for n, found in latent.items()}
        self.scales = {n: nn.Parameter(found.scales.float()) for n, found in latent.items()}

    def trained(self, learning_rate: float) -> Trained:
        """What a distillation trains."""
        weights = {f"{name}.weight": w for name, w in self.weights.items()}
        scales = {f"{name}.scales": s for name, s in self.scales.items()}
        unit = kept_rms(weights.values())
        shares = {name: SHARE_OF_SCALES * kept_rms([s]) / unit for name, s in scales.items()}
        groups: list[dict[str, Any]] = [{"params": list(weights.values())}]
        groups += [{"params": [s], "share": shares[name]} for name, s in scales.items()]
        optimizer = torch.optim.AdamW(groups, learning_rate, weight_decay=0.0)
        return Trained({**weights, **scales}, optimizer, self.gradients_, self.place_)

    @torch.no_grad()
    def place_(self) -> None:
        """Give the layers what their latent weights round to."""
        for name, module in self._layers.items():
            weight_of(module).copy_(_layers.from_matrix(module, self._rounded(name)))

    @torch.enable_grad()
    def gradients_(self) -> None:
        """Take the gradients of the layers' weights through to latent weights and scales."""
        for name, module in self._layers.items():
            gradient = gradient_of(module)
            if gradient is None:
                continue
            leaves = self.weights[name], self.scales[name]
            upstream = _layers.matrix(module, gradient)
            found = torch.autograd.grad(self._rounded(name), leaves, upstream)
            for leaf, own in zip(leaves, found, strict=True):
                leaf.grad = own
        for parameter in parameters_of(self._layers).values():
            parameter.grad = None

    def _rounded(self, name: str) -> Float[Tensor, "out in"]:
        weight, scales, dtype = self.weights[name], self.scales[name], self._dtypes[name]
        on_grid = self._grid.straight_through(weight, scales, dtype)
        return on_grid.masked_fill(~self._masks[name], 0)


def kept_rms(weights: Iterable[Tensor]) -> float:
    """The root mean square of all numbers that are not zero."""
    squares, count = 0.0, 0
    for weight in weights:
        squares += float(in_float64(weight.detach()).square().sum())
        count += int(weight.count_nonzero())
    return float((squares / max(count, 1)) ** 0.5)
