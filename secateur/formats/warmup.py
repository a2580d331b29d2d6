"""`warmup`: what packed layers run on first use is compiled and loaded before that."""

from collections.abc import Sequence

import torch
from torch import nn

from secateur.core.progress import progress
from secateur.formats.contract import Format
from secateur.formats.linear import SparseLinear

Likeness = tuple[Format, tuple[int, int], torch.dtype, torch.device, str, bool]


def warmup(model: nn.Module, tokens: Sequence[int] = (1, 16)) -> int:
    """The number of kinds of packed layer in the model; whatever each would run is now loaded.

    Each is called on zeros, once for every number of tokens, and nothing else of the model is. Do
    this before a CUDA graph is captured, where nothing can be compiled; and in the first of several
    processes, because the others find on disk what it compiled.

    Cost: a second for each kernel that was never compiled on this machine, else milliseconds.
    Raises: ValueError if the model has no packed layer, or tokens are no numbers from 1 upwards.
    """
    if not tokens or any(type(count) is not int or count < 1 for count in tokens):
        raise ValueError(
            f"warmup needs numbers of tokens from 1 upwards, got {tokens!r}: "
            "name those that the model will be called with, such as (1, 16)"
        )
    distinct = dict[Likeness, SparseLinear]()
    for module in model.modules():
        if isinstance(module, SparseLinear):
            distinct.setdefault(_likeness(module), module)
    if not distinct:
        raise ValueError(
            f"warmup needs a packed model, got a {type(model).__name__} without a SparseLinear: "
            "run accelerate_ or pack_ first"
        )
    with torch.no_grad():
        for layer in progress(distinct.values(), "warm up", unit="layer"):
            for count in dict.fromkeys(tokens):
                _run(layer, count)
    return len(distinct)


def _likeness(layer: SparseLinear) -> Likeness:
    """What decides which kernels a layer runs."""
    like = (layer.format, layer.shape, layer.dtype, layer.device)
    return (*like, layer.dispatch, layer.bias is None)


def _run(layer: SparseLinear, tokens: int) -> None:
    x = torch.zeros(tokens, layer.in_features, dtype=layer.dtype, device=layer.device)
    layer.forward(x)  # not called: hooks of the user's would see the zeros
