"""Activations that layers apply themselves: `activation(layer(x))` becomes one operator.

No compiler can fuse an activation with an operator that it cannot look into, so that it costs a
pass over the results: read, computed, written.
"""

import contextlib
from collections import Counter

import torch
from torch import Tensor, fx, nn

from secateur.core.undo import Undo
from secateur.formats.activations import ACTIVATIONS
from secateur.formats.linear import SparseLinear
from secateur.formats.op import table

# What tells activations apart: all of them differ there by more than rounding.
PROBES = torch.linspace(-6.0, 6.0, 241, dtype=torch.float32, device="cpu")


class Fused(nn.Module):
    """Stands where an activation stood that the layer before it applies now: hands its input on."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return input


def fuse_activations_(model: nn.Module, undo: Undo) -> dict[str, str]:
    """The layers that apply their activation themselves from now on, and which one it is.

    A packed layer does where an implementation that it runs is able to, if it and a module that
    computes one of `ACTIVATIONS` are children of one module, whose forward calls each once, the
    latter on the result of the former and on nothing else. That is read from a trace of that
    forward by `torch.fx`: where it cannot be traced, all stays as it is. So does a layer that is in
    several places, as what follows it elsewhere may differ. `unpack_` undoes it, and a saved model
    knows nothing of it.
    """
    fused: dict[str, str] = {}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for place, parent in list(model.named_modules()):
        children = dict(parent.named_children())
        alone = {name: child for name, child in children.items() if places[id(child)] == 1}
        able = {name: _applied_by(child) for name, child in alone.items()}
        if not any(able.values()) or "forward" in vars(parent):  # a trace reads the class's
            continue
        for layer, activation in _pairs(parent):
            name = _known(children[activation]) if able.get(layer) else None
            if name is not None and name in able[layer]:
                undo.call(setattr, children[layer], "activation", "")
                children[layer].activation = name
                undo.call(parent.set_submodule, activation, children[activation])
                parent.set_submodule(activation, Fused(children[activation]))
                fused[f"{place}.{layer}".removeprefix(".")] = name
    return fused


def separate_activations_(model: nn.Module, undo: Undo) -> None:
    """Put activations back where they stood; layers no longer apply them."""
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Fused):
            undo.call(model.set_submodule, place, module)
            model.set_submodule(place, module.activation)
        elif isinstance(module, SparseLinear) and module.activation:
            undo.call(setattr, module, "activation", module.activation)
            module.activation = ""


def _applied_by(module: nn.Module) -> set[str]:
    """The activations that something which the layer runs applies, if none is fused yet."""
    if not isinstance(module, SparseLinear) or module.activation or module._forward_hooks:
        return set()
    rows = table(module.dispatch, module.format.implementations)
    return {name for _, implementation in rows for name in implementation.activations}


def _known(module: nn.Module) -> str | None:
    """Which activation the module computes, by its values; None if it holds or does anything."""
    holds = [*module.children(), *module.parameters(), *module.buffers()]
    if holds or module._forward_hooks or module._forward_pre_hooks:
        return None
    with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = module(PROBES)  # it may want another kind of input
        for name, activation in ACTIVATIONS.items():
            if torch.allclose(values, activation(PROBES), rtol=1e-5, atol=1e-6):
                return name
    return None


class _Tracer(fx.Tracer):
    """Looks into no module but the one that is traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """(child, child) where the second is called on the result of the first alone, each once."""
    try:
        nodes = list(_Tracer().trace(parent).nodes)
    except Exception:  # whatever a forward does with what is no tensor
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    pairs = []
    for node in calls:
        for first in calls:
            fed_alone = node.args == (first,) and not node.kwargs and list(first.users) == [node]
            if fed_alone and times[first.target] == times[node.target] == 1:
                pairs.append((str(first.target), str(node.target)))
    return pairs
