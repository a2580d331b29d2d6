"""Configurations of sparsifiers: a list of dicts that name tensors becomes a list of groups.

A group holds the arguments of `update_mask`: the sparsifier's defaults, the settings in the dict,
and the place of the tensor (`module`, `module_fqn`, `tensor_name`, `tensor_fqn`).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.compat.torchao.fake_sparsity import FakeSparsity, as_mask, attach, detach, has_mask
from secateur.compat.torchao.names import closest, get_arg_info_from_tensor_fqn, in_short
from secateur.model.layers import why_not_prunable

Group = dict[str, Any]

# Keys of a group that belong to one model in one process and are not saved.
LOCAL = ("module", "module_fqn", "tensor_name", "parametrization")


def make_groups(
    model: nn.Module, config: Sequence[Mapping[str, Any]] | None, defaults: Mapping[str, Any]
) -> list[Group]:
    """A group for each element of the config.

    Raises:
        ValueError: naming the element, if it is no dict with `tensor_fqn`, names no parameter of
            the model (with the closest names), contradicts itself, or its tensor is tied,
            parametrized already or named twice.
    """
    holders = _holders(model)
    if (
        isinstance(config, (str, Mapping))
        or not isinstance(config, Iterable)
        or not all(isinstance(e, Mapping) for e in config)
    ):
        raise ValueError(
            f"prepare needs a config that is a list of dicts, got {in_short(config)}: write "
            "[{'tensor_fqn': 'layer.weight'}, ...]"
        )
    if not config:
        raise ValueError(
            f"prepare needs a tensor to prune, found none in {type(model).__name__}: name tensors "
            "in the config; without one it takes linear layers whose weights are plain parameters"
        )
    groups = [_group(model, element, defaults) for element in config]
    for index, group in enumerate(groups):
        fqn = group["tensor_fqn"]
        if any(g["module"] is group["module"] and g["tensor_name"] == group["tensor_name"]
               for g in groups[:index]):  # fmt: skip
            raise ValueError(f"prepare needs each tensor once, {fqn} is named twice: merge the two")
        holding = holders[id(group["module"]._parameters[group["tensor_name"]])]
        if len(holding) > 1:
            raise ValueError(
                f"{fqn} cannot be prepared: it is tied to "
                f"{next(name for name in holding if name != fqn)}, which would lose the same "
                "weights: untie them first"
            )
    return groups


def layer_weights(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[Group]:
    """The config for all layers of these types whose weight is a plain parameter, not tied."""
    holders = _holders(model)
    return [
        {"tensor_fqn": f"{name}.weight".removeprefix(".")}
        for name, module in model.named_modules()
        if isinstance(module, types)
        and why_not_prunable(module) is None
        and len(holders.get(id(module._parameters.get("weight")), ())) == 1
    ]


def require_model(verb: str, model: nn.Module) -> None:
    """Raise unless this is a module; a class is not."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{verb} needs a model, an nn.Module, got {in_short(model)}")


def attach_masks(groups: Sequence[Group]) -> None:
    """Parametrize every group's tensor with ones, or with the mask in its group."""
    done: list[Group] = []
    try:
        for group in groups:
            tensor = group["module"]._parameters[group["tensor_name"]].detach()
            given = group.pop("mask", None)
            mask = torch.ones_like(tensor)
            if given is not None:
                mask = as_mask(given, tensor, group["tensor_fqn"])
            attached = group.get("parametrization", FakeSparsity)(mask)
            if not isinstance(getattr(attached, "mask", None), Tensor):
                raise ValueError(
                    f"prepare needs a parametrization with a mask, {type(attached).__name__} of "
                    f"{group['tensor_fqn']} has none: keep the one it is made with as `mask`"
                )
            attach(group["module"], group["tensor_name"], attached)
            done.append(group)
    except BaseException:
        detach_masks(done, squash=False)
        raise


def detach_masks(groups: Sequence[Group], *, squash: bool) -> None:
    """Make every group's tensor a plain parameter, with or without its zeros."""
    for group in reversed(groups):
        detach(group["module"], group["tensor_name"], squash=squash)


def locate(model: nn.Module, tensor_fqn: str, what: str) -> Group:
    """The place of a parameter in the model, prepared or not.

    Raises:
        ValueError: with the closest names, if there is no such parameter.
    """
    found = get_arg_info_from_tensor_fqn(model, tensor_fqn)
    module, tensor_name = found["module"], found["tensor_name"]
    if module is not None and (
        module._parameters.get(tensor_name) is not None
        or parametrize.is_parametrized(module, tensor_name)
    ):
        return found
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    raise ValueError(
        f"{what} needs parameters of the model, {type(model).__name__} has no "
        f"{found['tensor_fqn']!r}: closest are {closest(found['tensor_fqn'], names)}"
    )


def settings_to_keep(
    groups: Sequence[Group], everywhere: Sequence[str], per_layer: Mapping[str, Sequence[str]]
) -> dict[nn.Module, dict[str, Any]]:
    """Module -> the settings that it keeps when masks are squashed.

    Raises:
        ValueError: if a setting or module is unknown, with the closest names, or if two tensors of
            a module have different values.
    """
    names = {group["module_fqn"] for group in groups}
    for layer in per_layer:
        if layer not in names:
            raise ValueError(
                f"params_to_keep_per_layer needs modules that were prepared, {layer!r} was not: "
                f"closest are {closest(layer, names)}"
            )
    kept: dict[nn.Module, dict[str, Any]] = {}
    for group in groups:
        for key in (*everywhere, *per_layer.get(group["module_fqn"], ())):
            if key not in group:
                raise ValueError(
                    f"squash_mask can keep what {group['tensor_fqn']} has, which is not {key!r}: "
                    f"closest are {closest(key, group)}"
                )
            parameters = kept.setdefault(group["module"], {})
            if parameters.setdefault(key, group[key]) != group[key]:
                raise ValueError(
                    f"{group['module_fqn']} has one sparse_params, but its tensors have {key} "
                    f"{parameters[key]!r} and {group[key]!r}: keep it of one of them"
                )
    return kept


def require_usable(group: Group) -> None:
    """Raise if a parametrization other than a mask computes the tensor."""
    module, tensor_name = group["module"], group["tensor_name"]
    if parametrize.is_parametrized(module, tensor_name) and not has_mask(module, tensor_name):
        raise ValueError(
            f"masks need plain parameters, {group['tensor_fqn']} is computed by a parametrization: "
            "remove it (torch.nn.utils.parametrize.remove_parametrizations), or add it after "
            "prepare"
        )


def _group(model: nn.Module, element: Mapping[str, Any], defaults: Mapping[str, Any]) -> Group:
    if not isinstance(fqn := element.get("tensor_fqn"), str):
        raise ValueError(
            f"prepare needs dicts with 'tensor_fqn', got {dict(element)!r}: write "
            "{'tensor_fqn': 'layer.weight'}"
        )
    found = locate(model, fqn, "prepare")
    for key in ("module", "module_fqn", "tensor_name"):
        if key in element and element[key] != found[key]:
            raise ValueError(
                f"prepare needs one tensor in each dict, {fqn} has the {key} {found[key]!r} and "
                f"not {element[key]!r}: leave out {key!r}"
            )
    require_usable(found)
    if has_mask(found["module"], found["tensor_name"]):
        raise ValueError(f"{fqn} has a mask of another sparsifier already: squash_mask that first")
    return {**copy.deepcopy(dict(defaults)), **element, **found}


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The id of each parameter -> its names; a module that is used twice counts once."""
    holders: dict[int, list[str]] = {}
    for module_fqn, module in model.named_modules():
        for tensor_name, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_fqn}.{tensor_name}".removeprefix(".")
                holders.setdefault(id(parameter), []).append(name)
    return holders
