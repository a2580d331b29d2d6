"""The proof that a smaller model computes what the larger one did, on the channels that are left.

Both are graphs of operations: they must be the same operations on the same arguments, with results
of the expected shapes, and the same channels must meet in them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from secateur.prune.channels.channels import Followed, Removed
from secateur.prune.channels.flow import Flows, operation, run
from secateur.prune.channels.layers import LAYERS
from secateur.prune.channels.rules import RULES
from secateur.prune.channels.trace import Trace, shape_of, trace, where
from secateur.prune.channels.units import Flow, Units, along, varying

# Operations with sizes among their arguments; the shapes of their results are compared instead.
SIZED = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view unflatten flatten expand slice split split_with_sizes chunk "
        "zeros layer_norm rms_norm group_norm select"
    ).split()
)


def misfit(model: nn.Module, followed: Followed, removed: Removed) -> str | None:
    """What is different in the smaller model, or None if every operation is what it was."""
    try:
        after = trace(model, followed.batch)
    except ValueError as error:
        return (
            f"the pruned {type(model).__name__} does not run: {error.__cause__}: read sizes from "
            "shapes or from the module's attributes in the forward, or leave out the layers before "
            "it"
        )
    old, places = _steps(followed.trace)
    new, more = _steps(after)
    if len(old) != len(new):
        return (
            f"the pruned model runs {len(new)} operations, before it ran {len(old)}: its forward "
            "depends on a number of channels, so leave out the layers that have it"
        )
    place = places | more
    for before, now in zip(old, new, strict=True):
        if wrong := _difference(followed, removed, before, now, place):
            wrong = f"{where(before)}: {wrong}"
            break
    else:
        wrong = _disorder(followed, removed, after)
    if wrong is None:
        return None
    return (
        f"the pruned {type(model).__name__} would compute something else: {wrong}: read sizes from "
        "shapes or from the module's attributes in the forward, or leave out the layers before it"
    )


def _steps(traced: Trace) -> tuple[list[fx.Node], dict[fx.Node, int]]:
    """The operations but for copies, and the place of each node; a copy is where its source is.

    Whether a tensor is copied before it is viewed depends on its strides, which sizes decide.
    """
    steps, place = list[fx.Node](), dict[fx.Node, int]()
    for node in traced.nodes():
        if operation(node) == "aten::clone":
            place[node] = place[node.all_input_nodes[0]]
        else:
            place[node] = len(steps)
            steps.append(node)
    return steps, place


def _disorder(followed: Followed, removed: Removed, after: Trace) -> str | None:
    """Where other channels meet than before or in another order, or None.

    The units are followed through the smaller model as well: a slice or a shift that takes other
    channels than it took before would tie units that were not tied.
    """
    units = Units()
    units.new(followed.channels.count - 1)
    states: dict[str, Flow] = {name: [] for name in after.states.values()}
    ndims = {
        after.states[n.name]: len(shape_of(n)) for n in after.nodes() if n.name in after.states
    }
    for (name, dim), ids in followed.channels.states.items():
        left = ids[~removed[ids]]
        if len(left) > 1:
            states[name].append(along(left, ndims[name], dim))
    flows = Flows(units, states, names=after.states)
    for node in after.nodes():
        run(flows, iter([node]), {**RULES, **LAYERS})
        if units.ties:
            return f"{where(node)} brings other channels together"
    return None


def _difference(
    followed: Followed,
    removed: Removed,
    before: fx.Node,
    now: fx.Node,
    place: Mapping[fx.Node, int],
) -> str | None:
    renamed = before.op != "placeholder" and _name(before) != _name(now)
    if before.op != now.op or renamed:
        return f"it became {now.target}"
    sized = before.op == "call_function" and operation(before) in SIZED
    if before.op == "call_function" and _arguments(before, place, sized) != _arguments(
        now, place, sized
    ):
        return f"its arguments became {now.args}"
    if isinstance(before.meta.get("val"), Tensor) and before.meta["val"].numel():
        shape = expected(shape_of(before), followed.flows[before.name], removed)
        if shape_of(now) != shape:
            return f"its result has the shape {shape_of(now)}, not {shape}"
    return None


def _name(node: fx.Node) -> str:
    """What the operation is called; a view after a copy, and one without, are the same."""
    return str(node.target).replace("_unsafe_view", "view")


def _arguments(node: fx.Node, place: Mapping[fx.Node, int], sized: bool) -> list[Any]:
    """The arguments, nodes replaced by their position, without integers if these are sizes."""
    flat: list[Any] = []
    args = list(node.args)
    if node.op == "call_function" and operation(node).startswith("aten::conv"):
        del args[6:7]  # the groups of a depthwise convolution

    def add(value: Any) -> None:
        if isinstance(value, fx.Node):
            flat.append(("node", place[value]))
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        elif not (sized and type(value) is int):
            flat.append(str(value))

    add([*args, *node.kwargs.values()])
    return flat


def expected(shape: tuple[int, ...], flow: Flow, removed: Removed) -> tuple[int, ...]:
    """The shape that is left of this one."""
    sizes = list(shape)
    for ids in flow:
        (dim,) = varying(ids)
        sizes[dim] = int((~removed[ids]).sum())
    return tuple(sizes)
