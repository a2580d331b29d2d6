"""Packing for `export`: in which formats, how much it saves, and where it is known to be slower."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.accelerate.candidates import why_not_each
from secateur.formats import SparseLinear
from secateur.formats.format import FORMATS, parse_format
from secateur.formats.pack import linears_of
from secateur.model.plan import Plan
from secateur.patterns import Pattern


def formats_for(
    model: nn.Module, plan: Plan | None, format: str | None
) -> Mapping[str, list[str] | None]:
    """The layers to pack in each format; None for all that fit."""
    if format is not None or plan is None:
        return {format or "semi24": None}
    linears = linears_of(model)
    smallest: dict[Pattern, str] = {}
    chosen: dict[str, list[str]] = {}
    for name, pattern in plan.layers.items():
        if name in linears:
            if pattern not in smallest:
                smallest[pattern] = _smallest(pattern, linears[name].weight.detach())
            chosen.setdefault(smallest[pattern], []).append(name)
    return dict(chosen)


def packed_size(model: nn.Module, plan: Plan | None, stored: int) -> int | None:
    """Bytes of the weights as `export --to packed` would write them; None if nothing fits.

    `stored` are the bytes that they take now, of which the packed layers' are exchanged.
    """
    linears = linears_of(model)
    saved = 0
    for format, layers in formats_for(model, plan, None).items():
        chosen = parse_format(format)
        for name in linears if layers is None else layers:
            weight = linears[name].weight.detach()
            if chosen.why_not(weight) is None:
                saved += weight.nbytes - chosen.pack(weight).nbytes
    return stored - saved if saved else None


def slower_here(model: nn.Module) -> list[str]:
    """What is known without a measurement about the speed of packed layers here, in sentences.

    On a CPU a layer that only its format's reference can multiply is slower than dense. All other
    layers, and every layer on a GPU, have to be measured.
    """
    packed = [module for module in model.modules() if isinstance(module, SparseLinear)]
    on_cpu = not torch.cuda.is_available()
    slow = [layer for layer in packed if on_cpu and all(why_not_each(layer, 1).values())]
    lines = []
    if slow:
        formats = ", ".join(dict.fromkeys(str(layer.format) for layer in slow))
        lines.append(
            f"slower than dense on this machine: {len(slow)} of {len(packed)} layers, for nothing "
            f"here multiplies {formats} but a reference; it saves room, or use it where `secateur "
            "doctor` says that it runs"
        )
    if len(slow) < len(packed):
        lines.append(
            f"whether {'the other' if slow else 'its'} {len(packed) - len(slow)} layers are faster "
            "is for `secateur bench` to measure, on the dense form"
        )
    return lines


def _smallest(pattern: Pattern, weight: Tensor) -> str:
    """The exact format that takes the least room for a weight of this pattern."""
    rows, columns = pattern.tile
    tiled = [parse_format(f"block:{rows}x{columns}")] if rows * columns > 1 else []
    exact = [*tiled, *(format for format in FORMATS if format.is_exact)]
    fitting = [format for format in exact if format.why_not(weight) is None]
    if not fitting:
        return str(exact[-1])  # says why it does not hold the weight
    return str(min(fitting, key=lambda format: format.pack(weight).nbytes))
