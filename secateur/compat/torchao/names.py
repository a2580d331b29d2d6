"""Fully qualified names (FQNs) of modules and tensors, in both directions."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def module_to_fqn(model: nn.Module, module: nn.Module, prefix: str = "") -> str | None:
    """The name of a module of the model, after the prefix; None if it is not in the model."""
    for name, candidate in model.named_modules(prefix=prefix):
        if candidate is module:
            return str(name)
    return None


def fqn_to_module(model: nn.Module | None, path: str) -> nn.Module | Tensor | None:
    """The module or tensor of that name, or None if there is none; "" is the model itself."""
    found: Any = model
    for name in path.split(".") if path else ():
        if found is None:
            return None
        found = getattr(found, name, None)
    return found if isinstance(found, (nn.Module, Tensor)) else None


def get_arg_info_from_tensor_fqn(model: nn.Module, tensor_fqn: str) -> dict[str, Any]:
    """The parts of a name: `module_fqn`, `module`, `tensor_name` and `tensor_fqn`.

    The last part names the tensor; the module of the model's own tensors is "". `module` is None if
    the model has no such module. Whether the tensor exists is not checked.
    """
    tensor_fqn = tensor_fqn.removeprefix(".")
    module_fqn, _, tensor_name = tensor_fqn.rpartition(".")
    module = fqn_to_module(model, module_fqn)
    return {
        "module_fqn": module_fqn,
        "module": module if isinstance(module, nn.Module) else None,
        "tensor_name": tensor_name,
        "tensor_fqn": tensor_fqn,
    }


def in_short(value: object) -> str:
    """The value on one line, with models and long lists cut short."""
    return " ".join(reprlib.repr(value).split())


def closest(name: str, names: Iterable[str]) -> str:
    """The names most like this one, quoted and joined, for the end of an error."""
    names = list(names)
    # 0.4: 'seq.0.weight' still finds '0.weight' and 'linear.weight' finds 'linear1.weight'.
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return ", ".join(repr(name) for name in close) or "none"
