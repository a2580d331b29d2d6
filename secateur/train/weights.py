"""The weights of a model that may have zeros: those of its layers, and all other matrices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from secateur.core.weights import adapters, names_of_computed, why_no_data, why_not_ordinary
from secateur.core.wrappers import unwrapped
from secateur.model.layers import (
    gradient_of,
    is_prunable,
    layers_of,
    parameter_of,
    pieces_of,
    weight_in,
    weight_of,
)
from secateur.model.piece import Piece, owner_name
from secateur.model.plan import Plan, match


@dataclass(frozen=True)
class Weight:
    """Where a weight is: a parameter of a module, or a matrix inside one."""

    path: str  # of the module that has the parameter
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        """The full name of the weight."""
        return f"{self.layer}.{self.key}".removeprefix(".")

    @property
    def layer(self) -> str:
        """The name of the layer that it is the weight of."""
        inner = f".{self.module.inner}" if isinstance(self.module, Piece) else ""
        return f"{self.path}{inner}".removeprefix(".")

    @property
    def parameter_key(self) -> str:
        """The name of the parameter in the module that has it."""
        return self.module.key if isinstance(self.module, Piece) else self.key

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return self.module.owner if isinstance(self.module, Piece) else self.module

    @property
    def is_layer(self) -> bool:
        """Whether it can be seen as a matrix of outputs and inputs, in which rules choose."""
        return isinstance(self.module, Piece) or (self.key == "weight" and is_prunable(self.module))

    @property
    def parameter(self) -> nn.Parameter | None:
        """What an optimizer updates: the stack, for an expert. None for a computed weight."""
        if isinstance(self.module, Piece):
            return parameter_of(self.module)
        return self.module._parameters.get(self.key)

    def tensor(self) -> Shaped[Tensor, "..."]:
        """The weight, in the memory that an optimizer updates."""
        if isinstance(self.module, Piece):
            return weight_of(self.module)
        found = self.module._parameters[self.key]
        assert found is not None
        return found

    def gradient(self) -> Shaped[Tensor, "..."] | None:
        """Its gradient, in the memory that an optimizer reads."""
        return gradient_of(self.module) if isinstance(self.module, Piece) else self.tensor().grad

    @torch.no_grad()
    def reset_(self, optimizer: torch.optim.Optimizer, where: Bool[Tensor, "..."]) -> None:
        """Set to zero what an optimizer keeps of these weights: its moments, as floats.

        Steps, moments of whole rows and integer codes stay.
        """
        parameter = self.parameter
        assert parameter is not None
        for kept in optimizer.state.get(parameter, {}).values():
            if (
                isinstance(kept, Tensor)
                and kept.is_floating_point()
                and kept.shape == parameter.shape
            ):
                weight_in(self.module, kept).masked_fill_(where, 0)

    def sources(self) -> list[nn.Parameter]:
        """The parameters that change the weight: for a computed one, all of its module."""
        own = self.parameter
        return list(self.module.parameters()) if own is None else [own]

    @torch.no_grad()
    def has_zeros(self) -> bool:
        """Whether some of it is zero, or it has no values to look at."""
        weight = getattr(self.module, self.key)
        if is_lazy(weight) or weight.is_meta or weight.layout is not torch.strided:
            return True
        return bool(gathered((weight == 0).any()))

    @torch.no_grad()
    def is_all_zero(self) -> bool:
        """Whether it is a parameter with values, all of them zero."""
        weight = self.parameter
        if weight is None or is_lazy(weight) or weight.is_meta:
            return False
        return not bool(gathered((self.tensor() != 0).any()))


def weights_of_model(model: nn.Module) -> dict[str, Weight]:
    """Every weight with two dimensions or more: of layers by the layer's name, others by their own.

    Layers come first, in module order, and matrices inside a parameter each with a name of its own.
    Packed layers have no weight that training could change.
    """
    layers = layers_of(model)
    found = {
        name: Weight(owner_name(name, module), module, "weight")
        for name, module in layers.items()
        if not hasattr(module, "packed")
    }
    for prefix, module in model.named_modules():
        if prefix in layers or isinstance(module, ParametrizationList):
            continue
        for key in _keys(module):
            name = prefix if key == "weight" else f"{prefix}.{key}" if prefix else key
            found[name] = Weight(prefix, module, key)
    return found


def weights_of_plan(model: nn.Module, plan: Plan) -> dict[str, Weight]:
    """The weights of a plan's layers, by the plan's names, which may leave out PEFT's.

    Raises: ValueError if the plan was made for another model.
    """
    own = weights_of_model(model)
    names = {id(weight.module): name for name, weight in own.items() if weight.is_layer}
    return {
        name: own[name if name in own else names[id(module)]]
        for name, module in match(model, plan).items()
    }


def zeros_to_hold(model: nn.Module, *, all_layers: bool) -> dict[str, Weight]:
    """The weights with zeros that are to stay, or with `all_layers` every layer's weight.

    Zeros that training starts from are no zeros to stay: of an adapter's weight that is entirely
    zero, as LoRA's are at first, and of a parameter of no layer, such as a table of positions.
    """
    fresh = adapters(model)
    return {
        name: weight
        for name, weight in weights_of_model(model).items()
        if ((all_layers and weight.is_layer) or weight.has_zeros())
        and not ((name in fresh or weight.key != "weight") and weight.is_all_zero())
    }


def require_data(weights: Mapping[str, Weight]) -> None:
    """Raise unless each has values of its own to read, of whatever kind.

    Raises: ValueError with the weight's name, the reason and the remedy.
    """
    for weight in weights.values():
        if reason := why_no_data(weight.module, weight.key):
            raise ValueError(f"{weight.name} {reason}")


def require_ordinary(weights: Mapping[str, Weight]) -> None:
    """Raise unless each is an ordinary parameter with data that can be changed.

    Raises: ValueError with the weight's name, the reason and the remedy.
    """
    for weight in weights.values():
        if reason := why_not_ordinary(weight.module, weight.key):
            raise ValueError(f"{weight.name} {reason}")


def require_whole(weights: Mapping[str, Weight]) -> None:
    """Raise if one is sharded among processes, each of which would choose in its part alone.

    Raises: ValueError with the weight's name and the remedy.
    """
    for weight in weights.values():
        if hasattr(weight.parameter, "full_tensor"):
            raise ValueError(
                f"a rule chooses among all of a weight, {weight.name} is sharded: prune_ the model "
                "before it is sharded and hold it without a rule, or train it with "
                "DistributedDataParallel"
            )


def _keys(module: nn.Module) -> Iterator[str]:
    """The names of the module's own weights, and of computed ones in place of what makes them."""
    computed = names_of_computed(module)
    yield from computed
    stacks = {piece.key for piece in pieces_of(module).values()}
    for key, parameter in module._parameters.items():
        of_computed = any(key.startswith(f"{name}_") for name in computed)
        if parameter is None or key in stacks or of_computed or is_lazy(parameter):
            continue
        if parameter.dim() > 1:
            yield key


def apply_masks_(masks: Mapping[str, Bool[Tensor, "..."]], model: nn.Module) -> None:
    """Set to zero in a model, such as an average over steps, what these masks do not keep.

    Raises: ValueError if it has no such weight, or one of another shape; nothing has changed then.
    """
    inside = model.module if isinstance(model, AveragedModel) else model
    weights = weights_of_model(unwrapped(inside))
    for name, mask in masks.items():
        parameter = weights[name].parameter if name in weights else None
        if parameter is None or weights[name].tensor().shape != mask.shape:
            raise ValueError(
                f"the masks are of another model, this {type(model).__name__} has no {name} of "
                f"shape {tuple(mask.shape)}: give a copy or an average of the model"
            )
    for name, mask in masks.items():
        tensor = weights[name].tensor()
        zero_(tensor, laid_out(mask, tensor))  # averages may be on another device


# --- sharded tensors -----------------------------------------------------------------------------


def gathered(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tensor itself, or all of one that is sharded, gathered from the processes."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def laid_out(mask: Bool[Tensor, "..."], weight: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """A copy of the mask on the weight's device, sharded if that is, in the same way."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return gathered(mask).to(weight.device, copy=True)
    if hasattr(mask, "device_mesh"):
        return mask.to(weight.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    placements = weight.placements  # type: ignore[attr-defined]
    sharded: Tensor = distribute_tensor(mask.to(weight.device), mesh, placements)
    return sharded


def local(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tensor itself, or this process's part of one that is sharded; to be written to."""
    own = getattr(tensor, "to_local", None)
    return tensor if own is None else own()


@torch.no_grad()
def zero_(tensor: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> None:
    """Set to zero what the mask does not keep; sharded tensors, each process its part.

    A product with the mask would leave NaN and negative zeros.
    """
    if tensor.is_sparse:  # a gradient of some rows, as that of nn.Embedding(sparse=True)
        kept = mask[tuple(tensor._indices())]
        tensor._values().masked_fill_(~kept, 0)
    else:
        local(tensor).masked_fill_(~local(mask), 0)
