"""A model in which only one part at a time holds its weights, loaded when the part is called."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.blocks import forward_as


class Window:
    """The one part of a model whose weights are loaded; loading another drops them.

    The model's parameters are on the meta device; its buffers are moved to where it runs. A part is
    a block of the chain, or a module outside it with tensors of its own and all that is inside. A
    part is loaded when it, or what is inside, is called. Loading it again restores its original
    weights: changes to it are lost.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Mapping[str, nn.Module],
        read: Callable[[Sequence[str]], Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.device = device
        self.parts, self._chain = parts_of(model, chain), set(chain)
        self._read = read
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._empty = {name: part.state_dict() for name, part in self.parts.items()}
        self._loaded = ""

    def load(self, name: str) -> None:
        """Load this part's weights, unless they are loaded."""
        if name == self._loaded:
            return
        self.drop()
        weights = self._read([f"{name}.{key}" for key in self._empty[name]])
        on_device = {n.removeprefix(f"{name}."): w.to(self.device) for n, w in weights.items()}
        self.parts[name].load_state_dict(on_device, assign=True)
        self._loaded = name

    def drop(self) -> None:
        """Drop the weights of the loaded part, if there is one."""
        if self._loaded:
            self.parts[self._loaded].load_state_dict(self._empty[self._loaded], assign=True)
            self._loaded = ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Load parts when they are called, and drop the last one at the end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.drop)
            for name, part in self.parts.items():
                called = functools.partial(self._called, name)
                for module in [part] if name in self._chain else part.modules():
                    stack.enter_context(forward_as(module, called))
            yield

    def _called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.load(name)
        return forward(*args, **kwargs)


def parts_of(model: nn.Module, chain: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks, and every other module with tensors of its own, in the model's order.

    A module with tensors of its own and modules inside, such as `nn.MultiheadAttention`, is one
    part with all of them.

    Raises:
        ValueError: if a module around the chain has tensors of its own.
    """
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{part}.") for part in parts):
            continue
        if name in chain:
            parts[name] = module
        elif any("." not in key for key in module.state_dict()):
            if not name or any(block.startswith(f"{name}.") for block in chain):
                raise ValueError(
                    f"{name or type(model).__name__} has tensors beside the blocks inside it and "
                    "cannot be loaded in parts: load the model whole and call reconstruct_"
                )
            parts[name] = module
    return parts
