"""What the preparation of a structured pruner finds out: which tensors, and whether they can."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur.compat.torchao.fake_sparsity import unmasked
from secateur.compat.torchao.groups import Group
from secateur.compat.torchao.structured.mask import Masked
from secateur.prune.channels.channels import Channels, Removed


def layer_config(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[dict[str, Any]]:
    """The weights of all layers of these types; of a recurrent layer those that make its units."""
    return [
        {"tensor_fqn": f"{path}.{name}".removeprefix(".")}
        for path, module in model.named_modules()
        if isinstance(module, types)
        for name in module._parameters
        if name == "weight" or (isinstance(module, nn.RNNBase) and name.startswith("weight_hh"))
    ]


def possible(
    model: nn.Module,
    channels: Channels,
    listed: Sequence[Mapping[str, Any]],
    left: dict[str, str],
) -> list[Mapping[str, Any]]:
    """Those whose channels can go so that outputs are all that changes; `left` has the others.

    Raises:
        ValueError: if there is none.
    """
    config, outputs = list[Mapping[str, Any]](), []
    for element in listed:
        fqn = element["tensor_fqn"]
        module = model.get_submodule(fqn.rpartition(".")[0])
        dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
        reason = channels.why_not(fqn, dim) or channels.why_changed(fqn, dim)
        if reason is None:
            config.append(element)
            outputs += [fqn] if channels.is_output(fqn, dim) else []
        else:
            left[fqn] = reason
    if outputs:
        warnings.warn(
            f"prepare without a config takes {', '.join(outputs)}, too, whose channels are outputs "
            f"of the {type(model).__name__}: name the other layers in a config to keep them all",
            UserWarning,
            stacklevel=3,
        )
    if not config:
        first = next(iter(left.items()), None)
        because = f": {first[0]}: {first[1]}" if first else ""
        raise ValueError(
            f"prepare found no channels in {type(model).__name__} that can be removed{because}"
        )
    return config


def channel_dim(channels: Channels, group: Group) -> int:
    """The dimension of a tensor that has the channels that it makes.

    Not the first in embeddings, transposed convolutions, and GPT-2's Conv1D, whose first dimension
    has the inputs.
    """
    if isinstance(group["module"], nn.Embedding):
        return 1
    return 1 if (group["tensor_fqn"], 0) in channels.inputs else 0


def key_of(group: Group, dims: Mapping[str, int]) -> tuple[str, int]:
    return group["tensor_fqn"], dims[group["tensor_fqn"]]


def require_channels(channels: Channels, group: Group, dim: int) -> None:
    name = group["tensor_fqn"]
    if (name, dim) in channels.inputs:
        raise ValueError(
            f"{name} cannot be pruned: others make the channels that it has: name one of them"
        )
    if (name, dim) not in channels.states:
        raise ValueError(
            f"{name} cannot be pruned: {channels.why_not(name, dim)}: leave it out of the config, "
            "which is what config=None does"
        )


def apart(
    channels: Channels, groups: Sequence[Group], dims: Mapping[str, int]
) -> tuple[Channels, dict[int, str]]:
    """The channels with units of their own for tensors that must keep theirs, and these with why.

    Such a tensor is masked by itself, with its bias, and stays. What goes together with a part of
    its channels stays, too.
    """
    frozen, stuck = dict(channels.frozen), dict[str, str]()
    while found := {
        name: reason
        for name in dims
        if name not in stuck
        and (reason := replace(channels, frozen=frozen).why_not(name, dims[name]))
    }:
        stuck |= found
        for name, reason in found.items():
            frozen |= dict.fromkeys(channels.states[name, dims[name]].tolist(), reason)
    states, count, held = dict(channels.states), channels.count, dict[int, str]()
    for group in groups:
        if reason := stuck.get(group["tensor_fqn"]):
            key = key_of(group, dims)
            own = np.arange(count, count + len(states[key]))
            bias = (f"{group['module_fqn']}.bias".removeprefix("."), 0)
            if group["tensor_name"] == "weight" and len(states.get(bias, ())) == len(own):
                states[bias] = own
            states[key] = own
            count += len(own)
            held |= dict.fromkeys(own.tolist(), reason)
    return replace(channels, count=count, states=states, frozen=frozen), held


def masked_with(
    model: nn.Module, channels: Channels, groups: Sequence[Group], dims: Mapping[str, int]
) -> list[Masked]:
    """The parameters to be masked: those of the config first, then what goes with them."""
    masked = [Masked(*key_of(g, dims), g["module"], g["tensor_name"]) for g in groups]
    biases: dict[int, Group] = {}
    for group in groups:
        for unit in channels.states[key_of(group, dims)].tolist():
            other = biases.setdefault(unit, group)
            if other["prune_bias"] != group["prune_bias"]:
                raise ValueError(
                    f"{group['tensor_fqn']} needs the prune_bias of {other['tensor_fqn']}, with "
                    f"which its channels go together: {other['prune_bias']}"
                )
    named = {(each.name, each.dim) for each in masked}
    for group in groups:
        for name, dim in channels.made_with(channels.states[key_of(group, dims)]):
            path, _, tensor_name = name.rpartition(".")
            module = model.get_submodule(path) if path else model
            tensor = module._parameters.get(tensor_name)
            if tensor is None or (name, dim) in named:
                continue
            if tensor.dim() == 1 and not group["prune_bias"]:
                continue
            if any(name == other for other, _ in named):
                raise ValueError(
                    f"{name} cannot be masked in two of its dimensions: leave out "
                    f"{group['tensor_fqn']}"
                )
            named.add((name, dim))
            masked.append(Masked(name, dim, module, tensor_name))
    return masked


def all_but_one(channels: Channels, groups: Sequence[Group], dims: Mapping[str, int]) -> Removed:
    """The units that could go at the highest level."""
    removed = np.zeros(channels.count, dtype=bool)
    for group in groups:
        units = channels.states[key_of(group, dims)]
        removed[units] = True
    for units in channels.states.values():
        if removed[units].all():
            removed[units.min()] = False
    return removed


def masked_values(
    model: nn.Module, masked: Sequence[Masked], channels: Channels, removed: Removed
) -> dict[str, Tensor]:
    """Parameters and buffers by name as the masked model has them."""
    held = {each.name: each.dim for each in masked}
    values = {}
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        if hasattr(module, "parametrizations"):
            parametrized = cast(nn.ModuleDict, module.parametrizations)
            own |= {name: unmasked(module, name) for name in parametrized}
        for tensor_name, tensor in own.items():
            name = f"{path}.{tensor_name}".removeprefix(".")
            if tensor is not None and name in held:
                units = channels.states[name, held[name]]
                gone = torch.from_numpy(np.flatnonzero(removed[units])).to(tensor.device)
                tensor = tensor.index_fill(held[name], gone, 0)
            if tensor is not None:
                values[name] = tensor.detach()
    return values
