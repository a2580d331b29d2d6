"""A model's modules and tensors as they were, after a change that has failed."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from secateur.prune.channels.trace import named_states


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the model's modules and tensors if the block raises."""
    put_back = with_tensors(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


def with_tensors(model: nn.Module) -> Callable[[], None]:
    """A function that restores the modules, and the memory that each tensor has now."""
    tensors = [(tensor, tensor.data) for _, tensor in named_states(model)]
    modules = remembered(model)

    def put_back() -> None:
        modules()
        for tensor, data in tensors:
            tensor.data = data

    return put_back


def remembered(model: nn.Module) -> Callable[[], None]:
    """A function that restores the model's modules with the attributes they have now."""
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


def _properties(kind: type[nn.Module]) -> dict[str, property]:
    """The properties of a parametrized module's own class, which torch removes with the masks."""
    return {name: value for name, value in vars(kind).items() if isinstance(value, property)}


def _shallow(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, with copies of the dicts that hold its tensors and modules."""
    return {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
