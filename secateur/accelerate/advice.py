"""What would be faster on a CPU where a model's own zeros are not: measured, on random weights."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import nn

from secateur.accelerate.report import AccelerateReport

# Most CPUs run whole tiles of zeros fast, in layers that are not small.
PATTERN, FORMAT, TILE, SPARSITY = "block:64x64@0.8", "block:64x64", 64, 0.8
# Tried where the model's own layers are smaller, or have no whole tiles.
EXAMPLE = (1024, 1024)
MOST_WEIGHTS = 2**24  # an output head of gigabytes is not tried

CPU = torch.device("cpu")

Measure = Callable[[nn.Module, str], AccelerateReport]


def blocks_that_gain(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, tokens: Sequence[int], measure: Measure
) -> str:
    """A sentence that says whether tiles of zeros would be faster here, and for which layers.

    The largest of the shapes [out, in] that has whole tiles is measured with random weights, and
    where it is small and does not gain, a larger one. `measure` is `accelerate_` in one format.
    """
    whole = [shape for shape in shapes if not any(size % TILE for size in shape)]
    own = max((s for s in whole if prod(s) <= MOST_WEIGHTS), key=prod, default=None)
    at = f"times as fast as dense at tokens {', '.join(map(str, tokens))}"
    if own is not None and (gain := _gain(own, dtype, measure)):
        return (
            f"what would be faster here: {PATTERN}; a layer of {own[0]} x {own[1]} with it ran "
            f"{gain:.1f} {at}: sc.plan(model, '{PATTERN}')"
        )
    tried = EXAMPLE if own is None or prod(own) < prod(EXAMPLE) else own
    if tried is EXAMPLE and (gain := _gain(EXAMPLE, dtype, measure)):
        here = (
            "this model has none" if own is None else f"one of {own[0]} x {own[1]} was not faster"
        )
        return (
            f"what would be faster here: larger layers in tiles of {TILE} x {TILE}; one of "
            f"{EXAMPLE[0]} x {EXAMPLE[1]} with {PATTERN} ran {gain:.1f} {at}, {here}"
        )
    return f"{PATTERN} would not be faster here either: a layer of {tried[0]} x {tried[1]} was not"


def _gain(shape: tuple[int, int], dtype: torch.dtype, measure: Measure) -> float | None:
    """How many times faster such a layer is at the number of tokens where it gains least, if so."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape[0] // TILE, shape[1] // TILE
    kept = torch.ones(rows * columns, dtype=torch.float32, device=CPU)
    order = torch.randperm(rows * columns, generator=generator, device=CPU)
    kept[order[: round(SPARSITY * rows * columns)]] = 0
    mask = kept.view(rows, columns).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device=CPU) * mask
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    found = measure(nn.Sequential(layer), FORMAT)
    return min((one.ratio for layer in found.changed for one in layer.measured), default=None)
