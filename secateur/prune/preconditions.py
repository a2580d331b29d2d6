"""What must be true of the weights before a pass begins."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.model.layers import weights_of


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
