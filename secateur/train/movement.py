"""Movement pruning: training learns which weights to keep, by whether they move away from zero.

Symbols as in the paper: `W` are the weights, kept or not, `S` their scores, `M` the mask, `a = W M`
what the model computes with. W and S learn from dL/da, straight through the mask: dL/dS = dL/da W
for every weight, dL/dW = dL/da M. The parameter itself is `a`, so that the model stays ordinary;
the values of W where M is zero are kept beside it and come back if their scores grow.
Source: Sanh, Wolf and Rush, NeurIPS 2020, arXiv:2005.07683, sections 3 and 4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.wrappers import require_unflattened, unwrapped
from secateur.model import layers as _layers
from secateur.model.layers import weights_of
from secateur.model.plan import Plan
from secateur.train.gradual import lowered
from secateur.train.schedules import Schedule
from secateur.train.steps import Optimizer, Steps, as_optimizers, parameters_of, require_free
from secateur.train.weights import Weight, require_whole, weights_of_plan

# (dL/dS, scores) -> what the scores gain at a step.
Learn = Callable[[Tensor, Tensor], Tensor]
# (layer name, scores [out, in], step) -> the mask [out, in], or None to leave it as it is.
Choose = Callable[[str, Tensor, int], Tensor | None]


class Moving:
    """The masks of layers that are learning which weights to keep.

    It ends with `release()` or the end of a `with` block, and leaves the zeros of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Weight],
        optimizers: Sequence[Optimizer],
        learn: Learn,
        choose: Choose,
    ) -> None:
        tensors = {name: weight.tensor().detach() for name, weight in weights.items()}
        self.masks: dict[str, Bool[Tensor, "..."]] = {
            name: torch.ones_like(W, dtype=torch.bool) for name, W in tensors.items()
        }
        self.scores: dict[str, Float[Tensor, "..."]] = {
            name: torch.zeros_like(W, dtype=torch.float32) for name, W in tensors.items()
        }
        self._hidden = {name: torch.zeros_like(W) for name, W in tensors.items()}
        self._weights, self._learn, self._choose = weights, learn, choose
        self._learnt: set[str] = set()  # from the gradients of the step that is being taken
        self._steps = Steps(model, optimizers, weights, "movement")
        self._steps.attach(self._before, self._after)

    @property
    def steps(self) -> int:
        """How many steps the optimizer has taken; of several, the one that has taken most."""
        return max(self._steps.counts)

    def release(self) -> None:
        """Stop moving masks; the weights stay as they are, and hidden ones are forgotten."""
        self._steps.release()
        self._hidden.clear()

    def __enter__(self) -> "Moving":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the states of the model and the optimizer."""
        tensors = {
            key: {name: tensor.clone() for name, tensor in named.items()}
            for key, named in self._tensors().items()
        }
        return {"steps": self._steps.counts, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of the same layers.

        Raises:
            ValueError: if it belongs to other layers or to an earlier step; nothing has changed
                then.
        """
        self._steps.require(state["steps"])
        for key, named in self._tensors().items():
            own = {name: tensor.shape for name, tensor in named.items()}
            if {name: tensor.shape for name, tensor in state[key].items()} != own:
                raise ValueError(
                    f"the {key} of this state are of other layers than {', '.join(own)}: load the "
                    "state of a run with the same model and plan"
                )
        self._steps.counts = list(state["steps"])
        for key, named in self._tensors().items():
            for name, tensor in named.items():
                tensor.copy_(state[key][name])

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": self.masks, "scores": self.scores, "hidden": self._hidden}

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, final: bool) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, for fused optimizers
        for name, weight in self._weights.items():
            a, gradient = weight.tensor(), weight.gradient()
            if gradient is None:
                continue
            if final and name not in self._learnt:  # a closure may run more than once in a step
                W = (a + self._hidden[name]).float()
                slope = gradient.float() if scale is None else gradient.float() / scale
                self.scores[name] += self._learn(slope * W, self.scores[name])
                self._learnt.add(name)
            gradient.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, step: int | None) -> None:
        own = parameters_of(optimizer)
        for name, weight in self._weights.items():
            a, M, hidden = weight.tensor(), self.masks[name], self._hidden[name]
            if id(weight.parameter) not in own:
                continue
            W = torch.where(M, a, hidden)  # an optimizer's momentum moves dropped weights as well
            if step is not None:
                self._learnt.discard(name)
                scores = _layers.matrix(weight.module, self.scores[name])
                if (chosen := self._choose(name, scores, step)) is not None:
                    M.copy_(_layers.from_matrix(weight.module, chosen))
            a.copy_(W.masked_fill(~M, 0))
            hidden.copy_(W.masked_fill(M, 0))


def movement(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | Sequence[Optimizer],
    schedule: Schedule,
    *,
    every: int = 1,
) -> Moving:
    """Keep the weights that moved away from zero most: the largest S = -sum_t dL/da W.

    Every `every` steps the planned layers' masks are chosen anew from the scores, at the sparsity
    `schedule(step)` as in `gradual`; dropped weights are zero and may come back with the value they
    had. Use it for fine-tuning at high sparsity; with little training or sparsity, magnitude does
    as well.

    Cost: the scores in float32 and the dropped weights beside the model; a step reads each once.
    Raises:
        ValueError: if `every` is less than 1, a planned layer is missing or not updated by the
            optimizer or frozen, its weight is no ordinary parameter or is held already.
    Source: Sanh, Wolf and Rush, arXiv:2005.07683, section 3, equation 2, and the cubic schedule of
        section 4.
    """
    if every < 1:
        raise ValueError(f"movement needs every >= 1 step, got {every}")

    def learn(slope: Tensor, scores: Tensor) -> Tensor:
        return -slope

    def choose(name: str, scores: Tensor, step: int) -> Tensor | None:
        if step % every:
            return None
        return lowered(plan.layers[name], schedule(step)).mask(scores)

    weights, optimizers = _updated(model, plan, optimizer)
    return Moving(unwrapped(model), weights, optimizers, learn, choose)


def soft_movement(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    penalty: float,
    rate: float,
    threshold: float = 0.0,
) -> Moving:
    """Keep the weights whose score is above the threshold, however many there are.

    Scores descend the gradient of the loss plus `penalty` times the mean of sigmoid(S) over all
    planned layers, in plain steps of size `rate`. The plan only names the layers: the sparsity is
    what training arrives at, and `check` may find less than planned.

    Cost: as `movement`.
    Raises:
        ValueError: if the penalty is negative, the rate is not positive, or a planned layer is
            missing, frozen or not updated by the optimizer, or its weight no ordinary parameter or
            held already.
    Source: Sanh, Wolf and Rush, arXiv:2005.07683, section 4, soft movement pruning.
    """
    if penalty < 0 or rate <= 0:
        raise ValueError(
            f"soft_movement needs a penalty >= 0 and a rate > 0, got {penalty:g} and {rate:g}"
        )
    planned, optimizers = _updated(model, plan, optimizer)
    count = sum(weight.tensor().numel() for weight in planned.values())

    def learn(slope: Tensor, scores: Tensor) -> Tensor:
        kept = scores.sigmoid()
        return -rate * (slope + penalty / count * kept * (1 - kept))

    def choose(name: str, scores: Tensor, step: int) -> Tensor:
        return scores > threshold

    return Moving(unwrapped(model), planned, optimizers, learn, choose)


def _updated(
    model: nn.Module, plan: Plan, optimizer: Optimizer | Sequence[Optimizer]
) -> tuple[dict[str, Weight], list[Optimizer]]:
    """The planned layers' weights, all of which the optimizers update, and the optimizers."""
    optimizers = as_optimizers(optimizer)
    require_unflattened(model, optimizers)
    planned = weights_of_plan(unwrapped(model), plan)
    weights_of({name: weight.module for name, weight in planned.items()})  # ordinary ones
    weights = {n: p for n, weight in planned.items() if (p := weight.parameter) is not None}
    updated = {key for one in optimizers for key in parameters_of(one)}
    if left := [name for name, weight in weights.items() if id(weight) not in updated]:
        raise ValueError(
            f"the optimizer does not update {left[0]}: make it from the parameters of this model, "
            "or leave the layer out of the plan"
        )
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise ValueError(
            f"{frozen[0]} is frozen (requires_grad=False), so no gradient says which weights to "
            "keep: unfreeze it, or leave the layer out of the plan"
        )
    require_whole(planned)
    require_free(weights)
    return planned, optimizers
