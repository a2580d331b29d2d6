"""Holding zeros during training, in two stages: gradients before a step, weights after it."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from secateur.core.weights import require_module
from secateur.core.wrappers import require_unflattened, unwrapped
from secateur.model import layers as _layers
from secateur.train.steps import Optimizer, Steps, as_optimizers, parameters_of, require_free
from secateur.train.weights import (
    Weight,
    require_data,
    require_ordinary,
    require_whole,
    zero_,
    zeros_to_hold,
)

# How masks move after every step: (layer name, weight [out, in], mask [out, in], step) -> mask.
Rule = Callable[[str, Tensor, Tensor, int], Tensor]


class Held:
    """The masks that a `hold` keeps, by layer, until `release()` or the end of a `with` block.

    A weight that is no layer's has its own name: `lstm.weight_hh_l0`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        rule: Rule | None,
        weights: Mapping[str, Weight],
    ) -> None:
        self.masks: dict[str, Bool[Tensor, "..."]] = {}
        self._model, self._rule = model, rule
        self._weights: dict[str, Weight] = {}
        self._seen: dict[int, weakref.ref[nn.Parameter]] = {}
        own = _own(optimizers)
        held = _updated(weights, own)
        self._take(held, own)
        self._steps = Steps(model, optimizers, held, "hold")
        self._steps.watch(weights)  # some may be updated by an optimizer that was not given
        self._steps.attach(self._before, self._after)

    @property
    def steps(self) -> int:
        """How many steps the optimizer has taken; of several, the one that has taken most."""
        return max(self._steps.counts)

    def release(self) -> None:
        """Stop holding; the weights stay as they are."""
        self._steps.release()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Set the gradients of held weights to zero, as each step does before it begins.

        Call it after the backward, and after `unscale_`, where gradients are looked at before the
        step: to clip their norm, to log it, or in the first of SAM's two steps.
        """
        for name, weight in self._weights.items():
            if (gradient := weight.gradient()) is not None:
                zero_(gradient, self.masks[name])

    def _before(self, optimizer: Optimizer, final: bool) -> None:
        own = parameters_of(optimizer)
        if unseen := {key: p for key, p in own.items() if not self._has_seen(key, p)}:
            self._take_later(unseen)
        self._require_masks()
        self.mask_gradients_()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, step: int | None) -> None:
        own = parameters_of(optimizer)
        held = {name: w for name, w in self._weights.items() if id(w.parameter) in own}
        for name, weight in held.items():
            zero_(weight.tensor(), self.masks[name])
        if step is not None and self._rule is not None:
            masks = {
                name: _moved(self._rule, name, weight, self.masks[name], step)
                for name, weight in held.items()
                if weight.is_layer
            }
            for name, mask in masks.items():
                self.masks[name] = mask
                zero_(held[name].tensor(), mask)

    # --- what is held ----------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Weight], seen: Mapping[int, nn.Parameter]) -> None:
        """Hold these weights, and remember which parameters have been looked at."""
        require_ordinary(weights)
        for name, weight in weights.items():
            self._weights[name] = weight
            self.masks[name] = weight.tensor() != 0
        self._seen |= {key: weakref.ref(parameter) for key, parameter in seen.items()}

    def _take_later(self, parameters: Mapping[int, nn.Parameter]) -> None:
        """Hold the zeros of parameters that the optimizers had not updated before."""
        found = zeros_to_hold(self._model, all_layers=self._rule is not None)
        new = _updated({n: w for n, w in found.items() if n not in self.masks}, parameters)
        self._take(new, parameters)
        self._steps.add(new)

    def _has_seen(self, key: int, parameter: nn.Parameter) -> bool:
        seen = self._seen.get(key)
        return seen is not None and seen() is parameter

    # --- before a step ---------------------------------------------------------------------------

    def _require_masks(self) -> None:
        for name, weight in self._weights.items():
            tensor = weight.tensor()
            mask = _checked(self.masks.get(name), name, tensor.shape)
            if mask.device != tensor.device:
                self.masks[name] = mask.to(tensor.device)


def hold(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], rule: Rule | None = None
) -> Held:
    """Keep every zero in the model's weights at zero while these optimizers train it.

    The masks are the exact zeros that weights of two dimensions or more have now: of layers, of
    recurrent and attention modules, of parameters of your own. A weight is held from the first step
    of an optimizer that updates it, so that it may be unfrozen or added later. Left free
    are weights that start at zero: an adapter's, as LoRA's, and those of no layer, where they are
    entirely zero. Before each step gradients of held weights are set to zero, and the weights after
    it: kept weights become what they would in a model whose forward multiplies by the mask, under
    every optimizer. Nothing is attached to the model: its parameters stay ordinary, so it can be
    copied, pickled, sharded and saved at any time. A `rule`, such as `gradual`, moves the masks.

    Optimizers inside others, as in accelerate's wrapper and in SAM, are found. One that was not
    given raises an error before it updates a weight with zeros.

    Raises:
        ValueError: if without a rule no weight is zero, the optimizer updates none of them, a
            weight is computed (a mask of torch.nn.utils.prune, a parametrization) or has no data,
            the weights are held already, a rule would choose in sharded ones, or the trainer
            flattens parameters (FSDP1, DeepSpeed).
            Before a step, if weights have been replaced or have left the optimizer.
    """
    require_module(model)
    optimizers = as_optimizers(optimizer)
    require_unflattened(model, optimizers)
    model = unwrapped(model)
    weights = zeros_to_hold(model, all_layers=rule is not None)
    if not weights:
        raise ValueError(
            f"hold needs a model with zeros, this {type(model).__name__} has none: prune_ it first"
        )
    if not _updated(weights, _own(optimizers)):
        raise ValueError(
            f"the optimizer updates none of the {len(weights)} sparse weights: make it from the "
            "parameters of this model"
        )
    if rule is not None:
        require_whole(weights)
    require_free({name: p for name, w in weights.items() if (p := w.parameter) is not None})
    return Held(model, optimizers, rule, weights)


def _own(optimizers: Sequence[Optimizer]) -> dict[int, nn.Parameter]:
    return {key: p for optimizer in optimizers for key, p in parameters_of(optimizer).items()}


def _updated(
    weights: Mapping[str, Weight], parameters: Mapping[int, nn.Parameter]
) -> dict[str, Weight]:
    """The weights that an optimizer of these parameters updates.

    For a computed weight it updates the parameters that it is computed from.

    Raises: ValueError if such a weight cannot be held.
    """
    require_data(
        {n: w for n, w in weights.items() if any(id(p) in parameters for p in w.sources())}
    )
    return {name: w for name, w in weights.items() if id(w.parameter) in parameters}


def _moved(rule: Rule, name: str, weight: Weight, mask: Tensor, step: int) -> Tensor:
    """The mask that the rule chooses, in the shape of the weight."""
    module = weight.module
    rows, kept = _layers.matrix(module, weight.tensor()), _layers.matrix(module, mask)
    moved = _checked(rule(name, rows, kept, step), name, rows.shape)
    return _layers.from_matrix(module, moved.to(mask.device))


def _checked(mask: Any, name: str, shape: torch.Size) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        is_tensor = isinstance(mask, Tensor)
        got = f"{mask.dtype} of {tuple(mask.shape)}" if is_tensor else type(mask).__name__
        raise ValueError(
            f"the mask of {name} needs to be torch.bool of {tuple(shape)}, True where a weight is "
            f"kept, got {got}: a rule returns it in the shape that it was given"
        )
    return mask
