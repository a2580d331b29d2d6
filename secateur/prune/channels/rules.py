"""Rules for operations that move, select and combine elements, and for products of activations."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from secateur.prune.channels.flow import (
    Flows,
    Reader,
    Rule,
    argument,
    fixed_like,
    frozen,
    operation,
    pointwise,
)
from secateur.prune.channels.trace import shape_of, where
from secateur.prune.channels.units import Flow, Ids, along, reshape, varying


def same(flows: Flows, node: fx.Node) -> Flow:
    """Elements stay where they are."""
    return flows.get(node.args[0])


def moved(flows: Flows, node: fx.Node) -> Flow:
    """Applies an operation that only moves elements to the numbers of their units."""
    shape, flow = shape_of(_source(node)), []
    for ids in flows.get(node.args[0]):
        numbers = torch.from_numpy(np.broadcast_to(ids, shape).copy())
        flow.append(cast(Any, node.target)(numbers, *node.args[1:], **node.kwargs).numpy())
    return flow


def view(flows: Flows, node: fx.Node) -> Flow:
    source = _source(node)
    return [reshape(ids, shape_of(source), shape_of(node)) for ids in flows.get(source)]


def permute(flows: Flows, node: fx.Node) -> Flow:
    order = [int(dim) for dim in cast(Sequence[int], node.args[1])]
    return [ids.transpose(order) for ids in flows.get(node.args[0])]


def transpose(flows: Flows, node: fx.Node) -> Flow:
    first, second = (cast(int, argument(node, i, f"dim{i - 1}", 2 - i)) for i in (1, 2))
    flow = flows.get(node.args[0])
    return [ids.swapaxes(first, second) if ids.ndim > 1 else ids for ids in flow]


def expand(flows: Flows, node: fx.Node) -> Flow:
    ndim = len(shape_of(node))
    return [ids.reshape((1,) * (ndim - ids.ndim) + ids.shape) for ids in flows.get(node.args[0])]


def repeat(flows: Flows, node: fx.Node) -> Flow:
    times = [int(n) for n in cast(Sequence[int], node.args[1])]
    repeated = []
    for ids in expand(flows, node):
        tiles = [n if size > 1 else 1 for n, size in zip(times, ids.shape, strict=True)]
        repeated.append(np.tile(ids, tiles))
    return repeated


def repeat_interleave(flows: Flows, node: fx.Node) -> Flow:
    times, dim = argument(node, 1, "repeats", None), argument(node, 2, "dim", None)
    flow = flows.get(node.args[0])
    if not isinstance(times, int) or dim is None:
        frozen(flows, node, flow, "repeats single elements")
        return []
    return [np.repeat(ids, times, dim) if ids.shape[dim] > 1 else ids for ids in flow]


def flip(flows: Flows, node: fx.Node) -> Flow:
    dims = cast(Sequence[int], node.args[1])
    return [np.flip(ids, tuple(dims)) for ids in flows.get(node.args[0])]


def select(flows: Flows, node: fx.Node) -> Flow:
    dim, index = cast(int, node.args[1]), cast(int, node.args[2])
    return [ids.take(index if ids.shape[dim] > 1 else 0, dim) for ids in flows.get(node.args[0])]


def slice_(flows: Flows, node: fx.Node) -> Flow:
    dim = argument(node, 1, "dim", 0)
    part = slice(*(argument(node, i, name, None) for i, name in enumerate(_SLICE, 2)))
    return [_cut(ids, dim, part) for ids in flows.get(node.args[0])]


def split(flows: Flows, node: fx.Node) -> Flow:
    """`split`, `chunk`, `unbind`: the shapes of the parts say where each begins."""
    last = 1 if operation(node) == "aten::unbind" else 2
    dim = argument(node, last, "dim", 0)
    start, parts = 0, list[Flow]()
    for value in node.meta["val"]:
        width = 1 if last == 1 else int(value.shape[dim])
        flow = [_cut(ids, dim, slice(start, start + width)) for ids in flows.get(node.args[0])]
        parts.append([ids.take(0, dim) for ids in flow] if last == 1 else flow)
        start += width
    flows.parts[node.name] = parts
    return []


def cat(flows: Flows, node: fx.Node) -> Flow:
    tensors = cast(Sequence[fx.Node], node.args[0])
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    return _joined(flows, node, [flows.shaped(n) for n in tensors], dim)


def stack(flows: Flows, node: fx.Node) -> Flow:
    tensors = cast(Sequence[fx.Node], node.args[0])
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    inputs = []
    for flow, shape in (flows.shaped(n) for n in tensors):
        wider = [np.expand_dims(ids, dim) for ids in flow]
        inputs.append((wider, (*shape[:dim], 1, *shape[dim:])))
    return _joined(flows, node, inputs, dim)


def pad(flows: Flows, node: fx.Node) -> Flow:
    padded = cast(Sequence[int], node.args[1])
    ndim = len(shape_of(node))
    dims = [ndim - 1 - i // 2 for i, width in enumerate(padded) if width]
    inside, outside = flows.split(flows.get(node.args[0]), dims)
    frozen(flows, node, inside, "pads channels")
    return outside


def along_dims(flows: Flows, node: fx.Node) -> Flow:
    """Softmax and running sums freeze the dimension that they run along, and no other."""
    flow = flows.get(node.args[0])
    dim = cast(int, argument(node, 1, "dim", -1)) % len(shape_of(node))
    inside, outside = flows.split(flow, [dim])
    frozen(flows, node, inside, "runs along the channels")
    return outside


def reduce(flows: Flows, node: fx.Node) -> Flow:
    """Sums, means and extremes freeze what they run over, except for a mean of squares.

    That may run over the channels that are left; over the width of each head, whole heads can go.
    """
    source = _source(node)
    ndim = len(shape_of(source))
    given = argument(node, 1, "dim", None)
    listed = [given] if isinstance(given, int) else list(given or range(ndim))
    dims = [dim % ndim for dim in listed]
    inside, outside = flows.split(flows.get(source), dims)
    if is_mean_of_squares(node) and dims == [ndim - 1]:
        inside, by_head = _contracted(flows, inside, ndim - 1)
        outside += by_head
        for ids in inside:
            flows.units.normalise(ids, f"{where(node)} is a mean over it")
    else:
        frozen(flows, node, inside, "runs over the channels")
    if argument(node, 2, "keepdim", False):
        return outside
    return [np.squeeze(ids, tuple(dims)) for ids in outside]


def extreme(flows: Flows, node: fx.Node) -> Flow:
    """The larger of two, or the largest of one; along a dimension, with the places of these."""
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return pointwise(flows, node)
    flow = reduce(flows, node)
    if isinstance(node.meta["val"], (list, tuple)):
        flows.parts[node.name] = [flow for _ in node.meta["val"]]
    return flow


def is_mean_of_squares(node: fx.Node) -> bool:
    """Whether this is a mean of x ** 2, RMSNorm's statistic, which can run over fewer channels."""
    source = node.args[0] if node.args else None
    return (
        operation(node) == "aten::mean"
        and isinstance(source, fx.Node)
        and operation(source) == "aten::pow"
        and source.args[1] in (2, 2.0)
    )


def matmul(flows: Flows, node: fx.Node) -> Flow:
    """A @ b: what is summed over goes from both operands; other dimensions stay separate."""
    a, b = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    (flow_a, shape_a), (flow_b, shape_b) = flows.shaped(a), flows.shaped(b)
    if min(len(shape_a), len(shape_b)) < 2:
        frozen(flows, node, [*flow_a, *flow_b], "is a product of vectors")
        return []
    inner_a, outer_a = _contracted(flows, flow_a, len(shape_a) - 1)
    inner_b, outer_b = _contracted(flows, flow_b, len(shape_b) - 2)
    _contract(flows, node, (inner_a, inner_b), (a, b))
    rows = (outer_a, (*shape_a[:-1], 1))
    columns = (outer_b, (*shape_b[:-2], 1, shape_b[-1]))
    return flows.merge([rows, columns], node)


def attention(flows: Flows, node: fx.Node) -> Flow:
    """softmax(q k^T) v: heads that meet go together, and q and k share the width of a head."""
    nodes = [cast(fx.Node, argument(node, i, name, None)) for i, name in enumerate(_QKV)]
    (q, shape_q), (k, shape_k), (v, shape_v) = (flows.shaped(n) for n in nodes)
    if node.kwargs.get("enable_gqa", False):
        k, shape_k = _grouped(k, shape_k, shape_q)
        v, shape_v = _grouped(v, shape_v, shape_q)
    last, rows = len(shape_q) - 1, len(shape_q) - 2
    inner_q, outer_q = _contracted(flows, q, last)
    inner_k, outer_k = _contracted(flows, k, last)
    if node.kwargs.get("scale") is None:
        frozen(flows, node, [*inner_q, *inner_k], "divides by the width of a head")
    _contract(flows, node, (inner_q, inner_k), (nodes[0], nodes[1]))
    along_keys, outer_k = flows.split(outer_k, [rows])
    in_rows, outer_v = flows.split(v, [rows])
    frozen(flows, node, [*along_keys, *in_rows], "attends over it")
    inputs = [
        (outer_q, (*shape_q[:-1], 1)),
        (outer_k, (*shape_k[:-2], 1, 1)),
        (outer_v, (*shape_v[:-2], 1, shape_v[-1])),
    ]
    mask = argument(node, 3, "attn_mask", None)
    if isinstance(mask, fx.Node):
        flow, shape = flows.shaped(mask)
        along_keys, flow = flows.split(flow, [len(shape) - 1])
        frozen(flows, node, along_keys, "attends over it")
        inputs.append((flow, (*shape[:-1], 1)))
    return flows.merge(inputs, node)


def _grouped(
    flow: Flow, shape: tuple[int, ...], queries: tuple[int, ...]
) -> tuple[Flow, tuple[int, ...]]:
    """The heads of keys or values, each repeated for the query heads that read it."""
    times = queries[-3] // shape[-3]
    heads = [np.repeat(ids, times, -3) if ids.shape[-3] > 1 else ids for ids in flow]
    return heads, (*shape[:-3], queries[-3], *shape[-2:])


def _contracted(flows: Flows, flow: Flow, dim: int) -> tuple[Flow, Flow]:
    """The arrays along the summed dimension and the others; one that has both is tied along it."""
    for ids in flow:
        if dim in varying(ids) and len(varying(ids)) > 1:
            flows.units.tie_along(ids, [dim])
    return flows.split(flows.units.settle(flow, "a product"), [dim])


def _contract(
    flows: Flows, node: fx.Node, inner: tuple[Flow, Flow], nodes: tuple[fx.Node, fx.Node]
) -> None:
    """Tie what is multiplied and summed; what goes has to be 0 in one operand, here the first."""
    first, second = inner
    if not first or not second:
        frozen(flows, node, [*first, *second], "sums over it with what stays")
        return
    flows.units.tie(*(ids.reshape(-1) for ids in [*first, *second]))
    dim = varying(first[0])[0]
    zero = f"{where(node)} multiplies it"
    flows.readers.append(Reader(nodes[0].name, dim, where(node), zero=zero))


def _joined(
    flows: Flows, node: fx.Node, inputs: Sequence[tuple[Flow, tuple[int, ...]]], dim: int
) -> Flow:
    """The flow of tensors that are concatenated in a dimension; empty ones add nothing."""
    inputs = [(flow, shape) for flow, shape in inputs if 0 not in shape]
    pieces: list[Ids | None] = []
    others = []
    for flow, shape in inputs:
        inside, outside = flows.split(flow, [dim])
        if inside:
            flows.units.tie(*inside)
        pieces.append(inside[0] if inside else None)
        others.append((outside, (*shape[:dim], 1, *shape[dim + 1 :])))
    merged = flows.merge(others, node)
    if all(piece is None for piece in pieces):
        return merged
    ndim = len(inputs[0][1])
    filled = [
        piece if piece is not None else along(fixed_like(flows.units, shape[dim]), ndim, dim)
        for piece, (_, shape) in zip(pieces, inputs, strict=True)
    ]
    common = np.broadcast_shapes(*((*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in filled))
    wide = [np.broadcast_to(p, (*common[:dim], p.shape[dim], *common[dim + 1 :])) for p in filled]
    return [np.concatenate(wide, dim), *merged]


def _cut(ids: Ids, dim: int, part: slice) -> Ids:
    if ids.shape[dim] == 1:
        return ids
    return ids[(slice(None),) * (dim % ids.ndim) + (part,)]


def _source(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])


_SLICE = ("start", "end", "step")
_QKV = ("query", "key", "value")

_SAME = (
    "clone contiguous detach alias dropout feature_dropout alpha_dropout feature_alpha_dropout "
    "to type_as _to_copy lift_fresh_copy _assert_tensor_metadata"
)
_VIEWS = "view reshape _unsafe_view flatten unflatten squeeze unsqueeze"
_MOVES = "mT mH adjoint movedim moveaxis swapaxes swapdims roll rot90 tile narrow pixel_shuffle"
_REDUCE = "mean sum amax amin var std logsumexp any all"

_NAMED: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(_VIEWS.split(), view),
    **dict.fromkeys(_MOVES.split(), moved),
    **dict.fromkeys(_REDUCE.split(), reduce),
    **dict.fromkeys(("max", "min"), extreme),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum"), along_dims),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), split),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    # Pointwise, although torch does not tag them so.
    **dict.fromkeys(("hardswish", "log_sigmoid"), pointwise),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "masked_fill", "where"), pointwise),
    **{"permute": permute, "transpose": transpose, "t": transpose, "expand": expand},
    **{"repeat": repeat, "repeat_interleave": repeat_interleave, "flip": flip},
    **{"select": select, "slice": slice_, "cat": cat, "stack": stack, "pad": pad},
    **{"constant_pad_nd": pad, "scaled_dot_product_attention": attention},
}
RULES: dict[str, Rule] = {f"aten::{name}": rule for name, rule in _NAMED.items()}
