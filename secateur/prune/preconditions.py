"""What a method and the weights have to be before a pass begins."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.layers import weights_of
from secateur.model.statistics import name_of
from secateur.reconstruct.refit import refit
from secateur.reconstruct.swap import swap


def require_kind(function: Callable[..., Any], is_algorithm: bool) -> None:
    """An algorithm asks for the pattern, a criterion does not: tell who mixes them up."""
    if not callable(function):
        raise ValueError(
            f"prune_ and reconstruct_ take functions such as sc.wanda, got {function!r}: pass the "
            "function itself"
        )
    if function in (refit, swap):
        name = name_of(function)
        raise ValueError(
            f"{name} makes an algorithm of a criterion or another algorithm: pass "
            f"sc.{name}(sc.wanda)"
        )
    if ("pattern" in inspect.signature(function).parameters) == is_algorithm:
        return
    name = name_of(function)
    if is_algorithm:
        raise ValueError(f"{name} only scores weights, reconstruct_ refits them: use prune_")
    raise ValueError(f"{name} refits weights, prune_ changes none that it keeps: use reconstruct_")


def require_sound(layers: Mapping[str, nn.Module], *, written: bool = True) -> None:
    """Weights must be ordinary parameters, present and finite."""
    for name, weight in weights_of(layers, written=written).items():
        require_finite(name, weight)


@torch.no_grad()
def require_finite(layer: str, weight: Tensor) -> None:
    """The layer's weight must be finite."""
    if not (finite := weight.isfinite()).all():
        raise ValueError(
            f"{layer}.weight holds {int((~finite).sum())} NaN or infinite values: repair or reload "
            "it"
        )
