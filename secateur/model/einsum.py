"""Attention that multiplies by 3-D parameters with `torch.einsum`: their matrices as layers.

XLNet keeps `[hidden, heads, width]` for queries, keys, values and positions, which multiply hidden
states, and as much for the output, which multiplies what all heads give. It is known by its name,
so that transformers is not imported.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.interrupts import putting_back
from secateur.model.blocks import forward_as
from secateur.model.piece import Piece

CLASS, INPUTS, OUTPUT = "XLNetRelativeAttention", ("q", "k", "v", "r"), "o"


def heads_of(module: nn.Module) -> dict[str, Piece]:
    """The matrices of an attention of this kind by the names of its parameters; none of another."""
    if type(module).__name__ != CLASS:
        return {}
    takes = {**dict.fromkeys(INPUTS, _of_inputs), OUTPUT: _of_output}
    found = {key: module._parameters.get(key) for key in takes}
    return {  # only of contiguous memory is the matrix a view
        key: Piece(module, key, key, takes[key])
        for key, parameter in found.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_contiguous()
    }


@contextlib.contextmanager
def seen_in_einsum(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have attentions of this kind show their matrices among the layers what they multiply."""
    planned: dict[nn.Module, dict[str, Piece]] = {}
    for layer in layers.values():
        if isinstance(layer, Piece) and type(layer.owner).__name__ == CLASS:
            planned.setdefault(layer.owner, {})[layer.key] = layer
    with putting_back() as stack:
        for module, own in planned.items():
            stack.enter_context(forward_as(module, partial(_shown, own)))
        yield


def _shown(
    own: Mapping[str, Piece], forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    with _Shown(own):
        return forward(*args, **kwargs)


class _Shown(TorchFunctionMode):
    """Shows each piece what `torch.einsum` multiplies by the parameter that holds it."""

    def __init__(self, own: Mapping[str, Piece]) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.einsum and len(args) == 3:
            for key, piece in self._own.items():
                if args[2] is piece.held():
                    piece(args[1].flatten(-2) if key == OUTPUT else args[1])
        return function(*args, **(kwargs or {}))


def _of_inputs(whole: Shaped[Tensor, "in heads width"]) -> Shaped[Tensor, "out in"]:
    return whole.flatten(1).mT


def _of_output(whole: Shaped[Tensor, "out heads width"]) -> Shaped[Tensor, "out in"]:
    return whole.flatten(1)
