"""What preparing a structured pruner finds out: which tensors to mask, and whether it can."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from secateur.compat.torchao.groups import Group
from secateur.compat.torchao.structured.mask import Masked
from secateur.prune.channels import Channels


def layer_config(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[dict[str, Any]]:
    """The weights of all layers of these types; in recurrent layers those that make their units."""
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
    """The tensors that can lose channels without any change but fewer outputs of the model.

    The others are added to `left`, each with the reason.

    Raises:
        ValueError: if there is no such tensor.
    """
    config, outputs = list[Mapping[str, Any]](), []
    for element in listed:
        fqn = element["tensor_fqn"]
        dim = channels.dim_of(fqn)
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


def require_channels(channels: Channels, name: str) -> None:
    """Raise unless a tensor makes channels of its own."""
    key = name, channels.dim_of(name)
    if key in channels.inputs:
        raise ValueError(
            f"{name} cannot be pruned: others make the channels that it has: name one of them"
        )
    if key not in channels.states:
        raise ValueError(
            f"{name} cannot be pruned: {channels.why_not(*key)}: leave it out of the config, "
            "which is what config=None does"
        )


def masked_with(model: nn.Module, channels: Channels, groups: Sequence[Group]) -> list[Masked]:
    """The parameters to mask: those of the config first, then what goes with them."""
    names = [group["tensor_fqn"] for group in groups]
    masked = [
        Masked(name, channels.dim_of(name), group["module"], group["tensor_name"])
        for name, group in zip(names, groups, strict=True)
    ]
    biases: dict[int, Group] = {}
    for name, group in zip(names, groups, strict=True):
        for unit in channels.units(name).tolist():
            other = biases.setdefault(unit, group)
            if other["prune_bias"] != group["prune_bias"]:
                raise ValueError(
                    f"{name} needs the prune_bias of {other['tensor_fqn']}, with "
                    f"which its channels go together: {other['prune_bias']}"
                )
    named = {each.name: each.dim for each in masked}
    for group, own in zip(groups, names, strict=True):
        for name, dim in channels.made_with(channels.units(own)):
            path, _, tensor_name = name.rpartition(".")
            module = model.get_submodule(path) if path else model
            tensor = module._parameters.get(tensor_name)
            if tensor is None or named.get(name) == dim:
                continue
            if tensor.dim() == 1 and not group["prune_bias"]:
                continue
            if name in named:
                raise ValueError(
                    f"{name} cannot be masked in two of its dimensions: leave out {own}"
                )
            named[name] = dim
            masked.append(Masked(name, dim, module, tensor_name))
    return masked
