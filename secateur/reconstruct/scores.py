"""The scores that a criterion gives the layers of a model, which is not changed."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import Observed, observe
from secateur.model.gradients import Loss, gradients
from secateur.model.statistics import STATISTICS, name_of, needed_by
from secateur.reconstruct.methods import CRITERION_GIVEN, score


def needs_of(criterion: Callable[..., Tensor], batches: Iterable[Batch] | None) -> tuple[str, ...]:
    """The statistics and gradients that the criterion needs.

    Raises:
        ValueError: if there are any and there is no data for them.
    """
    needs = needed_by(criterion, given=CRITERION_GIVEN)
    if needs and batches is None:
        raise ValueError(
            f"{name_of(criterion)} needs calibration data for {', '.join(needs)}: pass batches, or "
            "use sc.magnitude"
        )
    return needs


def scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    criterion: Callable[..., Tensor],
    batches: Sequence[Batch],
    loss: Loss | None = None,
) -> Generator[tuple[str, Float[Tensor, "out in"]]]:
    """Each layer's name and scores, from statistics and gradients of the model as it is.

    Cost: a pass over the batches where the criterion needs statistics, another for gradients.
    Raises:
        ValueError: as `observe` and `score`.
    """
    needs = needed_by(criterion, given=CRITERION_GIVEN)
    by_gradient = gradients(model, layers, batches, needs, loss)
    for observed in _observed(model, layers, [n for n in needs if n in STATISTICS], batches):
        for name, statistics in observed.statistics.items():
            weight = _layers.matrix(layers[name]).detach().to(torch.float32, copy=True)
            found = {**statistics, **by_gradient.pop(name)}
            yield name, score(criterion, name, weight, found)


def _observed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sums: Sequence[str],
    batches: Iterable[Batch],
) -> Generator[Observed]:
    if not sums:
        yield from (Observed(name, {name: {}}, {name: 0}) for name in layers)
    elif layers:
        yield from observe(model, layers, batches, sums, sequential=False)
