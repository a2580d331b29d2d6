"""How units flow through a graph: the units of each operation's result, and how they combine.

The rules for single operations are in `rules` and `layers`. An operation without a rule freezes the
units that reach it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from secateur.prune.channels.trace import shape_of, where
from secateur.prune.channels.units import Flow, Ids, Units, varying

# A flow with the shape of its tensor.
Shaped = tuple[Flow, tuple[int, ...]]


@dataclass(frozen=True)
class Reader:
    """A layer that sums over channels: where they come in, and which bias can absorb a constant.

    It reads the result of the operation `source` along dimension `dim`; its `weight` has these
    channels in dimension `columns`. Without a `bias`, or with a reason in `zero`, it can only lose
    channels that are 0.
    """

    source: str
    dim: int
    layer: str
    weight: str | None = None
    columns: int = 1
    bias: str | None = None
    zero: str | None = None


@dataclass
class Flows:
    """The flow of each operation's result so far; a list of flows if it has several results."""

    units: Units
    states: Mapping[str, Flow]
    of: dict[str, Flow] = field(default_factory=dict)
    parts: dict[str, list[Flow]] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    # The parameters, with the dimension, that read channels which others make.
    inputs: set[tuple[str, int]] = field(default_factory=set)
    # The parameters, with the dimension, that make channels; a tied embedding does both.
    made: set[tuple[str, int]] = field(default_factory=set)
    names: Mapping[str, str] = field(default_factory=dict)

    def get(self, node: Any) -> Flow:
        """The settled flow of an argument; empty for anything but a tensor."""
        if not isinstance(node, fx.Node):
            return []
        return self.units.settle(self.of.get(node.name, []), where(node))

    def shaped(self, node: fx.Node) -> Shaped:
        return self.get(node), shape_of(node)

    def name(self, node: Any) -> str | None:
        """The name of an argument that is a parameter or buffer, or None."""
        return self.names.get(node.name) if isinstance(node, fx.Node) else None

    def ids(self, node: fx.Node, dim: int) -> Ids | None:
        """The units along one dimension of a parameter, in one dimension; None if it has size 1."""
        for ids in self.of.get(node.name, []):
            if varying(ids) == (dim,):
                return ids.reshape(-1)
        return None

    def consume(self, node: fx.Node, dim: int) -> Ids | None:
        """The units along a dimension in which a parameter reads channels."""
        if name := self.name(node):
            self.inputs.add((name, dim))
        return self.ids(node, dim)

    def freeze(self, flow: Iterable[Ids], reason: str) -> None:
        for ids in flow:
            self.units.freeze(ids, reason)

    def split(self, flow: Flow, dims: Iterable[int]) -> tuple[Flow, Flow]:
        """The arrays that differ in one of these dimensions, and the others."""
        wanted = set(dims)
        inside = [ids for ids in flow if wanted & set(varying(ids))]
        return inside, [ids for ids in flow if not wanted & set(varying(ids))]

    def merge(self, inputs: Sequence[Shaped], node: fx.Node) -> Flow:
        """Tie what is combined element by element, and return the flow of the result.

        Units that meet a dimension without units cannot shrink along it. Heads may still shrink
        along the other dimension that they have; channels without another dimension are frozen.
        """
        ndim = max((len(shape) for _, shape in inputs), default=0)
        aligned = [_aligned(flow, shape, ndim) for flow, shape in inputs]
        merged: Flow = []
        for flow, _ in aligned:
            for ids in flow:
                partners = [m for m in merged if set(varying(m)) & set(varying(ids))]
                self.units.tie(ids, *partners)
                if not partners:
                    merged.append(ids)
        merged = self.units.settle(merged, where(node))
        for ids in merged:
            rigid = [dim for dim in varying(ids) if _is_rigid(dim, aligned)]
            if len(rigid) < len(varying(ids)):
                self.units.tie_along(ids, rigid)
            else:
                self.units.freeze(ids, f"{where(node)} joins it to channels that stay")
        return self.units.settle(merged, where(node))

    def rectangular(self) -> None:
        """Make sure that only whole slices of a tensor can go.

        An array that differs in several dimensions, such as heads and their channels, keeps only
        the first of these dimensions.
        """
        for name in self.of:
            for ids in self.units.settle(self.of[name], name):
                self.units.tie_along(ids, varying(ids)[1:])


Rule = Callable[[Flows, fx.Node], Flow]


def run(flows: Flows, nodes: Iterator[fx.Node], rules: Mapping[str, Rule]) -> None:
    """Follow the units through the graph, in the order in which it runs."""
    for node in nodes:
        if node.op == "placeholder":
            name = flows.names.get(node.name)
            flows.of[node.name] = flows.states[name] if name else []
        elif node.op == "output":
            for argument in node.all_input_nodes:
                for ids in flows.of[argument.name]:
                    flows.units.give_back(ids)
        else:
            flow = _apply(flows, node, rules)
            flows.of[node.name] = flows.units.settle(flow, where(node))


def _apply(flows: Flows, node: fx.Node, rules: Mapping[str, Rule]) -> Flow:
    if node.target is not None and getattr(node.target, "__name__", "") == "getitem":
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        return flows.parts[source.name][index] if source.name in flows.parts else []
    if not any(flows.get(argument) for argument in node.all_input_nodes):
        return []
    rule = rules.get(operation(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = pointwise
    return (rule or unknown)(flows, node)


def operation(node: fx.Node) -> str:
    """The operation's name without the kinds of its arguments, like `aten::linear`."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else str(node.target)


def pointwise(flows: Flows, node: fx.Node) -> Flow:
    """Combine tensors element by element."""
    return flows.merge([flows.shaped(n) for n in node.all_input_nodes], node)


def unknown(flows: Flows, node: fx.Node) -> Flow:
    """Freeze what reaches an operation without a rule."""
    for argument in node.all_input_nodes:
        flows.freeze(flows.of[argument.name], f"there is no rule for {where(node)}")
    return []


def frozen(flows: Flows, node: fx.Node, flow: Iterable[Ids], what: str) -> None:
    """Freeze units without which an operation would compute something else."""
    flows.freeze(flow, f"{where(node)} {what}")


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument by position or name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _is_rigid(dim: int, inputs: Sequence[Shaped]) -> bool:
    """Whether an input has this dimension, but no units along it."""
    return any(
        shape[dim] > 1 and not any(ids.shape[dim] > 1 for ids in flow) for flow, shape in inputs
    )


def _aligned(flow: Flow, shape: Sequence[int], ndim: int) -> Shaped:
    missing = ndim - len(shape)
    return (
        [ids.reshape((1,) * missing + ids.shape) for ids in flow],
        (1,) * missing + tuple(shape),
    )


def fixed_like(units: Units, size: int) -> Ids:
    """The unit of `size` channels that no layer makes."""
    return np.repeat(units.fixed, size)
