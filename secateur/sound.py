"""What a method and the weights have to be before a pass begins."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.layers import weight_of
from secateur.reconstruct.refit import refit
from secateur.reconstruct.swap import swap
from secateur.statistics import name_of


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


def require_sound(layers: Mapping[str, nn.Module]) -> None:
    """Weights must be plain, present and finite."""
    for name, module in layers.items():
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"{name}.weight must be an ordinary parameter, {type(module).__name__} computes "
                "it: unpack_ a packed model first, or remove its parametrizations "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        weight = weight_of(module)
        if weight.is_meta:
            raise ValueError(f"{name}.weight has no data (meta device): load the weights first")
        require_finite(name, weight)


def require_finite(layer: str, weight: Tensor) -> None:
    """The layer's weight must be finite."""
    if not (finite := weight.isfinite()).all():
        raise ValueError(
            f"{layer}.weight holds {int((~finite).sum())} NaN or infinite values: repair or reload "
            "it"
        )
