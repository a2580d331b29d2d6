"""Removing channels: slices of parameters, and sizes of modules."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from secateur.model.blocks import Batch
from secateur.prune.channels.channels import Channels, Followed, Removed
from secateur.prune.channels.flow import operation
from secateur.prune.channels.proof import SIZED, expected, misfit
from secateur.prune.channels.trace import (
    first_names,
    layer_of,
    named_states,
    shape_of,
)


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model's modules and tensors are put back if the block raises."""
    tensors = [(tensor, tensor.data) for _, tensor in named_states(model)]
    put_back = remembered(model)
    try:
        yield
    except BaseException:
        put_back()
        for tensor, data in tensors:
            tensor.data = data
        raise


def remembered(model: nn.Module) -> Callable[[], None]:
    """A function that puts the model's modules back, with the attributes that they have now."""
    modules = [
        (module, type(module), _properties(type(module)), _shallow(module))
        for module in model.modules()
    ]

    def put_back() -> None:
        for module, kind, properties, attributes in modules:
            module.__class__ = kind
            for name, value in properties.items():
                if name not in vars(kind):
                    setattr(kind, name, value)
            vars(module).clear()
            vars(module).update(attributes)

    return put_back


def shrink_(
    model: nn.Module,
    followed: Followed,
    removed: Removed,
    constants: Mapping[str, Tensor],
    batch: Batch,
) -> None:
    """Remove the units from a plain model, adding `constants` to the biases of that name.

    The parameters stay the same objects. The model is exported again, and each operation must have
    the result that follows from the units: what the sizes in a module's attributes cannot express
    is an error and no other function.

    Raises:
        ValueError: if the smaller model cannot run, or computes something else. It has been changed
            then: call it in `as_it_was`.
    """
    sizes = {id(module): _sizes(module) for module in model.modules()}
    _slice(model, followed.channels, removed, constants)
    for module in model.modules():
        _resize(module, *sizes[id(module)])
    _resize_norms(model, followed, removed)
    if misfit(model, followed, removed, batch) is not None:
        _set_sizes(model, followed, removed)
        if wrong := misfit(model, followed, removed, batch):
            raise ValueError(wrong)


# --- parameters ----------------------------------------------------------------------------------


def _slice(
    model: nn.Module, channels: Channels, removed: Removed, constants: Mapping[str, Tensor]
) -> None:
    names = first_names(model)
    for name, tensor in named_states(model):
        if names[name] != name:
            continue
        data = tensor.data
        if name in constants:
            data = data + constants[name].to(data)
        for dim in range(tensor.dim()):
            if (name, dim) in channels.states and removed[channels.states[name, dim]].any():
                kept = torch.from_numpy(channels.kept(name, dim, removed)).to(data.device)
                data = data.index_select(dim, kept)
        if data is not tensor.data:
            tensor.data = data
            tensor.grad = None


# --- sizes ---------------------------------------------------------------------------------------


def _sizes(module: nn.Module) -> tuple[int, int]:
    """What `_resize` must know of before: groups of a layer, and its channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups, module.out_channels
    return 1, 1


def _resize(module: nn.Module, groups: int, channels: int) -> None:
    """Make the sizes that a layer of torch knows of itself those of its parameters."""
    own = module._parameters.get("weight")
    shape = tuple(own.shape) if own is not None else ()
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = shape[0], shape[1] * groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        if groups > 1:
            module.groups = groups * shape[0] // channels
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        mean = module.running_mean
        module.num_features = len(mean) if mean is not None else (*shape, module.num_features)[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.RNNBase):
        module.input_size = cast(Tensor, module.weight_ih_l0).shape[1]
        module.hidden_size = cast(Tensor, module.weight_hh_l0).shape[1]


def _resize_norms(model: nn.Module, followed: Followed, removed: Removed) -> None:
    """Norms, which need not have parameters, by what they normalise."""
    for node in followed.trace.nodes():
        module = _module(model, layer_of(node))
        if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
            continue
        sizes = expected(shape_of(node), followed.flows[node.name], removed)
        if not isinstance(module, nn.GroupNorm):
            module.normalized_shape = sizes[len(sizes) - len(module.normalized_shape) :]
        else:
            channels = shape_of(node)[1]
            module.num_channels = sizes[1]
            module.num_groups = cast(int, node.args[1]) * sizes[1] // channels


def _set_sizes(model: nn.Module, followed: Followed, removed: Removed) -> None:
    """Numbers in the attributes of other modules, such as `num_heads` for a view.

    An attribute of the module that makes a view is changed if it is the size of a dimension that
    shrinks, and no other of the view's. `misfit` finds it if that was wrong.
    """
    wanted: dict[tuple[str, str], set[int]] = {}
    for node in followed.trace.nodes():
        if node.op != "call_function" or operation(node) not in SIZED:
            continue
        path = layer_of(node)
        changed, same = _size_changes(followed, removed, node)
        for name, value in vars(_module(model, path)).items():
            if type(value) is int and value in changed:
                counts_heads = "head" in name and not {"dim", "size"} & set(name.split("_"))
                if value not in same or counts_heads:
                    wanted.setdefault((path, name), set()).add(changed[value])
    for (path, name), values in wanted.items():
        module = _module(model, path)
        if len(values) == 1 and type(module).__module__.partition(".")[0] != "torch":
            vars(module)[name] = values.pop()


def _size_changes(
    followed: Followed, removed: Removed, node: fx.Node
) -> tuple[dict[int, int], set[int]]:
    """Size before -> after of the dimensions that shrink in a view, and the sizes of others."""
    changed: dict[int, int] = {}
    same = set()
    for tensor in (node, *node.all_input_nodes):
        if isinstance(tensor.meta["val"], Tensor):
            before = shape_of(tensor)
            after = expected(before, followed.flows[tensor.name], removed)
            for old, new in zip(before, after, strict=True):
                if old == new:
                    same.add(old)
                else:
                    changed[old] = new
    return changed, same


def _module(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def _properties(kind: type[nn.Module]) -> dict[str, property]:
    """Of a parametrized module's class, which is its own: torch takes them away with the masks."""
    return {name: value for name, value in vars(kind).items() if isinstance(value, property)}


def _shallow(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, with copies of the dicts that hold its tensors and modules."""
    return {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
