"""The parameters of a model with other tensors in place of some layers' weights.

A layer's weight is a parameter, or a matrix in one that other matrices share. Here both are
replaced alike, so that what trains layers has no need to know where their weights are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn
from torch.autograd import Function

from secateur.model.piece import Piece, parameter_name


def with_weights(
    layers: Mapping[str, nn.Module], weights: Mapping[str, Shaped[Tensor, "..."]]
) -> dict[str, Tensor]:
    """The parameters that hold the weights of these layers, with `weights` in their place.

    By the parameters' names, for `torch.func.functional_call`. Gradients reach the given tensors
    alone; what else a parameter holds is copied.
    """
    replaced: dict[str, Tensor] = {}
    shared: dict[str, list[tuple[Piece, Tensor]]] = {}
    for name, weight in weights.items():
        module = layers[name]
        if isinstance(module, Piece):
            shared.setdefault(parameter_name(name, module), []).append((module, weight))
        else:
            replaced[parameter_name(name, module)] = weight
    for name, inside in shared.items():
        pieces, matrices = zip(*inside, strict=True)
        takes = [piece.piece_of for piece in pieces]
        whole = pieces[0].parameter
        replaced[name] = _Assembled.apply(whole, takes, *matrices)  # type: ignore[no-untyped-call]
    return replaced


class _Assembled(Function):
    """A copy of a parameter with other matrices in place of some of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        parameter: Shaped[Tensor, "..."],
        takes: Sequence[Callable[[Tensor], Tensor]],
        *matrices: Shaped[Tensor, "_ _"],
    ) -> Shaped[Tensor, "..."]:
        ctx.takes = takes
        whole = parameter.detach().to(matrices[0].dtype, copy=True)
        for take, matrix in zip(takes, matrices, strict=True):
            take(whole).copy_(matrix)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Shaped[Tensor, "..."]) -> tuple[Tensor | None, ...]:
        (whole,) = gradients
        return None, None, *(take(whole) for take in ctx.takes)
