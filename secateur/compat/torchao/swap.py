"""Replacing prepared modules by another library's, which read their masked weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

# What hooks a module carries, under the names that torch gives them.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def module_contains_param(module: nn.Module, parametrization: type[nn.Module]) -> bool:
    """Whether a tensor of this module itself has a parametrization of that class."""
    if not parametrize.is_parametrized(module):
        return False
    parametrized = module.get_submodule("parametrizations")
    return any(
        isinstance(p, parametrization)
        for chain in parametrized.children()
        for p in chain.children()
    )


def swap_module(mod: nn.Module, mapping: Mapping[type[nn.Module], Any]) -> nn.Module:
    """`mapping[T].from_dense(mod)` for a module of type T, on its device and with its hooks.

    T is its type without parametrizations; a module of any other type is returned unchanged.

    Raises:
        ValueError: if the module's tensors lie on several devices.
    """
    target = mapping.get(parametrize.type_before_parametrizations(mod))
    if target is None:
        return mod
    devices = {tensor.device for tensor in (*mod.parameters(), *mod.buffers())}
    if len(devices) > 1:
        raise ValueError(
            f"swap_module needs a module on one device, this {type(mod).__name__} is on "
            f"{', '.join(sorted(map(str, devices)))}: move it to one"
        )
    new: nn.Module = target.from_dense(mod)
    for name in HOOKS:
        vars(new)[name].update(vars(mod)[name])
    for device in devices:
        new.to(device)
    return new


def swap_prepared(
    model: nn.Module, mapping: Mapping[type[nn.Module], Any], parametrization: type[nn.Module]
) -> nn.Module:
    """The model with its prepared leaf modules swapped; one used twice stays one."""
    swapped: dict[nn.Module, nn.Module] = {
        module: swap_module(module, mapping)
        for module in model.modules()
        if module_contains_param(module, parametrization) and _is_leaf(module)
    }
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children has a shared one only once
            if child in swapped:
                setattr(parent, name, swapped[child])
    return swapped.get(model, model)


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" for name, _ in module.named_children())


def require_mapping(mapping: Mapping[type[nn.Module], Any] | None) -> Mapping[type[nn.Module], Any]:
    """Raise unless every target in the mapping can be made from a dense module."""
    if not mapping:
        raise ValueError(
            "convert needs a mapping of module types to classes with from_dense, got none: write "
            "{nn.Linear: SparseLinear}, or leave out convert and pass the squashed model to "
            "secateur.accelerate_"
        )
    for source, target in mapping.items():
        if not callable(getattr(target, "from_dense", None)):
            raise ValueError(
                f"convert needs classes with from_dense, {target!r} for {source.__name__} has "
                "none: give it a class method from_dense(module)"
            )
    return mapping
