"""Holding zeros during training: masks are reapplied after every optimizer step."""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.weights import adapters, require_data, require_module, require_ordinary
from secateur.core.wrappers import optimizer_with_hooks, unwrapped
from secateur.model import layers as _layers
from secateur.model.experts import Expert
from secateur.model.layers import weight_of

# How masks move after every step: (layer name, weight [out, in], mask [out, in], step) -> mask.
Rule = Callable[[str, Tensor, Tensor, int], Tensor]


class HeldMasks:
    """The masks that a `hold` keeps, by layer, until `release()` or the end of a `with` block."""

    def __init__(
        self,
        layers: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        rule: Rule | None,
    ) -> None:
        self.steps = 0
        self.masks: dict[str, Bool[Tensor, "..."]] = {
            name: weight_of(module) != 0 for name, module in layers.items()
        }
        self._layers = layers
        self._rule = rule
        self._handle = optimizer_with_hooks(optimizer).register_step_post_hook(self._after_step)

    def release(self) -> None:
        """Stop holding; the weights stay as they are."""
        self._handle.remove()

    def __enter__(self) -> "HeldMasks":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self.steps += 1
        for name, module in self._layers.items():
            if self._rule is not None:
                weight, mask = _layers.matrix(module), _layers.matrix(module, self.masks[name])
                self.masks[name] = _layers.from_matrix(
                    module, self._rule(name, weight, mask, self.steps)
                )
            weight_of(module).masked_fill_(~self.masks[name], 0)


def hold(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule | None = None) -> HeldMasks:
    """Keep every zero in the model's layers at zero while this optimizer trains it.

    The masks are the exact zeros that the weights have now. An adapter's weight that is entirely
    zero, as LoRA's are at first, is left free. Nothing is attached to the model: its parameters
    stay ordinary, so it can be copied, pickled, sharded and saved at any time. The optimizer still
    updates moments and decays held weights, without effect. A `rule`, such as `gradual`, moves the
    masks.

    Raises:
        ValueError: if without a rule no weight is zero, the optimizer updates none of them, or a
            weight is computed (a mask of torch.nn.utils.prune, a parametrization) or has no data.
    """
    require_module(model)
    model = unwrapped(model)
    fresh = adapters(model)  # start at zero, to be trained away from it
    layers = {
        name: module
        for name, module in _layers.layers_of(model).items()
        if not hasattr(module, "packed")  # frozen, with its zeros
        and (rule is not None or _may_have_zeros(module))
        and not (name in fresh and _is_zero(module))
    }
    if not layers:
        raise ValueError(
            f"hold needs a model with zeros, this {type(model).__name__} has none: prune_ it first"
        )
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # For a computed weight the optimizer updates the parameters that it is computed from.
    require_data(
        {
            name: module
            for name, module in layers.items()
            if any(id(parameter) in updated for parameter in _parameters(module))
        }
    )
    held = {name: module for name, module in layers.items() if id(_updated_for(module)) in updated}
    if not held:
        raise ValueError(
            f"the optimizer updates none of the {len(layers)} sparse weights: make it from the "
            "parameters of this model"
        )
    require_ordinary(held)
    return HeldMasks(held, optimizer, rule)


def _updated_for(module: nn.Module) -> nn.Parameter | None:
    """The parameter that an optimizer updates for the weight: the stack, for an expert."""
    if isinstance(module, Expert):
        return module.stacked
    return module._parameters.get("weight")


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [module.stacked] if isinstance(module, Expert) else list(module.parameters())


def _is_zero(module: nn.Module) -> bool:
    """Whether the weight is a parameter that is entirely zero."""
    weight = module._parameters.get("weight")
    return weight is not None and not (is_lazy(weight) or weight.is_meta or bool(weight.any()))


@torch.no_grad()
def _may_have_zeros(module: nn.Module) -> bool:
    """Whether the weight has zeros, or has no values to look at."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_lazy(weight) or weight.is_meta or weight.layout is not torch.strided:
        return True
    return bool((weight == 0).any())
