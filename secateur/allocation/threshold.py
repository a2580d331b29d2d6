"""One threshold for the scores of all layers: model-wide scope, as a sparsity for each layer."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from secateur.core.float64 import in_float64
from secateur.criteria import magnitude
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list
from secateur.model.gradients import Loss
from secateur.model.layers import Selector, weights_of
from secateur.model.plan import match, plan
from secateur.patterns import Pattern, as_pattern
from secateur.patterns.keep import count_zeros
from secateur.patterns.pattern import as_sparsity
from secateur.reconstruct.scores import needs_of, scores

Normalisation = Literal["none", "rms", "lamp"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)


@torch.inference_mode(False)
def threshold(
    model: nn.Module,
    pattern: str | Pattern,
    criterion: Callable[..., Tensor] = magnitude,
    batches: Iterable[Batch] | None = None,
    *,
    normalise: Normalisation,
    floor: float = 0.0,
    loss: Loss | None = None,
    layers: Iterable[Selector] | None = None,
    ignore: Iterable[Selector] = (),
) -> dict[str, Pattern]:
    """Each layer's pattern if the weights of all layers compete by their scores for one budget.

    All layers together have the `pattern`'s sparsity to the weight; ties go to the earlier layer.
    `pattern` is one whose budget is a layer's (`unstructured:0.7@layer`), or blocks. `floor` is the
    share of its weights, or blocks, that each layer keeps at least. `sc.plan` takes the result,
    and `prune_` by the same criterion and data then drops what is below the threshold.

    `normalise` says how scores of different layers compare:

    - `"none"`: as they are, right for estimates of the loss: Taylor, Fisher, SNIP.
    - `"rms"`: over the root mean square of the layer's scores.
    - `"lamp"`: s^2 over the sum of the squares of the layer's scores that are at least as large.
      By magnitude this is LAMP; the largest score of every layer is then 1.

    Cost: the criterion's statistics, on the dense model; 32 passes over the scores. Memory: a
        float32 for every planned weight.
    Raises:
        ValueError: as `plan`; if the pattern has no budget for a whole layer, data is needed and
            missing, or the floors leave fewer zeros than are asked for.
    Source: LAMP, Lee et al., arXiv:2010.07611, eq. 4.
    """
    chosen = _of_layers(pattern)
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise is one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f"threshold needs a floor in [0, 1], got {floor:g}")
    needs = needs_of(criterion, batches)
    made = plan(model, chosen, layers=None if layers is None else list(layers), ignore=ignore)
    modules = match(model, made)
    weights_of(modules, written=False)
    listed = as_list(batches) if needs and batches is not None else []
    keys: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, found in scores(model, modules, criterion, listed, loss):
            units = made.layers[name].competing(found)
            assert units is not None, "asked before"
            keys[name] = _ordered(_normalised(name, units, normalise))
    sizes = {name: keys[name].numel() for name in made.layers}
    kept = _kept({name: keys[name] for name in sizes}, chosen.sparsity, floor)
    return {
        name: pattern.at(as_sparsity(sizes[name] - kept[name], sizes[name]))
        for name, pattern in made.layers.items()
    }


def _of_layers(pattern: str | Pattern) -> Pattern:
    """The pattern, whose budget must be a whole layer's."""
    chosen = as_pattern(pattern)
    if chosen.competing(torch.zeros(chosen.tile, dtype=torch.float32, device="cpu")) is None:
        raise ValueError(
            f"threshold needs a pattern with one budget for a layer, got {chosen}: such as "
            "'unstructured:0.7@layer' or 'block:64x64@0.8'"
        )
    return chosen


def _normalised(
    layer: str, units: Float[Tensor, " units"], how: Normalisation
) -> Float[Tensor, " units"]:
    """The layer's scores, comparable with those of other layers."""
    if how == "rms":
        root = float(in_float64(units).square().mean().sqrt())
        return units / (root or 1.0)
    if how == "lamp":
        if units.min() < 0:
            raise ValueError(
                f"layer {layer}: 'lamp' needs scores of at least 0, got {float(units.min()):g}: "
                "normalise by 'rms' or 'none'"
            )
        ascending, order = in_float64(units).square().sort()
        above = ascending.flip(0).cumsum(0).flip(0)
        # Of equal scores all have the sum of all of them.
        above = above[torch.searchsorted(ascending, ascending)]
        share = (ascending / above.masked_fill(above == 0, 1)).to(units)
        return torch.empty_like(units).scatter_(0, order.to(units.device), share)
    return units


def _ordered(units: Float[Tensor, " units"]) -> Int32[Tensor, " units"]:
    """Whole numbers in the order of the scores: a float's bits, those below zero reversed."""
    bits = (units.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)


def _kept(
    keys: Mapping[str, Int32[Tensor, " units"]], sparsity: float, floor: float
) -> dict[str, int]:
    """How many units each layer keeps, so that all have the sparsity and none less than its floor.

    Raises:
        ValueError: if the floors do not allow it.
    """
    least = {name: math.ceil(Fraction(repr(floor)) * key.numel()) for name, key in keys.items()}
    units = sum(key.numel() for key in keys.values())
    zeros = count_zeros(sparsity, units)
    if (spare := units - sum(least.values())) < zeros:
        raise ValueError(
            f"a floor of {floor:g} in each layer leaves {spare:,} of {units:,} to drop, "
            f"{zeros:,} are asked for: lower the floor or the sparsity"
        )

    def above(key: int) -> dict[str, int]:
        return {name: max(least[name], int((k > key).sum())) for name, k in keys.items()}

    # The lowest key above which there are no more than are kept, by bisection; no key is the least.
    low, high = torch.iinfo(torch.int32).min + 1, torch.iinfo(torch.int32).max
    while low < high:
        middle = (low + high) // 2
        enough = sum(above(middle).values()) <= units - zeros
        low, high = (low, middle) if enough else (middle + 1, high)
    kept, with_equals = above(low), above(low - 1)
    missing = units - zeros - sum(kept.values())
    for name in kept:
        more = min(missing, with_equals[name] - kept[name])
        kept[name], missing = kept[name] + more, missing - more
    if empty := [name for name, count in kept.items() if not count]:
        warnings.warn(
            f"{len(empty)} of {len(kept)} layers lose all their weights, first {empty[0]}: give "
            "threshold a floor, as floor=0.05, or normalise the scores in another way",
            stacklevel=1,
        )
    return kept
