"""What must be true of the weights before a pass begins, and what is told of them."""

import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.model.layers import weights_of
from secateur.patterns import Pattern

# Of a layer's weights: so many zeros are no accident.
ZEROS_TOLD = 0.01


def require_sound(layers: Mapping[str, nn.Module], *, written: bool = True) -> None:
    """Raise unless the weights are ordinary parameters, present and finite."""
    for name, weight in weights_of(layers, written=written).items():
        require_finite(name, weight)


@torch.no_grad()
def require_finite(layer: str, weight: Tensor) -> None:
    """Raise unless the layer's weight is finite."""
    if not (finite := weight.isfinite()).all():
        raise ValueError(
            f"{layer}.weight holds {int((~finite).sum())} NaN or infinite values: repair or reload "
            "it"
        )


@torch.no_grad()
def zeros_at_risk(weight: Float[Tensor, "out in"], pattern: Pattern, *, trained: bool) -> float:
    """The share of the weights that are zero and that the pattern keeps nevertheless.

    A refit gives them values in rows that lose other weights, training (`trained`) in all.
    """
    zeros = weight == 0
    if zeros.float().mean() <= ZEROS_TOLD:
        return 0.0
    mask = pattern.mask(weight.float().abs())
    refitted = (~mask & ~zeros).any(1, keepdim=True)
    return float((mask & zeros & (refitted | trained)).float().mean())


def warn_of_lost_zeros(at_risk: Mapping[str, float]) -> None:
    """Warn of layers with many zeros that their patterns keep, since a refit changes what is kept.

    `at_risk` is `zeros_at_risk` of each layer, by name.
    """
    if told := {name: share for name, share in at_risk.items() if share > ZEROS_TOLD}:
        worst = max(told, key=told.__getitem__)
        warnings.warn(
            f"{len(told)} of {len(at_risk)} layers have zeros that the plan keeps as weights, and "
            f"may lose them, up to {told[worst]:.1%} of {worst}: pass keep_zeros=True to keep them",
            stacklevel=2,
        )
