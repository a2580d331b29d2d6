"""Removing channels: smaller parameters, and the sizes that modules hold as numbers."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from secateur.prune.channels.channels import Channels, Followed, Removed
from secateur.prune.channels.constants import removable, zeroed
from secateur.prune.channels.flow import operation
from secateur.prune.channels.proof import SIZED, expected, misfit
from secateur.prune.channels.restore import as_it_was
from secateur.prune.channels.trace import (
    first_names,
    layer_of,
    named_states,
    shape_of,
)


def remove_(model: nn.Module, followed: Followed, removed: Removed) -> dict[int, str]:
    """Remove units whose channels are zero, and say which of them stay, each with the reason.

    The model computes what it did, up to rounding, except that norms over removed channels run over
    the channels that are left. What a removed channel is nevertheless, because of a bias or of an
    activation, is a constant and goes into the biases of the layers that read it; where a layer has
    none, the channel stays. Parameters remain the same objects.

    The smaller model is exported again, and each of its operations must have the result that
    follows from the units. A size that no attribute of a module expresses is an error, never
    another function.

    Cost: an export of the model and a run, more of both if some units stay.

    Raises:
        ValueError: if the smaller model cannot run, or would compute something else. Nothing has
            changed then.
    """
    values = zeroed(model, followed.channels, (), removed)
    going, constants, held = removable(followed, values, removed)
    if going[: followed.channels.count].any():
        with as_it_was(model):
            _shrink(model, followed, going, constants)
    return held


def _shrink(
    model: nn.Module, followed: Followed, removed: Removed, constants: Mapping[str, Tensor]
) -> None:
    sizes = {id(module): _sizes(module) for module in model.modules()}
    _slice(model, followed.channels, removed, constants)
    for module in model.modules():
        _resize(module, *sizes[id(module)])
    _resize_norms(model, followed, removed)
    if misfit(model, followed, removed) is not None:
        _set_sizes(model, followed, removed)
        if wrong := misfit(model, followed, removed):
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
    """What `_resize` has to know from before: the groups of a layer and its channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups, module.out_channels
    return 1, 1


def _resize(module: nn.Module, groups: int, channels: int) -> None:
    """Set the sizes that a layer of torch keeps as numbers to those of its parameters."""
    own = module._parameters.get("weight")
    shape = tuple(own.shape) if own is not None else ()
    if not shape and "parametrizations" in module._modules:
        return  # its weight is computed, and channels that such a weight has stay
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
    """Set the sizes of norms, which need no parameters, from what they normalise."""
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
    """Set numbers in the attributes of other modules, such as the `num_heads` that a view uses.

    An attribute of a module that makes a view is changed if it equals the size of a dimension that
    shrinks and of no other dimension of the view. `misfit` notices if that was wrong.
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
    """Size before -> size after for dimensions of a view that shrink; the sizes of the others."""
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
