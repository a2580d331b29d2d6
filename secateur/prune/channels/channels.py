"""The channels of a model that can be removed, and what each of them takes with it.

Torch-Pruning 1.6 builds such a graph too, but it treats an unknown operation as elementwise, so it
silently removes the wrong columns if channels were reordered; it drops what a constant channel adds
to the next layer; and it cannot follow heads through views unless it is told how many there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import nn

from secateur.model.blocks import Batch
from secateur.prune.channels.flow import Flows, Reader, operation, run
from secateur.prune.channels.guess import guess_inputs
from secateur.prune.channels.layers import LAYERS, STATISTICS
from secateur.prune.channels.rules import RULES
from secateur.prune.channels.trace import Trace, first_names, named_states, trace
from secateur.prune.channels.units import Flow, Ids, Units, along, varying

# Unit -> whether it goes.
Removed = Bool[np.ndarray, "units"]


@dataclass(frozen=True)
class Channels:
    """The unit of each index of each dimension of parameters and buffers, by name and dimension.

    Indices that can only go together have the same unit. `frozen` units cannot go, `normalised`
    units change the statistics of a norm if they go, `returned` units are outputs of the model;
    each comes with the reason. `made` are the dimensions in which parameters make channels,
    `inputs` those in which they only read channels that others make.
    """

    count: int
    states: Mapping[tuple[str, int], Ids]
    frozen: Mapping[int, str]
    normalised: Mapping[int, str]
    returned: Mapping[int, str]
    inputs: frozenset[tuple[str, int]]
    made: frozenset[tuple[str, int]]

    def dim_of(self, name: str) -> int:
        """The dimension of a parameter that has the channels it makes.

        The second in embeddings, transposed convolutions and GPT-2's Conv1D, otherwise the first.
        """
        return 1 if (name, 1) in self.made else 0

    def units(self, name: str) -> Ids:
        """The unit of each channel that a parameter makes."""
        return self.states[name, self.dim_of(name)]

    def pool(self, name: str, names: Iterable[str]) -> list[str]:
        """The parameters of `names` that share units with this one, directly or through others."""
        members = {other: self.units(other) for other in names}
        return next(pool for pool in pools(members) if name in pool)

    def why_not(self, name: str, dim: int) -> str | None:
        """Why no channel in this dimension of a parameter can go, or None if some can."""
        if (name, dim) not in self.states:
            return "it has a single channel, or the model did not use it"
        units = self.states[name, dim]
        for unit in units.tolist():
            if unit in self.frozen:
                return self.frozen[unit]
        return None if len(np.unique(units)) > 1 else "its channels all depend on one another"

    def why_changed(self, name: str, dim: int) -> str | None:
        """What would compute something else from the channels that stay, or None."""
        units = self.states[name, dim].tolist()
        return next((self.normalised[u] for u in units if u in self.normalised), None)

    def is_output(self, name: str, dim: int) -> bool:
        """Whether the model returns channels in this dimension of a parameter."""
        return any(unit in self.returned for unit in self.states[name, dim].tolist())

    def made_with(self, units: Ids) -> list[tuple[str, int]]:
        """Parameters and dimensions that hold these units as their own channels, not as inputs."""
        return [
            key
            for key, held in self.states.items()
            if key not in self.inputs and np.isin(held, units).any()
        ]

    def kept(self, name: str, dim: int, removed: Removed) -> Ids:
        """The indices that stay in this dimension of a parameter or buffer."""
        return np.flatnonzero(~removed[self.states[name, dim]])


@dataclass(frozen=True)
class Followed:
    """A model's operations on one batch, with the units of their results.

    The results of an operation that returns several are under `name[0]`, `name[1]` and so on.
    """

    batch: Batch
    channels: Channels
    trace: Trace
    flows: Mapping[str, Flow]
    readers: Sequence[Reader]


def follow(model: nn.Module, batch: Batch | None = None) -> Followed:
    """The channels of every parameter, followed through a run of the model on this batch.

    The batch is a tensor, a tuple of positional arguments or a dict of keyword arguments; it should
    have several samples, because what is the same in all of them counts as constant. Without one, a
    batch is guessed from the layers that read the model's inputs.

    Cost: one export of the model, and a walk over its operations in Python.

    Raises:
        ValueError: if torch cannot export the model, or no batch can be guessed.
    """
    batch = guess_inputs(model) if batch is None else batch
    traced = trace(model, batch)
    units = Units()
    names = first_names(model)
    rigid = _rigid(model, traced)
    states: dict[str, Flow] = {}
    for name, tensor in named_states(model):
        if name in rigid:
            states[name] = []
        elif names[name] == name:
            ndim, sizes = tensor.dim(), enumerate(tensor.shape)
            states[name] = [along(units.new(n), ndim, dim) for dim, n in sizes if n > 1]
    flows = Flows(units, states, names=traced.states)
    run(flows, traced.nodes(), {**RULES, **LAYERS})
    flows.rectangular()
    used = set(traced.states.values())
    by_state = {
        (name, varying(ids)[0]): units.roots(ids).reshape(-1)
        for name, flow in states.items()
        if name in used
        for ids in flow
    }
    results = dict(flows.of)
    for name, parts in flows.parts.items():
        results |= {f"{name}[{i}]": flow for i, flow in enumerate(parts)}
    settled = {name: _as_roots(units, flow) for name, flow in results.items()}
    channels = Channels(
        units.count,
        by_state,
        units.frozen(),
        units.normalised(),
        units.returned(),
        frozenset(flows.inputs - flows.made),
        frozenset(flows.made),
    )
    return Followed(batch, channels, traced, settled, flows.readers)


def pools(members: Mapping[str, Ids]) -> list[list[str]]:
    """The names in groups, so that names that share a unit are in the same group, in order."""
    found: list[tuple[set[int], list[str]]] = []
    for name, units in members.items():
        mine, together = set(units.tolist()), [name]
        for other in [pool for pool in found if pool[0] & mine]:
            found.remove(other)
            mine, together = mine | other[0], other[1] + together
        found.append((mine, together))
    return [together for _, together in found]


def _rigid(model: nn.Module, traced: Trace) -> set[str]:
    """The buffers that keep their size: all but the running statistics, which follow their norm."""
    users = {
        traced.states[node.name]: {operation(user) for user in node.users}
        for node in traced.nodes()
        if node.name in traced.states
    }
    return {name for name, _ in model.named_buffers() if users.get(name, set()) - STATISTICS}


def _as_roots(units: Units, flow: Iterable[Ids]) -> Flow:
    return [units.roots(ids) for ids in units.settle(list(flow), "")]
