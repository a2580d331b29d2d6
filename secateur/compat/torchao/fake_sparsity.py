"""FakeSparsity: a parametrization that shows a weight with zeros and keeps what is behind them."""

from typing import cast

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.compat.torchao.names import in_short
from secateur.compat.torchao.shipped import ShippedFakeSparsity


class FakeSparsity(ShippedFakeSparsity):
    """The weight where its mask is not 0, else 0; hidden values stay in `original`.

    The mask, 1 = keep, has the weight's dtype, so that `mask.mean()` is the density; it follows
    `.to()` and loads from checkpoints of `torchao`. It is stored once, as
    `module.parametrizations.weight[0].mask`: replace its `data`, not the tensor.

    The zeros are +0.0 whatever they hide, even infinities and negative numbers, and the weight
    keeps its dtype whatever the mask's dtype. Gradients of hidden weights are 0.

    Raises:
        ValueError: at the forward, if mask and weight have different shapes.
    """

    mask: Tensor
    state_dict = nn.Module.state_dict  # torch.ao.pruning's leaves out the mask

    def __init__(self, mask: Shaped[Tensor, "..."]) -> None:
        nn.Module.__init__(self)
        self.register_buffer("mask", mask)

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if self.mask.shape != x.shape:
            raise ValueError(
                f"FakeSparsity needs a mask of the weight's shape {tuple(x.shape)}, got "
                f"{tuple(self.mask.shape)}: give update_mask's mask that shape"
            )
        return x.masked_fill(self.mask == 0, 0)


def mask_of(module: nn.Module, tensor_name: str) -> Tensor:
    """The mask of a prepared tensor, not a copy."""
    return cast(Tensor, _parametrization(module, tensor_name)[0].mask)


def original_of(module: nn.Module, tensor_name: str) -> Tensor:
    """The values that the mask of a prepared tensor is applied to."""
    return cast(Tensor, _parametrization(module, tensor_name).original).detach()


def unmasked(module: nn.Module, tensor_name: str) -> Tensor:
    """The tensor without the zeros of a mask, prepared or not."""
    if has_mask(module, tensor_name):
        return original_of(module, tensor_name)
    return cast(Tensor, module._parameters[tensor_name]).detach()


def has_mask(module: nn.Module, tensor_name: str) -> bool:
    """Whether the tensor is prepared: its first parametrization has a mask."""
    if not parametrize.is_parametrized(module, tensor_name):
        return False
    return isinstance(getattr(_parametrization(module, tensor_name)[0], "mask", None), Tensor)


def set_mask(module: nn.Module, tensor_name: str, keep: Bool[Tensor, "..."]) -> None:
    """Replace the values of a prepared tensor's mask; the tensor object stays."""
    mask_of(module, tensor_name).data = keep.to(original_of(module, tensor_name).dtype)


def put_mask(module: nn.Module, tensor_name: str, mask: Tensor) -> None:
    """Make this tensor itself the mask of a prepared tensor."""
    _parametrization(module, tensor_name)[0].mask = mask


def attach(module: nn.Module, tensor_name: str, parametrization: nn.Module) -> None:
    """Parametrize a tensor so that `detach` can restore it, in its place."""
    order = tuple(module._parameters)
    parametrize.register_parametrization(module, tensor_name, parametrization)
    parametrization.parameter_order = order  # type: ignore[assignment]  # any attribute will do


def detach(module: nn.Module, tensor_name: str, *, squash: bool) -> None:
    """Make a prepared tensor a plain parameter, with or without its zeros.

    torch would move it behind the module's other parameters, where an optimizer made from
    `model.parameters()` would give it another's state. Undo `attach` in reverse order.
    """
    order = cast(tuple[str, ...], _parametrization(module, tensor_name)[0].parameter_order)
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=squash)
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


def as_mask(mask: Tensor, tensor: Tensor, tensor_fqn: str) -> Tensor:
    """A copy of the mask with the tensor's dtype and device.

    Raises:
        ValueError: if it has another shape, or values other than 0 and 1.
    """
    require_tensor(mask, tensor_fqn)
    if mask.shape != tensor.shape:
        raise ValueError(
            f"the mask of {tensor_fqn} needs the shape {tuple(tensor.shape)}, got "
            f"{tuple(mask.shape)}: give the mask of this tensor"
        )
    require_binary(mask, tensor_fqn)
    return mask.detach().to(tensor.device, tensor.dtype, copy=True)


def require_tensor(mask: Tensor, tensor_fqn: str) -> None:
    """Raise unless a mask given by the user is a tensor."""
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"the mask of {tensor_fqn} needs to be a tensor, got {in_short(mask)}: write "
            "torch.tensor(...)"
        )


def require_binary(mask: Tensor, tensor_fqn: str) -> None:
    """Raise unless the mask keeps or drops each weight, with nothing in between."""
    if mask.dtype != torch.bool and (other := (mask != 0) & (mask != 1)).any():
        raise ValueError(
            f"the mask of {tensor_fqn} needs values of 0 or 1, got {float(mask[other][0]):g}: a "
            "mask keeps a weight or drops it, scale weights in the module itself"
        )


def _parametrization(module: nn.Module, tensor_name: str) -> nn.ModuleList:
    parametrized = cast(nn.ModuleDict, module.parametrizations)
    return cast(nn.ModuleList, parametrized[tensor_name])
