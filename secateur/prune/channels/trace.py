"""A model as a graph of operations on tensors whose shapes are known, by `torch.export`."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.model.blocks import Batch
from secateur.model.outputs import eval_mode


@dataclass(frozen=True)
class Trace:
    """The operations of a model in eval mode on one batch.

    `states` maps a placeholder of the graph to the first name of the parameter or buffer that it
    stands for, `given` every other placeholder to its value: example inputs and constants.
    """

    graph: fx.GraphModule
    states: Mapping[str, str]
    given: Mapping[str, Any]

    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.graph.nodes)

    def arguments(self, values: Mapping[str, Tensor]) -> list[Any]:
        """The arguments of the graph, with the parameters and buffers taken from `values`."""
        placeholders = [node.name for node in self.nodes() if node.op == "placeholder"]
        return [
            values[self.states[name]] if name in self.states else self.given[name]
            for name in placeholders
        ]


def trace(model: nn.Module, batch: Batch) -> Trace:
    """The graph of the model on a batch: a tensor, or positional or keyword arguments.

    Raises:
        ValueError: if the model cannot run the batch, or torch cannot export it.
    """
    args, kwargs = _call(batch)
    try:
        with eval_mode(model), torch.no_grad(), warnings.catch_warnings(), unlogged():
            # The layers of torch set attributes while they are exported.
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, kwargs, strict=False)
            if any(_is_opaque(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions(_parts())  # most of the time it takes
            if (node := next(filter(_is_sized_by_values, exported.graph.nodes), None)) is not None:
                raise ValueError(f"the size of what {where(node)} returns depends on values")
    except Exception as error:
        raise ValueError(
            f"removing channels needs the graph of {type(model).__name__}, torch.export cannot "
            f"make it: {error}: give example_inputs that the model takes, and write its forward "
            "without branches on values"
        ) from error
    names = first_names(model)
    states, given = {}, dict[str, Any]()
    inputs = iter(pytree.tree_leaves(exported.example_inputs))
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            given[name] = next(inputs)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            states[name] = names[spec.target]
        else:
            given[name] = exported.constants[str(spec.target)]
    return Trace(exported.graph_module, states, given)


def first_names(model: nn.Module) -> dict[str, str]:
    """The name of each parameter or buffer -> the first name that the same tensor has."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in named_states(model):
        names[name] = first.setdefault(id(tensor), name)
    return names


def named_states(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def layer_of(node: fx.Node) -> str:
    """The name of the module whose forward has this operation; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def where(node: fx.Node) -> str:
    """The operation and the layer, for messages."""
    return f"{node.target} of {layer_of(node) or 'the model itself'}"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the one tensor that an operation returned."""
    return tuple(int(size) for size in node.meta["val"].shape)


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Silence torch, which logs every failure even if it is caught."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _parts() -> dict[Any, Any]:
    """What torch has to decompose besides operations that change their arguments."""
    einsum = torch.ops.aten.einsum.default
    return {einsum: torch.export.default_decompositions()[einsum]}


def _is_opaque(node: fx.Node) -> bool:
    """Whether an operation changes its arguments, or hides its products in a string."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (bool(schema.is_mutable) or schema.name == "aten::einsum")


def _is_sized_by_values(node: fx.Node) -> bool:
    """Whether an operation's result has a size that only running it tells."""
    tensors = pytree.tree_leaves(node.meta.get("val"))
    return any(
        not isinstance(size, int) for x in tensors if isinstance(x, Tensor) for size in x.shape
    )


def _call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}
