"""Rules for operations with weights: products, convolutions, norms, embeddings, recurrences."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import fx

from secateur.prune.channels.flow import (
    Flows,
    Reader,
    Rule,
    Shaped,
    argument,
    frozen,
    operation,
)
from secateur.prune.channels.trace import layer_of, shape_of, where
from secateur.prune.channels.units import Flow, Ids, along

# The gates of recurrent layers: the number of runs of rows in each of their weights.
GATES = {"aten::lstm": 4, "aten::gru": 3, "aten::rnn_tanh": 1, "aten::rnn_relu": 1}


def linear(flows: Flows, node: fx.Node) -> Flow:
    """X W^T + b: the last dimension meets the columns, and the rows make new channels."""
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    bias = argument(node, 2, "bias", None)
    dim = len(shape_of(x)) - 1
    outside = _read(flows, node, x, dim, weight, bias, None)
    return [*outside, *_made(flows, node, weight, 0, bias, len(shape_of(node)) - 1)]


def addmm(flows: Flows, node: fx.Node) -> Flow:
    """B + x W, as in GPT-2's Conv1D: the weight's rows are inputs, its columns outputs."""
    bias, x, weight = (cast(fx.Node, argument) for argument in node.args[:3])
    outside = _read(flows, node, x, 1, weight, bias, None, columns=0)
    return [*outside, *_made(flows, node, weight, 1, bias, 1)]


def convolution(flows: Flows, node: fx.Node) -> Flow:
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    bias = argument(node, 2, "bias", None)
    groups = cast(int, argument(node, 6, "groups", 1))
    padding = argument(node, 4, "padding", 0)
    spatial = len(shape_of(weight)) - 2
    dim = len(shape_of(x)) - spatial - 1
    in_space, _ = flows.split(flows.get(x), range(dim + 1, dim + 1 + spatial))
    frozen(flows, node, in_space, "convolves over it")
    if groups > 1:
        return _grouped(flows, node, dim, groups)
    padded = padding != "valid" and any(p != 0 for p in _listed(padding))
    zero = f"{where(node)} pads it with zeros" if padded else None
    outside = _read(flows, node, x, dim, weight, bias, zero)
    before, _ = flows.split(outside, range(dim))
    return [*before, *_made(flows, node, weight, 0, bias, dim)]


def transposed_convolution(flows: Flows, node: fx.Node) -> Flow:
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    spatial = len(shape_of(weight)) - 2
    dim = len(shape_of(x)) - spatial - 1
    groups = cast(int, argument(node, 6, "groups", 1))
    if groups > 1 or len(flows.split(flows.get(x), [dim])[1]):
        everything = [ids for n in node.all_input_nodes for ids in flows.get(n)]
        frozen(flows, node, everything, "has groups, or convolves over it")
        return []
    _join(flows, node, [np.moveaxis(i, dim, -1) for i in flows.get(x)], flows.consume(weight, 0))
    flows.readers.append(Reader(x.name, dim, where(node), zero=f"{where(node)} spreads it"))
    return _made(flows, node, weight, 1, argument(node, 2, "bias", None), dim)


def _grouped(flows: Flows, node: fx.Node, dim: int, groups: int) -> Flow:
    """A depthwise convolution passes channels through; any other grouping freezes them."""
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    made = _made(flows, node, weight, 0, argument(node, 2, "bias", None), dim)
    inside, outside = flows.split(flows.get(x), [dim])
    if shape_of(weight)[1] > 1 or groups == 1:
        frozen(flows, node, [*inside, *made], "has groups of channels")
        return []
    times = shape_of(weight)[0] // groups
    channels = [np.repeat(ids, times, dim) for ids in inside]
    shape = shape_of(node)
    if not channels:
        frozen(flows, node, made, "has one filter for each channel of the input, which stays")
    return flows.merge([(channels, shape), (made, shape)], node) + outside


def embedding(flows: Flows, node: fx.Node) -> Flow:
    weight = cast(fx.Node, node.args[0])
    entries, _ = flows.split(flows.get(weight), [0])
    frozen(flows, node, entries, "looks entries up")
    return _made(flows, node, weight, 1, None, len(shape_of(node)) - 1)


def batch_norm(flows: Flows, node: fx.Node) -> Flow:
    """Works channel by channel; scale, shift and running statistics go with the channel."""
    inputs = [_along_channels(flows, n, node) for n in node.all_input_nodes]
    flow = flows.merge(inputs, node)
    flows.parts[node.name] = [flow, [], []]
    return flow


def group_norm(flows: Flows, node: fx.Node) -> Flow:
    """Only whole groups go, so that the statistics of the remaining groups do not change."""
    x, groups = cast(fx.Node, node.args[0]), cast(int, node.args[1])
    inside, _ = flows.split(flows.get(x), [1])
    for ids in inside:
        by_group = np.moveaxis(ids, 1, 0).reshape(groups, -1)
        flows.units.tie_along(by_group, [1])
    return batch_norm(flows, node)


def layer_norm(flows: Flows, node: fx.Node) -> Flow:
    """The width shrinks, and the norm runs over the channels that are left."""
    x, normalised = cast(fx.Node, node.args[0]), cast(Sequence[int], node.args[1])
    ndim = len(shape_of(x))
    flow = flows.merge([flows.shaped(n) for n in node.all_input_nodes], node)
    inside, _ = flows.split(flow, range(ndim - len(normalised), ndim))
    if len(normalised) > 1:
        frozen(flows, node, inside, "normalises over several dimensions")
    for ids in inside:
        flows.units.normalise(ids, f"{where(node)} normalises over it")
    return flow


def prelu(flows: Flows, node: fx.Node) -> Flow:
    inputs = [_along_channels(flows, n, node) for n in node.all_input_nodes]
    return flows.merge(inputs, node)


def pool(flows: Flows, node: fx.Node) -> Flow:
    """Pooling and resizing: channels pass through, positions are mixed."""
    name = operation(node)
    spatial = next((int(d) for d in "123" if f"{d}d" in name), 0)
    ndim = len(shape_of(cast(fx.Node, node.args[0])))
    inside, outside = flows.split(flows.get(node.args[0]), range(ndim - spatial, ndim))
    frozen(flows, node, inside, "mixes it")
    if isinstance(node.meta["val"], (list, tuple)):
        flows.parts[node.name] = [outside for _ in node.meta["val"]]  # values and their positions
    return outside


def recurrent(flows: Flows, node: fx.Node) -> Flow:
    """A hidden unit goes from all gates, layers and directions, which share one hidden size."""
    x, states, weights = node.args[0], node.args[1], cast(Sequence[fx.Node], node.args[2])
    layers, both = cast(int, node.args[4]), cast(bool, node.args[7])
    directions, gates = 1 + both, GATES[operation(node)]
    each = len(weights) // (layers * directions)
    x = cast(fx.Node, x)
    last = len(shape_of(x)) - 1
    hidden = flows.ids(weights[1], 1)
    if each not in (2, 4) or hidden is None:
        everything = [ids for n in node.all_input_nodes for ids in flows.get(n)]
        frozen(flows, node, everything, "has a projection, or a single hidden unit")
        return []
    outputs = np.concatenate([hidden] * directions)
    for index in range(0, len(weights), each):
        first = index < each * directions
        _recurrent_weights(flows, node, weights[index : index + each], hidden, gates)
        columns = flows.consume(weights[index], 1)
        bias = weights[index + 2] if each == 4 else None
        if not first and columns is not None:
            flows.units.tie(columns, outputs)
        elif first:
            outside = _read(flows, node, x, last, weights[index], bias, None)
            frozen(flows, node, outside, "runs along it")
    made = along(outputs, last + 1, last)
    state = along(hidden, last + 1, last)
    listed = states if isinstance(states, (list, tuple)) else [states]
    _recurrent_states(flows, node, [cast(fx.Node, s) for s in listed], state)
    zero = f"{where(node)} reads it again"
    flows.readers.append(Reader(f"{node.name}[0]", last, where(node), zero=zero))
    flows.parts[node.name] = [[made], *[[state] for _ in listed]]
    return []


def _recurrent_weights(
    flows: Flows, node: fx.Node, weights: Sequence[fx.Node], hidden: Ids, gates: int
) -> None:
    for weight in weights:
        rows = flows.ids(weight, 0)
        assert rows is not None
        flows.units.tie(rows.reshape(gates, -1), hidden)
    columns = flows.consume(weights[1], 1)
    assert columns is not None
    flows.units.tie(columns, hidden)


def _recurrent_states(flows: Flows, node: fx.Node, states: Sequence[fx.Node], ids: Ids) -> None:
    """Tie the initial states, unless they are the zeros that the layer makes itself."""
    for state in states:
        if operation(state) == "aten::zeros":
            flows.of[state.name] = [ids]
        else:
            flow, shape = flows.shaped(state)
            flows.merge([(flow, shape), ([ids], shape)], node)


def _read(
    flows: Flows,
    node: fx.Node,
    x: fx.Node,
    dim: int,
    weight: fx.Node,
    bias: fx.Node | None,
    zero: str | None,
    columns: int = 1,
) -> Flow:
    """Tie the input's channels to the weight's columns; return the rest of the input's flow."""
    inside, outside = flows.split(flows.get(x), [dim])
    _join(flows, node, [np.moveaxis(i, dim, -1) for i in inside], flows.consume(weight, columns))
    name = flows.name(weight)
    if name is None:
        zero = zero or f"{where(node)} has a weight that is computed"
    reader = Reader(x.name, dim, layer_of(node), name, columns, flows.name(bias), zero)
    flows.readers.append(reader)
    return outside


def _join(flows: Flows, node: fx.Node, inside: Flow, columns: Ids | None) -> None:
    if columns is None or not inside:
        meeting = [*inside] if columns is None else [columns, *inside]
        frozen(flows, node, meeting, "reads it with an input or weight that stays")
        return
    flows.units.tie(columns, *inside)


def _made(flows: Flows, node: fx.Node, weight: fx.Node, row_dim: int, bias: Any, dim: int) -> Flow:
    """The channels that a weight makes, in a dimension of the result, tied to its bias."""
    rows = flows.ids(weight, row_dim)
    if name := flows.name(weight):
        flows.made.add((name, row_dim))
    if rows is None:
        frozen(flows, node, [r for r in flows.get(weight) if r.shape[row_dim] > 1], "computes it")
        return []
    if isinstance(bias, fx.Node):
        others = flows.ids(bias, 0)
        if others is None:
            frozen(flows, node, [rows, *flows.get(bias)], "has a bias that is computed")
        else:
            flows.units.tie(rows, others)
    return [along(rows, len(shape_of(node)), dim)]


def _along_channels(flows: Flows, source: fx.Node, node: fx.Node) -> Shaped:
    """The flow of an operand; one with a single dimension has a number per channel, dimension 1."""
    flow, shape = flows.shaped(source)
    ndim = len(shape_of(cast(fx.Node, node.args[0])))
    if len(shape) != 1:
        return flow, shape
    after = (1,) * (ndim - 2)
    return [ids.reshape(-1, *after) for ids in flow], (*shape, *after)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_CONVOLUTIONS = "conv1d conv2d conv3d"
_TRANSPOSED = "conv_transpose1d conv_transpose2d conv_transpose3d"
_BATCH = "_native_batch_norm_legit_no_training _native_batch_norm_legit batch_norm instance_norm"
_POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d"
)
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(_CONVOLUTIONS.split(), convolution),
    **dict.fromkeys(_TRANSPOSED.split(), transposed_convolution),
    **dict.fromkeys(_BATCH.split(), batch_norm),
    **dict.fromkeys(_POOLS.split(), pool),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **{
        "linear": linear,
        "addmm": addmm,
        "embedding": embedding,
        "group_norm": group_norm,
        "prelu": prelu,
    },
}
# Operations whose buffers have a value per channel and shrink with the channels.
STATISTICS = frozenset(f"aten::{name}" for name in _BATCH.split())
LAYERS: dict[str, Rule] = {
    **{f"aten::{name}": rule for name, rule in _NAMED.items()},
    **dict.fromkeys(GATES, recurrent),
}
