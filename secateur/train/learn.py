"""Masks that training learns while dense weights train: in the model is what it computes with.

Between steps a planned layer's parameter holds the pruned weight, an ordinary tensor with zeros.
Ahead of a step the dense weight takes its place, with its gradient; the optimizer trains that, and
behind the step the pruned one is made of it anew. So the model computes, compiles and is saved as
any other, and an optimizer's weight decay, norms and moments are those of the dense weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from secateur.core.weights import pairs_sharing_memory
from secateur.core.wrappers import require_unflattened, unwrapped
from secateur.criteria import magnitude
from secateur.model import layers as _layers
from secateur.model.plan import Plan
from secateur.patterns import Pattern
from secateur.train.hold import Move
from secateur.train.steps import Optimizer, Steps, as_optimizers, parameters_of, require_free
from secateur.train.straight_through import Learner, Learnt
from secateur.train.weights import (
    Weight,
    apply_masks_,
    require_ordinary,
    require_whole,
    weights_of_plan,
)

VERB = "learn_masks_"


class Learning:
    """The masks and dense weights of layers whose masks training learns.

    It ends with `release()` or the end of a `with` block, and leaves what the model computed with.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Weight],
        learnt: Mapping[str, Learnt],
        plan: Plan,
        optimizers: Sequence[Optimizer],
        rule: Learner,
        every: int,
    ) -> None:
        self.masks: dict[str, Bool[Tensor, "..."]] = {n: one.mask for n, one in learnt.items()}
        self._trained = {name: one.trained for name, one in learnt.items()}
        self._fixed = {n: one.fixed for n, one in learnt.items() if one.fixed is not None}
        self._weights, self._plan, self._rule, self._every = weights, plan, rule, every
        self._chosen: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._in_step = set[str]()  # the layers whose dense weights are in the model
        self._steps = Steps(model, optimizers, weights, VERB)
        for name in weights:
            self._place(name)
        self._steps.attach(self._before, self._after, self._again)

    @property
    def steps(self) -> int:
        """How many steps the optimizer has taken; of several, the one that has taken most."""
        return max(self._steps.counts)

    @property
    def moves(self) -> dict[str, Move]:
        """How many weights each layer's last choice dropped and took back.

        Of masks that settle these fall with the learning rate.
        """
        return {
            name: Move(step, int(dropped), int(grown))
            for name, (step, dropped, grown) in self._chosen.items()
        }

    def release(self) -> None:
        """Learn no more; the model stays as it computes, and the dense weights are forgotten."""
        self._steps.release()
        for name in list(self._in_step):  # an error in a step has left them there
            self._take_back(name)
        self._trained.clear()
        self._fixed.clear()

    def __enter__(self) -> "Learning":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def apply_(self, model: nn.Module) -> None:
        """Set to zero in another model, such as an average over steps, what is zero in this one.

        An average of pruned weights has the zeros that all of its masks had, which are too few.

        Raises: ValueError if it has no such weight, or one of another shape; nothing has changed
            then.
        """
        apply_masks_({self._weights[n].layer: mask for n, mask in self.masks.items()}, model)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the states of the model and the optimizer."""
        return {
            "steps": list(self._steps.counts),
            "rule": type(self._rule).__name__,
            **{key: {n: t.clone() for n, t in of.items()} for key, of in self._tensors().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of the same layers and rule, whose weights go into the model.

        The run then takes the steps that it would have taken uninterrupted, bit for bit.

        Raises:
            ValueError: if it belongs to other layers, another rule or an earlier step; nothing has
                changed then.
        """
        if state.get("rule") != (own := type(self._rule).__name__):
            raise ValueError(
                f"this state is of {state.get('rule', 'no rule of masks that are learnt')}, the "
                f"rule is {own}: load what state_dict() of such a run returned"
            )
        self._steps.require(state["steps"])
        for key, named in self._tensors().items():
            shapes = {name: tensor.shape for name, tensor in named.items()}
            if {name: tensor.shape for name, tensor in state[key].items()} != shapes:
                raise ValueError(
                    f"the {key} of this state are of other layers than {', '.join(self.masks)}: "
                    "load the state of a run with the same model and plan"
                )
        self._steps.counts = list(state["steps"])
        for key, named in self._tensors().items():
            for name, tensor in named.items():
                tensor.copy_(state[key][name])
        for name in self._weights:
            self._place(name)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": self.masks, "trained": self._trained, "fixed": self._fixed}

    # --- around a step ---------------------------------------------------------------------------

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, final: bool) -> None:
        step = self._steps.count_of(optimizer)
        if not final or step is None:
            return
        coming = [
            name
            for name in self._own(optimizer)
            if self._weights[name].gradient() is not None and name not in self._in_step
        ]
        self._require_unchanged(coming)
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, for fused optimizers
        for name in coming:
            gradient, learnt = self._weights[name].gradient(), self._learnt(name)
            assert gradient is not None
            factor = 1.0 if scale is None else scale
            of_trained = self._rule.gradient(gradient, learnt, step + 1, factor)
            if of_trained is not gradient:
                gradient.copy_(of_trained)
            self._weights[name].tensor().copy_(learnt.trained)
            self._in_step.add(name)

    @torch.no_grad()
    def _again(self, optimizer: Optimizer) -> None:
        """Have the model compute as it does, where a step calls its closure once more."""
        for name in self._in_their_step(optimizer):
            self._take_back(name)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, step: int | None) -> None:
        if step is None:
            return
        for name in self._in_their_step(optimizer):
            if step % self._every == 0:
                weight, before = self._weights[name], self.masks[name]
                mask = _mask(weight, weight.tensor(), self._plan.layers[name])
                self._chosen[name] = step, (before & ~mask).sum(), (mask & ~before).sum()
                self.masks[name] = mask
            self._take_back(name)

    def _own(self, optimizer: Optimizer) -> list[str]:
        own = parameters_of(optimizer)
        return [name for name, weight in self._weights.items() if id(weight.parameter) in own]

    def _in_their_step(self, optimizer: Optimizer) -> list[str]:
        return [name for name in self._own(optimizer) if name in self._in_step]

    def _require_unchanged(self, names: Sequence[str]) -> None:
        """Raise if something has written into a layer since the last step.

        Raises: ValueError with the layer's name.
        """
        changed = {}
        for name in names:
            self._follow(name)
            now = self._weights[name].tensor()
            differs = (now != self._computed(name)) & ~now.isnan()
            changed[name] = differs.any()
        if changed and bool(torch.stack([one.cpu() for one in changed.values()]).any()):
            name = next(name for name, one in changed.items() if one)
            raise ValueError(
                f"{name}.weight has been written into since the last step, and its dense weight "
                f"knows nothing of it: load the state of this {VERB} behind the model's, or "
                "release() it before the change and begin anew"
            )

    def _follow(self, name: str) -> None:
        """Bring what is kept beside the model to where its weight is now."""
        device = self._weights[name].tensor().device
        for named in self._tensors().values():
            if name in named:
                named[name] = named[name].to(device)

    @torch.no_grad()
    def _take_back(self, name: str) -> None:
        """Take the dense weight out of the model, and put what it computes with in its place."""
        self._trained[name].copy_(self._weights[name].tensor())
        self._place(name)
        self._in_step.discard(name)

    @torch.no_grad()
    def _place(self, name: str) -> None:
        self._weights[name].tensor().copy_(self._computed(name))

    def _computed(self, name: str) -> Shaped[Tensor, "..."]:
        """What the model computes with."""
        module, learnt = self._weights[name].module, self._learnt(name)
        rows = Learnt(
            _layers.matrix(module, learnt.trained),
            _layers.matrix(module, learnt.mask),
            None if learnt.fixed is None else _as_matrix(module, learnt.fixed),
        )
        return _layers.from_matrix(module, self._rule.weight(rows, self._plan.layers[name]))

    def _learnt(self, name: str) -> Learnt:
        return Learnt(self._trained[name], self.masks[name], self._fixed.get(name))


def _as_matrix(module: nn.Module, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """What a rule keeps as it was: numbers of a weight as a matrix, or one number."""
    return _layers.matrix(module, tensor) if tensor.dim() else tensor


def learn_masks_(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | Sequence[Optimizer],
    rule: Learner,
    *,
    every: int = 1,
) -> Learning:
    """Prune the planned layers, and go on learning which weights to keep while the model trains.

    Dense weights train beside the model and may come back at any time. What the model computes
    with has the plan's zeros from now on, and its gradient reaches them by the `rule`:
    `StraightThrough()`, with a decay of pruned weights SR-STE and AST, `SoftThreshold()` (S-STE) or
    `Supermask()`. Behind every `every`-th step the masks are chosen anew. `release()` leaves an
    ordinary model that computes as it last did; `hold` it to train on with fixed masks.

    Parameters stay where and what they are, so that keys, sharing among processes, compiling and
    saving are as ever, and optimizers work as `hold` says. The dense weights are in the state of
    what is returned, from which a run resumes bit for bit.

    Cost: the dense weights and masks beside the model, with a supermask its scores too; a step
        reads and writes each three times.
    Raises:
        ValueError: if `every` is less than 1, the rule makes no sense for a layer's pattern, a
            planned layer is missing, frozen, tied to another or not updated by the optimizer, or
            its weight is no ordinary parameter, sharded or held already. Before a step, if
            something else has written into the weights.
    """
    if every < 1:
        raise ValueError(f"{VERB} needs every >= 1 step, got {every}")
    optimizers = as_optimizers(optimizer)
    require_unflattened(model, optimizers)
    model = unwrapped(model)
    weights = weights_of_plan(model, plan)
    _require(weights, optimizers)
    for name, pattern in plan.layers.items():
        rule.require(name, pattern)
    learnt = {name: _begun(rule, name, w, plan.layers[name]) for name, w in weights.items()}
    return Learning(model, weights, learnt, plan, optimizers, rule, every)


@torch.no_grad()
def _begun(rule: Learner, name: str, weight: Weight, pattern: Pattern) -> Learnt:
    module = weight.module
    trained, fixed = rule.begin(name, _layers.matrix(module, weight.tensor()), pattern)
    trained = _layers.from_matrix(module, trained)
    if fixed is not None and fixed.dim():
        fixed = _layers.from_matrix(module, fixed)
    return Learnt(trained, _mask(weight, trained, pattern), fixed)


def _mask(weight: Weight, trained: Float[Tensor, "..."], pattern: Pattern) -> Bool[Tensor, "..."]:
    """The largest of what is trained, in the shape of the weight."""
    module = weight.module
    return _layers.from_matrix(module, pattern.mask(magnitude(_layers.matrix(module, trained))))


def _require(weights: Mapping[str, Weight], optimizers: Sequence[Optimizer]) -> None:
    """Raise unless each of these weights is the optimizers' to train, alone and whole."""
    require_ordinary(weights)
    updated = {key for one in optimizers for key in parameters_of(one)}
    for name, weight in weights.items():
        parameter = weight.parameter
        assert parameter is not None, "ordinary"
        if id(parameter) not in updated:
            raise ValueError(
                f"the optimizer does not update {name}: make it from the parameters of this "
                "model, or leave the layer out of the plan"
            )
        if not parameter.requires_grad:
            raise ValueError(
                f"{name} is frozen (requires_grad=False), so no gradient says which weights to "
                "keep: unfreeze it, or leave the layer out of the plan"
            )
        if getattr(weight.owner, "sparse", False) is True:
            raise ValueError(
                f"{name} makes sparse gradients, which leave out rows: make it with sparse=False, "
                "or leave the layer out of the plan"
            )
    for one, two in pairs_sharing_memory({name: w.tensor() for name, w in weights.items()}):
        raise ValueError(f"{one} and {two} share a weight: leave one of them out of the plan")
    require_whole(weights)
    require_free({name: p for name, w in weights.items() if (p := w.parameter) is not None})
