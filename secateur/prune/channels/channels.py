"""The channels of a model that can be removed, and what each of them takes with it.

The graph part is our own. Torch-Pruning 1.6 has one, too, but takes an operation that it does not
know for one by elements, and so removes other columns than those of the rows, without an error, if
channels were reordered; it leaves out what a constant channel adds to the next layer; and it does
not follow heads through views without being told how many there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import nn

from secateur.model.blocks import Batch
from secateur.prune.channels.flow import Flows, Reader, operation, run
from secateur.prune.channels.layers import LAYERS, STATISTICS
from secateur.prune.channels.rules import RULES
from secateur.prune.channels.trace import Trace, first_names, named_states, trace
from secateur.prune.channels.units import Flow, Ids, Units, along, varying

# Unit -> whether it goes.
Removed = Bool[np.ndarray, "units"]


@dataclass(frozen=True)
class Channels:
    """Which units the dimensions of parameters and buffers belong to, by name and dimension.

    Those that are tied have the same number. `returned` are outputs of the model. `inputs` are the
    dimensions in which parameters meet channels that others make, and make none.
    """

    count: int
    states: Mapping[tuple[str, int], Ids]
    frozen: Mapping[int, str]
    normalised: Mapping[int, str]
    returned: Mapping[int, str]
    inputs: frozenset[tuple[str, int]]

    def why_not(self, name: str, dim: int) -> str | None:
        """Why no channel of this dimension of a parameter can go, or None."""
        if (name, dim) not in self.states:
            return "it has a single channel, or the model did not use it"
        units = self.states[name, dim]
        for unit in units.tolist():
            if unit in self.frozen:
                return self.frozen[unit]
        return None if len(np.unique(units)) > 1 else "its channels all depend on one another"

    def why_changed(self, name: str, dim: int) -> str | None:
        """What computes something else of the channels that stay, or None."""
        units = self.states[name, dim].tolist()
        return next((self.normalised[u] for u in units if u in self.normalised), None)

    def is_output(self, name: str, dim: int) -> bool:
        """Whether the model returns channels of this dimension of a parameter."""
        return any(unit in self.returned for unit in self.states[name, dim].tolist())

    def made_with(self, units: Ids) -> list[tuple[str, int]]:
        """Parameters and dimensions that have such units as their own channels, not as inputs."""
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
    """A model's operations with the units of their results.

    Of an operation with several results they are under `name[0]`, `name[1]`.
    """

    channels: Channels
    trace: Trace
    flows: Mapping[str, Flow]
    readers: Sequence[Reader]


def follow(model: nn.Module, batch: Batch) -> Followed:
    """Follow the channels of every parameter through the model, run on this batch.

    Cost: one export of the model, and a walk over its operations in Python.

    Raises:
        ValueError: if torch cannot export the model.
    """
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
    )
    return Followed(channels, traced, settled, flows.readers)


def pools(members: Mapping[str, Ids]) -> list[list[str]]:
    """The names grouped so that those that share a unit are together, in their order."""
    found: list[tuple[set[int], list[str]]] = []
    for name, units in members.items():
        mine, together = set(units.tolist()), [name]
        for other in [pool for pool in found if pool[0] & mine]:
            found.remove(other)
            mine, together = mine | other[0], other[1] + together
        found.append((mine, together))
    return [together for _, together in found]


def _rigid(model: nn.Module, traced: Trace) -> set[str]:
    """The buffers that keep their sizes: all but running statistics, which go with their norm."""
    users = {
        traced.states[node.name]: {operation(user) for user in node.users}
        for node in traced.nodes()
        if node.name in traced.states
    }
    return {name for name, _ in model.named_buffers() if users.get(name, set()) - STATISTICS}


def _as_roots(units: Units, flow: Iterable[Ids]) -> Flow:
    return [units.roots(ids) for ids in units.settle(list(flow), "")]
