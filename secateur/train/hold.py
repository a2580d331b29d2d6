"""Holding zeros during training, in two stages: gradients before a step, weights after it."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.weights import require_module
from secateur.core.wrappers import require_unflattened, unwrapped
from secateur.model import layers as _layers
from secateur.model.plan import Plan
from secateur.train.dense_gradients import DenseGradients
from secateur.train.steps import Optimizer, Steps, as_optimizers, parameters_of, require_free
from secateur.train.weights import (
    Weight,
    apply_masks_,
    gathered,
    laid_out,
    require_data,
    require_ordinary,
    require_whole,
    weights_of_model,
    zero_,
    zeros_to_hold,
)

# How masks move after every step: (layer name, weight [out, in], mask [out, in], step) -> mask.
Rule = Callable[[str, Tensor, Tensor, int], Tensor]


@runtime_checkable
class Resumable(Protocol):
    """A rule that remembers something from step to step, and so goes into a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Mover(Protocol):
    """A rule that starts from a plan's zeros, and may look at the gradients of held weights."""

    def require(self, name: str, mask: Bool[Tensor, "out in"]) -> None:
        """Raise unless it can start from this mask."""

    def needs_gradient(self, name: str, step: int) -> bool:
        """Whether it has to be called with the layer's gradient after this step."""
        ...

    def __call__(
        self, name: str, weight: Tensor, mask: Tensor, step: int, gradient: Tensor | None = None
    ) -> Tensor: ...


class Move(NamedTuple):
    """How many weights a rule dropped and grew in a layer, and after which step."""

    step: int
    dropped: int
    grown: int


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
        self.moves: dict[str, Move] = {}  # the last one of each layer whose mask has moved
        self._dense = DenseGradients()
        self._model, self._rule = model, rule
        self._weights: dict[str, Weight] = {}
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._is_early, self._early = False, list[RemovableHandle]()
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
        for handle in self._early:
            handle.remove()

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
        for name in self._weights:
            self._mask_gradient(name)

    def _mask_gradient(self, name: str) -> None:
        if (gradient := self._weights[name].gradient()) is None:
            return
        rule, weight = self._rule, self._weights[name]
        coming = [count + 1 for count in self._steps.counts]
        if isinstance(rule, Mover) and any(_is_due(rule, name, weight, s) for s in coming):
            self._dense.keep(name, gradient, self.masks[name])
        zero_(gradient, self.masks[name])

    def mask_gradients_early(self) -> None:
        """Call `mask_gradients_` at each backward, until `release()`.

        It is for trainers that clip gradients before anything of yours is called. Each held
        parameter then has a hook, which its copies and pickles do not have.
        """
        self._is_early = True
        self._mask_early(list(self._weights))

    def _mask_early(self, names: Sequence[str]) -> None:
        by_parameter: dict[int, list[str]] = {}
        for name in names:
            by_parameter.setdefault(id(self._weights[name].parameter), []).append(name)
        for several in by_parameter.values():
            parameter = self._weights[several[0]].parameter
            if parameter is not None and parameter.requires_grad:
                hook = partial(self._arrived, several)
                self._early.append(parameter.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def _arrived(self, names: Sequence[str], parameter: Tensor) -> None:
        for name in names:
            if name in self._weights:  # a state may have freed it
                self._mask_gradient(name)

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
            self._move(self._rule, held, optimizer, step)

    def _move(
        self, rule: Rule, held: Mapping[str, Weight], optimizer: Optimizer, step: int
    ) -> None:
        """Have the rule choose the masks of an optimizer's layers, which has taken this step."""
        layers = {name: weight for name, weight in held.items() if weight.is_layer}
        due = {}
        if isinstance(rule, Mover):
            due = {name: w for name, w in layers.items() if _is_due(rule, name, w, step)}
        gradients = self._dense.take(due)
        self._dense.forget(held)
        masks = {
            name: _moved(rule, name, weight, self.masks[name], step, gradients.get(name))
            for name, weight in layers.items()
        }
        for name, mask in masks.items():
            before, self.masks[name] = self.masks[name], mask
            zero_(held[name].tensor(), mask)
            if mask is before:
                continue
            grown = mask & ~before
            counts = int((before & ~mask).sum()), int(grown.sum())
            if any(counts):
                self.moves[name] = Move(step, *counts)
            held[name].reset_(optimizer, grown)

    # --- what came back --------------------------------------------------------------------------

    def came_back(self) -> dict[str, int]:
        """How many held weights are not zero, by layer; only layers that have some.

        Between two steps they come back by what writes into the model: a loaded checkpoint, a
        merged adapter, an average with another model.
        """
        return _outside(self._weights, self.masks)

    def check(self) -> None:
        """Raise if held weights are not zero.

        Raises: ValueError with the layers and how many weights came back.
        """
        if back := self.came_back():
            raise ValueError(
                f"{_told(back, self.masks)}: find what wrote into the model, or set them back to "
                "zero with reapply()"
            )

    def reapply(self) -> dict[str, int]:
        """Set what came back to zero, and return what `came_back` did before."""
        back = self.came_back()
        for name in back:
            zero_(self._weights[name].tensor(), self.masks[name])
        return back

    def apply_(self, model: nn.Module) -> None:
        """Set to zero in another model, such as an average over steps, what is zero in this one.

        An average of weights has the zeros of its last masks only if masks have not moved.

        Raises: ValueError if it has no such weight, or one of another shape; nothing has changed
            then.
        """
        apply_masks_(self.masks, model)

    # --- in a checkpoint -------------------------------------------------------------------------

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """What a checkpoint needs besides the states of the model and the optimizer.

        Masks are bool tensors, sharded as the weights are, so `torch.distributed.checkpoint` can
        save this object and load it in another number of processes; with `whole` they are gathered,
        in all processes at once.
        """
        state = {
            "steps": list(self._steps.counts),
            "masks": {
                name: (gathered(mask) if whole else mask).clone()
                for name, mask in self.masks.items()
            },
            "free": [name for name in self._updated_now() if name not in self.masks],
        }
        rule = self._rule
        return state | ({"rule": rule.state_dict()} if isinstance(rule, Resumable) else {})

    def load_state_dict(self, state: Mapping[str, Any], *, reapply: bool = False) -> None:
        """Go on from a checkpoint: hold the model with its weights loaded, then load this.

        The run then takes the steps that it would have taken uninterrupted, bit for bit.

        Raises:
            ValueError: if the state is of another model or an earlier step, or weights that it
                holds are not zero, unless `reapply` sets them to zero. Nothing has changed then.
        """
        masks = self._masks_of(state)
        weights = self._updated_now()
        back = _outside({name: weights[name] for name in masks}, masks)
        if back and not reapply:
            raise ValueError(
                f"{_told(back, masks)}: load the model's weights of the same checkpoint first, or "
                "set these to zero with load_state_dict(state, reapply=True)"
            )
        if isinstance(self._rule, Resumable):
            self._rule.load_state_dict(state["rule"])
        self._steps.counts = list(state["steps"])
        new = [name for name in masks if name not in self._weights]
        self._steps.drop([name for name in self._weights if name not in masks])
        self._steps.add({name: weights[name] for name in masks})
        self._weights, self.masks = {name: weights[name] for name in masks}, masks
        if self._is_early:
            self._mask_early(new)
        for name in back:
            zero_(weights[name].tensor(), masks[name])

    def _updated_now(self) -> dict[str, Weight]:
        """All weights, held or not, that the optimizers update."""
        own = _own(list(self._steps.optimizers))
        return {n: w for n, w in weights_of_model(self._model).items() if id(w.parameter) in own}

    def _masks_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The masks of a state, which has been checked to be of this model and these optimizers."""
        has_rule = isinstance(self._rule, Resumable)
        if not {"steps", "masks", "free"} <= set(state) or has_rule != ("rule" in state):
            raise ValueError(
                f"this is no state of a hold {'with' if has_rule else 'without'} a rule that "
                f"remembers, it has {', '.join(map(str, state))}: load what state_dict() of such a "
                "one returned"
            )
        self._steps.require(state["steps"])
        weights = self._updated_now()
        if missing := [name for name in state["masks"] if name not in weights]:
            raise ValueError(
                f"the state holds {missing[0]}, which the optimizer does not update: load the "
                "state of the same model, with the same layers in the optimizer"
            )
        known = {*state["masks"], *state["free"]}
        if unknown := [name for name in self.masks if name not in known]:
            raise ValueError(
                f"{unknown[0]} has zeros of which the state knows nothing: load the state of the "
                "same model, or hold the model anew from the zeros that it has"
            )
        tensors = {name: weights[name].tensor() for name in state["masks"]}
        return {
            name: laid_out(_checked(mask, name, tensors[name].shape), tensors[name])
            for name, mask in state["masks"].items()
        }

    # --- what is held ----------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Weight], seen: Mapping[int, Tensor]) -> None:
        """Hold these weights, and remember which parameters have been looked at."""
        require_ordinary(weights)
        for name, weight in weights.items():
            self._weights[name] = weight
            self.masks[name] = weight.tensor() != 0
        self._seen |= {key: weakref.ref(parameter) for key, parameter in seen.items()}

    def _take_later(self, parameters: Mapping[int, Tensor]) -> None:
        """Hold the zeros of parameters that the optimizers had not updated before."""
        found = zeros_to_hold(self._model, all_layers=self._rule is not None)
        new = _updated({n: w for n, w in found.items() if n not in self.masks}, parameters)
        self._take(new, parameters)
        self._steps.add(new)
        if self._is_early:
            self._mask_early(list(new))

    def _has_seen(self, key: int, parameter: Tensor) -> bool:
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
    copied, pickled, sharded and saved at any time. A `rule`, such as `gradual` or
    `secateur.train.rigl`, moves the masks; what the optimizer keeps of a weight that grows is set
    to zero.

    Optimizers inside others, as in accelerate's wrapper and in SAM, are found. One that was not
    given raises an error before it updates a weight with zeros.

    Raises:
        ValueError: if without a rule no weight is zero, the optimizer updates none of them, a
            weight is computed (a mask of torch.nn.utils.prune, a parametrization) or has no data,
            the weights are held already, a rule's plan has a layer that is frozen or that the
            optimizer does not update, a rule would choose in sharded ones, or the trainer
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
    updated = _updated(weights, _own(optimizers))
    if not updated:
        raise ValueError(
            f"the optimizer updates none of the {len(weights)} sparse weights: make it from the "
            "parameters of this model"
        )
    if rule is not None:
        require_whole(weights)
        _require_planned(rule, updated)
        if isinstance(rule, Mover):
            _require_begun(rule, updated)
    require_free({name: p for name, w in weights.items() if (p := w.parameter) is not None})
    return Held(model, optimizers, rule, weights)


def _own(optimizers: Sequence[Optimizer]) -> dict[int, Tensor]:
    return {key: p for optimizer in optimizers for key, p in parameters_of(optimizer).items()}


def _updated(weights: Mapping[str, Weight], parameters: Mapping[int, Tensor]) -> dict[str, Weight]:
    """The weights that an optimizer of these parameters updates.

    For a computed weight it updates the parameters that it is computed from.

    Raises: ValueError if such a weight cannot be held.
    """
    require_data(
        {n: w for n, w in weights.items() if any(id(p) in parameters for p in w.sources())}
    )
    return {name: w for name, w in weights.items() if id(w.parameter) in parameters}


def _require_planned(rule: Rule, weights: Mapping[str, Weight]) -> None:
    """Raise if the rule has a plan with a layer that training will not change."""
    plan = getattr(rule, "plan", None)
    for name in plan.layers if isinstance(plan, Plan) else ():
        parameter = weights[name].parameter if name in weights else None
        if parameter is None or not parameter.requires_grad:
            reason = "the optimizer does not update it" if parameter is None else "it is frozen"
            raise ValueError(
                f"{name} is planned and would keep its weights, {reason}: give the optimizer its "
                "parameters, unfreeze it (requires_grad_()), or leave it out of the plan (ignore=)"
            )


@torch.no_grad()
def _outside(weights: Mapping[str, Weight], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights are not zero where the masks have none, by name, where there are any."""
    counts = {n: (w.tensor() != 0).logical_and(~masks[n]).sum() for n, w in weights.items()}
    return {name: found for name, count in counts.items() if (found := int(gathered(count)))}


def _told(back: Mapping[str, int], masks: Mapping[str, Tensor]) -> str:
    few = ", ".join(f"{name} ({count:,})" for name, count in list(back.items())[:3])
    return f"held weights came back in {len(back)} of {len(masks)} layers, {few}"


@torch.no_grad()
def _require_begun(rule: Mover, weights: Mapping[str, Weight]) -> None:
    """Raise if the rule cannot start from the zeros that a layer has."""
    for name, weight in weights.items():
        if weight.is_layer:
            rule.require(name, _layers.matrix(weight.module, weight.tensor()) != 0)


def _is_due(rule: Mover, name: str, weight: Weight, step: int) -> bool:
    return weight.is_layer and rule.needs_gradient(name, step)


def _moved(
    rule: Rule, name: str, weight: Weight, mask: Tensor, step: int, gradient: Tensor | None
) -> Tensor:
    """The mask that the rule chooses, in the shape of the weight; the same if it stays."""
    module = weight.module
    rows, kept = _layers.matrix(module, weight.tensor()), _layers.matrix(module, mask)
    if gradient is not None and isinstance(rule, Mover):
        chosen = rule(name, rows, kept, step, _layers.matrix(module, gradient))
    else:
        chosen = rule(name, rows, kept, step)
    if chosen is kept:
        return mask
    moved = _checked(chosen, name, rows.shape)
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
