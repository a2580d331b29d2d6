"""A dense view of a packed weight that refuses to be written to.

The dense weight is made afresh at every access, so a write to it would be lost without a word.
Inference mode alone does not stop that: `weight.data += delta`, which is how adapters are merged,
and `weight.detach().add_(delta)` pass (torch 2.13). Hence a tensor that knows what it is. It is
never stored in a module, and compiled code gets the plain tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ASSIGNMENTS = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "set"),  # `set` writes a property: `weight.data = ...`
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


class ReadOnlyWeight(Tensor):
    """A dense weight for reading; views of it are read-only too, computed results are not."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, options = func.__name__, kwargs or {}
        writes = name in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))
        targets = [options.get("out")]
        if writes:  # torch.nn.init passes its target by name
            targets += [*args[:1], options.get("tensor"), options.get("input")]
        if any(isinstance(target, ReadOnlyWeight) for target in targets):
            raise ValueError(
                f"a packed weight is read-only, got a write by {name}: call unpack_(model) first "
                "and pack_ again afterwards; merging a dense adapter would destroy the zeros, so "
                "keep the adapter beside the layer, or unpack and merge by "
                "secateur.integrations.peft.merge_adapters_"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **options)
            if isinstance(result, Tensor) and any(_shares(result, arg) for arg in args):
                return result.as_subclass(ReadOnlyWeight)
        return result


def _shares(result: Tensor, argument: Any) -> bool:
    """Whether the result is a view of this argument, and the argument is read-only."""
    if not isinstance(argument, ReadOnlyWeight):
        return False
    return result.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
