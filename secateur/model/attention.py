"""`nn.MultiheadAttention`: the projections of queries, keys and values as layers that see inputs.

It holds them in one parameter, or in three where keys or values have a width of their own, and
multiplies by them and by its output projection without calling a module.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from secateur.core.interrupts import putting_back
from secateur.model.blocks import forward_as
from secateur.model.piece import Piece

PACKED, NAMES = "in_proj_weight", ("q", "k", "v")


def is_attention(module: nn.Module) -> bool:
    """Whether the module is torch's attention, computed as torch does."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    )


def projections_of(module: nn.Module) -> dict[str, Piece]:
    """The projections of an attention's inputs, `in_proj_weight.q` or `q_proj_weight`, by name."""
    if not is_attention(module):
        return {}
    if module._parameters.get(PACKED) is not None:
        made = [
            Piece(module, PACKED, f"{PACKED}.{name}", partial(_third, i))
            for i, name in enumerate(NAMES)
        ]
    else:
        keys = [f"{name}_proj_weight" for name in NAMES]
        made = [Piece(module, k, k) for k in keys if module._parameters.get(k) is not None]
    return {piece.inner: piece for piece in made}


def outputs_of_attention(model: nn.Module) -> set[nn.Module]:
    """The output projections in the model's attentions."""
    return {m.out_proj for m in _attentions(model)}


@contextlib.contextmanager
def seen_in_attention(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have each attention show its projections among the layers what they multiply.

    `eval_mode` has switched off torch's fast path, which runs encoder layers without their modules.
    """
    planned = set(layers.values())
    pieces: dict[nn.Module, dict[str, Piece]] = {}
    for layer in layers.values():
        if isinstance(layer, Piece):
            pieces.setdefault(layer.owner, {})[layer.inner.replace(f"{PACKED}.", "")[0]] = layer
    with putting_back() as stack:
        for module in _attentions(model):
            own = pieces.get(module, {})
            if own or module.out_proj in planned:
                run = partial(_shown, module, own, module.out_proj in planned)
                stack.enter_context(forward_as(module, run))
        yield


def _attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and is_attention(m)]


def _third(index: int, packed: Shaped[Tensor, "three_out in"]) -> Shaped[Tensor, "out in"]:
    return packed.chunk(3)[index]


def _shown(
    module: nn.MultiheadAttention,
    own: Mapping[str, Piece],
    output: bool,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The attention's result, once its projections have seen their inputs."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    for name, word in zip(NAMES, ("query", "key", "value"), strict=True):
        if name in own:
            own[name](given[word])
    if not output:
        return forward(*args, **kwargs)
    project = module.out_proj
    stored = project._parameters
    weight, bias = stored["weight"], stored["bias"]
    assert weight is not None
    # By the identity instead of its weight, attention returns what its output projection reads.
    try:
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        stored |= {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
        mixed, shares = forward(*args, **kwargs)
    finally:
        stored |= {"weight": weight, "bias": bias}
    return project(mixed), shares
