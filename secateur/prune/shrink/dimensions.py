"""The dimensions of a model that can be made smaller: hidden units of an MLP, heads of attention.

They follow from the graph (`secateur.prune.channels`), not from names. What a layer reads is such a
dimension if no channel of it is joined to anything that stays, as the residual stream is to the
model's outputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.gradients import Loss
from secateur.patterns.keep import count_zeros, keep_top
from secateur.prune.channels import Channels, Followed, Removed
from secateur.prune.channels.channels import pools
from secateur.prune.channels.units import Ids
from secateur.reconstruct.scores import scores

WIDTH, HEADS = "width", "heads"


@dataclass(frozen=True)
class Dimension:
    """Units that layers read, by layer the unit of each input; each can go on its own.

    `kind` is `heads` where a unit is several neighbouring channels of what makes it and of what
    reads it, otherwise `width`. `head` is how wide one is: with grouped queries, a unit is a head
    of keys and of values with all heads of queries that read it.
    """

    kind: str
    units: Ids
    readers: Mapping[str, Ids]
    head: int

    @property
    def name(self) -> str:
        return next(iter(self.readers))

    def sizes(self, going: int) -> list[tuple[int, int]]:
        """The numbers that a config may have for it, before and after `going` units are removed."""
        n = len(self.units)
        left = n - going
        if self.kind == WIDTH:
            return [(n, left)]
        queries = len(self.readers[self.name]) // self.head
        return list(dict.fromkeys([(queries, queries * left // n), (n, left)]))


def find_dimensions(model: nn.Module, followed: Followed) -> tuple[list[Dimension], dict[str, str]]:
    """The dimensions, in the order in which they are read, and why other layers read none."""
    channels, modules = followed.channels, dict(_layers.layers_of(model))
    read, left = dict[str, Ids](), dict[str, str]()
    for reader in followed.readers:
        if reader.weight is None:
            continue
        layer, key = reader.weight.rpartition(".")[0], (reader.weight, reader.columns)
        module = modules.get(layer)
        reason = (
            f"{type(model.get_submodule(layer)).__name__} is no layer whose inputs have scores"
            if module is None
            else _layers.why_not_prunable(module)
            or channels.why_not(*key)
            or channels.why_changed(*key)
            or ("they are outputs of the model" if channels.is_output(*key) else None)
        )
        if reason:
            left[layer] = reason
        else:
            read[layer] = channels.states[key]
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    found = [_dimension(channels, {n: read[n] for n in pool}, matrices) for pool in pools(read)]
    apart = {name for d in found for name in d.readers if _is_read_elsewhere(channels, d, left)}
    left |= dict.fromkeys(apart, "another layer reads the same channels, which has no scores")
    return [d for d in found if not apart & d.readers.keys()], left


def unit_scores(
    model: nn.Module,
    dimensions: Sequence[Dimension],
    criterion: Callable[..., Tensor],
    batches: Sequence[Batch],
    loss: Loss | None,
) -> list[Float[Tensor, " _"]]:
    """For each dimension the scores of its units, in float64: the sum over what reads a unit."""
    modules = _layers.layers_of(model)
    readers = {name: modules[name] for dimension in dimensions for name in dimension.readers}
    by_layer = {
        name: found.sum(0, dtype=torch.float64).cpu()
        for name, found in scores(model, readers, criterion, batches, loss)
    }
    totals = []
    for dimension in dimensions:
        total = torch.zeros(len(dimension.units), dtype=torch.float64, device="cpu")
        for name, ids in dimension.readers.items():
            columns = by_layer[name]
            if not columns.isfinite().all():
                raise ValueError(
                    f"units need finite scores, {name} has NaN or infinite ones: repair its "
                    "weights or the data"
                )
            repeated = columns.reshape(-1, len(ids)).sum(0)  # over the positions of a kernel
            total.index_add_(0, torch.from_numpy(np.searchsorted(dimension.units, ids)), repeated)
        totals.append(total)
    return totals


def choose_within(
    dimension: Dimension, score: Float[Tensor, " units"], share: float
) -> Bool[Tensor, " units"]:
    """Which units stay if this share of the dimension's own goes.

    Raises:
        ValueError: if none would stay.
    """
    n = len(score)
    if (going := count_zeros(share, n)) >= n:
        raise ValueError(
            f"{dimension.name} has {n} {dimension.kind}, of which {share:g} would leave none: "
            f"lower {dimension.kind}"
        )
    return keep_top(score, n - going)


def choose_together(
    totals: Sequence[Float[Tensor, " _"]], share: float
) -> list[Bool[Tensor, " _"]]:
    """Which units stay if this share of all goes, each dimension's scores divided by their mean.

    The best unit of each dimension stays, whatever the others are.
    """
    scaled = [total / total.mean().clamp(min=torch.finfo(total.dtype).tiny) for total in totals]
    for total in scaled:
        total[total.argmax()] = torch.inf
    together = torch.cat(scaled)
    most = len(together) - len(totals)
    keep = keep_top(together, len(together) - min(count_zeros(share, len(together)), most))
    return list(keep.split([len(total) for total in totals]))


def removed_units(
    channels: Channels, dimensions: Sequence[Dimension], kept: Sequence[Bool[Tensor, " _"]]
) -> Removed:
    """The units that go, of all units of the model."""
    removed = np.zeros(channels.count, dtype=bool)
    for dimension, keep in zip(dimensions, kept, strict=True):
        removed[dimension.units[~keep.numpy()]] = True
    return removed


def kept_columns(module: nn.Module, ids: Ids, removed: Removed) -> Int[Tensor, " kept"]:
    """The columns of the layer's matrix that read what stays."""
    positions = _layers.matrix(module).shape[1] // len(ids)
    return torch.from_numpy(np.flatnonzero(~removed[np.tile(ids, positions)]))


def _dimension(
    channels: Channels, readers: Mapping[str, Ids], matrices: Collection[str]
) -> Dimension:
    units = np.unique(np.concatenate(list(readers.values())))
    made = [channels.states[key] for key in channels.made_with(units) if key[0] in matrices]
    runs = list(_runs(next(iter(readers.values()))))
    shortest = min((run for ids in made for run in _runs(ids)), default=1)
    several = min(runs) > 1 and any(min(_runs(ids)) > 1 for ids in made)
    return Dimension(HEADS if several else WIDTH, units, readers, shortest if several else 1)


def _runs(ids: Ids) -> Iterator[int]:
    """The lengths of the runs of neighbours that are one unit."""
    ends = np.flatnonzero(np.diff(ids)) + 1
    yield from np.diff([0, *ends, len(ids)]).tolist()


def _is_read_elsewhere(channels: Channels, dimension: Dimension, left: Mapping[str, str]) -> bool:
    """Whether a layer that has no scores reads some of these units."""
    return any(
        name.rpartition(".")[0] in left and np.isin(held, dimension.units).any()
        for (name, dim), held in channels.states.items()
        if (name, dim) in channels.inputs
    )
