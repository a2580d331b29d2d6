"""From scores or masks of channels to the units that go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import keep_top
from secateur.prune.channels.channels import Channels, Removed


def least(
    channels: Channels,
    scores: Mapping[str, Float[Tensor, " channels"]],
    zeros: Callable[[int], int],
) -> dict[str, Bool[Tensor, " channels"]]:
    """For each parameter the channels to keep: all but the `zeros(n)` units of lowest score.

    The parameters, which share units (`Channels.pool`), are scored together: the score of a unit is
    the sum over its channels in all of them, and n counts their units. Ties keep the lower unit.

    Raises:
        ValueError: if no unit would be left.
    """
    named = {name: channels.units(name) for name in scores}
    units = np.unique(np.concatenate(list(named.values())))
    places = {name: torch.from_numpy(np.searchsorted(units, ids)) for name, ids in named.items()}
    total = torch.zeros(len(units), dtype=torch.float64, device="cpu")
    for name, score in scores.items():
        total.index_add_(0, places[name], score.to(total))
    going = zeros(len(units))
    if going >= len(units):
        raise ValueError(
            f"{next(iter(scores))} needs a sparsity that leaves a channel, {going} of its "
            f"{len(units)} would go: lower it"
        )
    keep = keep_top(total, len(units) - max(going, 0))
    return {name: keep[place] for name, place in places.items()}


def dropped(channels: Channels, keep: Mapping[str, Bool[Tensor, "..."]]) -> Removed:
    """The units that go if parameters keep these channels.

    Raises:
        ValueError: if a mask has another size, drops a part of a unit, or leaves a parameter no
            channel.
    """
    going, staying = (dict[int, str]() for _ in range(2))
    for name, mask in keep.items():
        units = channels.units(name)
        if mask.shape != (len(units),):
            raise ValueError(
                f"the mask of {name} needs a value for each of its {len(units)} channels, got "
                f"the shape {tuple(mask.shape)}"
            )
        for unit, stays in zip(units.tolist(), mask.tolist(), strict=True):
            (staying if stays else going).setdefault(unit, name)
    if half := sorted(set(going) & set(staying)):
        raise ValueError(
            f"{going[half[0]]} drops a channel that goes together with one that "
            f"{staying[half[0]]} keeps: give both the same mask, or choose with `least`, which "
            "drops whole units"
        )
    removed = np.zeros(channels.count, dtype=bool)
    removed[list(going)] = True
    for (name, _), units in channels.states.items():
        if removed[units].all():
            raise ValueError(
                f"{name} needs a channel, all of its {len(units)} would go: lower the sparsity"
            )
    return removed


def all_but_one(channels: Channels, names: Sequence[str]) -> Removed:
    """As many units of these parameters as can go while every parameter keeps a channel."""
    removed = np.zeros(channels.count, dtype=bool)
    for name in names:
        removed[channels.units(name)] = True
    for units in channels.states.values():
        if removed[units].all():
            removed[units.min()] = False
    return removed


def isolated(channels: Channels, names: Sequence[str]) -> tuple[Channels, dict[int, str]]:
    """The channels with separate units for parameters that cannot lose any, and why they cannot.

    The channels of such a parameter and its bias can still be zeroed, but nothing goes with them.
    What shared a unit with them is frozen for the same reason.
    """
    frozen, stuck = dict(channels.frozen), dict[str, str]()
    while found := {
        name: reason
        for name in names
        if name not in stuck
        and (reason := replace(channels, frozen=frozen).why_not(name, channels.dim_of(name)))
    }:
        stuck |= found
        for name, reason in found.items():
            frozen |= dict.fromkeys(channels.units(name).tolist(), reason)
    states, count, held = dict(channels.states), channels.count, dict[int, str]()
    for name, reason in stuck.items():
        size = len(channels.units(name))
        own = np.arange(count, count + size)
        path, _, tensor_name = name.rpartition(".")
        bias = (f"{path}.bias".removeprefix("."), 0)
        if tensor_name == "weight" and len(states.get(bias, ())) == size:
            states[bias] = own
        states[name, channels.dim_of(name)] = own
        count += size
        held |= dict.fromkeys(own.tolist(), reason)
    return replace(channels, count=count, states=states, frozen=frozen), held
