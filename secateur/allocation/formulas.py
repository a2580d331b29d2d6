"""Allocations by formula: each layer's sparsity from its shape, or from its outliers."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from secateur.core.float64 import in_float64
from secateur.criteria import wanda
from secateur.model import layers as _layers
from secateur.model.blocks import Batch, find_chains
from secateur.model.calibrate import observe
from secateur.model.layers import Selector
from secateur.patterns import Pattern, as_pattern, takes_any_sparsity


def erk(
    model: nn.Module,
    pattern: str | Pattern,
    *,
    layers: Iterable[Selector] | None = None,
    ignore: Iterable[Selector] = (),
) -> dict[str, Pattern]:
    """Each layer's pattern, its density proportional to the sum of its sides over their product.

    Erdos-Renyi kernel: a weight [out, in, height, width] has a density e (out + in + height +
    width) / (out in height width), so that small layers stay denser than large ones. Where that
    is above 1, the layer stays dense. e is chosen so that all weights together have the `pattern`'s
    sparsity. `sc.plan` takes the result.

    Raises:
        ValueError: if a selector matches nothing, or the pattern has a fixed sparsity, as N:M has.
    Source: Evci et al. 2020, arXiv:1911.11134, section 3; Mocanu et al. 2018, arXiv:1707.04780.
    """
    chosen = _of_any_sparsity(pattern, "erk")
    modules = _layers.select(model, _listed(layers), ignore).layers
    weights = _layers.weights_of(modules, written=False)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    sides = {name: sum(weight.shape) for name, weight in weights.items()}
    kept = (1 - chosen.sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = [name for name in sizes if name not in dense]
        left = kept - sum(sizes[name] for name in dense)
        e = left / sum(sides[name] for name in rest) if rest else 0.0
        over = {name for name in rest if e * sides[name] > sizes[name]}
        if not over:
            break
        dense |= over
    return {
        name: chosen.at(0.0 if name in dense else max(0.0, 1 - e * sides[name] / sizes[name]))
        for name in sizes
    }


def owl(
    model: nn.Module,
    pattern: str | Pattern,
    batches: Iterable[Batch],
    *,
    outlier: float = 5.0,
    width: float = 0.08,
    layers: Iterable[Selector] | None = None,
    ignore: Iterable[Selector] = (),
) -> dict[str, Pattern]:
    """Each layer's pattern, sparser where fewer weights are outliers.

    An outlier is a weight whose Wanda score is above `outlier` times the mean of its block (the
    paper's M, 5 to 7). The sparsities of the blocks follow the share of outliers linearly, in a
    band `2 width` wide (`width` is the paper's lambda) around the `pattern`'s sparsity, which all
    weights together have. A block is one in the model's chain of blocks; a layer outside the chain
    is a block of its own. `sc.plan` takes the result.

    Cost: one pass of the batches through the model; the scores of a block twice, in float32.
    Raises:
        ValueError: as `erk`; if the model cannot run the batches; if the band leaves [0, 1).
    Source: Yin et al. 2024, arXiv:2310.05175, section 3.
    """
    chosen = _of_any_sparsity(pattern, "owl")
    modules = _layers.select(model, _listed(layers), ignore).layers
    weights = _layers.weights_of(modules, written=False)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    share = _outliers(model, modules, batches, outlier)
    low, high = min(share.values()), max(share.values())
    slope = 2 * width / (high - low) if high > low else 0.0
    mean = sum(share[name] * sizes[name] for name in sizes) / sum(sizes.values())
    found = {name: chosen.sparsity - slope * (share[name] - mean) for name in sizes}
    if bad := {name: s for name, s in found.items() if not 0 <= s < 1}:
        name, sparsity = next(iter(bad.items()))
        raise ValueError(
            f"owl needs sparsities in [0, 1), got {sparsity:.3f} for {name}: choose a smaller "
            f"width than {width:g}"
        )
    return {name: chosen.at(sparsity) for name, sparsity in found.items()}


def _of_any_sparsity(pattern: str | Pattern, who: str) -> Pattern:
    """The pattern, which must be one of any sparsity."""
    chosen = as_pattern(pattern)
    if takes_any_sparsity(chosen):
        return chosen
    raise ValueError(
        f"{who} needs a pattern of any sparsity, got {chosen}: such as 'unstructured:0.7'"
    )


def _listed(layers: Iterable[Selector] | None) -> list[Selector] | None:
    return None if layers is None else list(layers)


def _outliers(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], factor: float
) -> dict[str, float]:
    """For each layer the share of its block's weights that score above `factor` times the mean."""
    chains = find_chains(model, layers).values()
    blocks = [block for chain in chains for block in chain]
    home = {
        name: next((b for b in blocks if name == b or name.startswith(b + ".")), name)
        for name in layers
    }
    norms = {
        name: statistics["input_norm"]
        for observed in observe(model, layers, batches, ["input_norm"], sequential=False)
        for name, statistics in observed.statistics.items()
    }
    share: dict[str, float] = {}
    with torch.no_grad():
        for block in set(home.values()):
            inside = [name for name in layers if home[name] == block]
            scores = [wanda(_layers.matrix(layers[name]), norms[name]).flatten() for name in inside]
            whole = torch.cat(scores)
            above = whole > factor * float(in_float64(whole).mean())
            share[block] = int(above.sum()) / above.numel()
    return {name: share[home[name]] for name in layers}
