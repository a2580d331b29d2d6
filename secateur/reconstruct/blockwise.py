"""Half-block reconstruction: kept weights trained together towards the dense half-block's outputs.

Layer by layer, each weight is fitted to its own layer's outputs. Here the layers up to the next sum
into the residual stream (attention, then MLP) are fitted together to that sum: they are trained
from where the layers' own method left them, on the outputs of the pruned blocks before, towards the
dense model's stream. So they make up for one another, and for what earlier blocks lost.
Source: the idea comes from block-wise reconstruction in Li et al. (BRECQ), ICLR 2021,
arXiv:2102.05426, and for sparse weights Hubara et al. (AdaPrune), NeurIPS 2021, arXiv:2102.08124.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.float64 import float64_device, in_float64
from secateur.core.memory import room_for
from secateur.core.progress import bar
from secateur.model import layers as _layers
from secateur.model.distributed import ALONE, Team
from secateur.model.half_blocks import HalfBlock
from secateur.model.layers import weight_of
from secateur.model.statistics import is_held_out, name_of
from secateur.reconstruct.refit import refit

EPOCHS = 4
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Blockwise:
    """A method for each layer, and how half-blocks and the whole model are trained after it.

    Made by `blockwise`.
    """

    method: Callable[..., Any]
    epochs: int
    learning_rate: float
    distil: int = 0

    @property
    def name(self) -> str:
        """The call as a user writes it, without the options left at their defaults."""
        options = {
            "epochs": (self.epochs, EPOCHS),
            "learning_rate": (self.learning_rate, LEARNING_RATE),
            "distil": (self.distil, 0),
        }
        changed = [
            f", {key}={value!r}" for key, (value, usual) in options.items() if value != usual
        ]
        return f"blockwise({name_of(self.method)}{''.join(changed)})"

    def room_for(self, half: HalfBlock) -> AbstractContextManager[None]:
        """A context that names the half-block if memory runs out while it is trained."""
        less = f"pass shorter batches, or take sc.{name_of(self.method)} alone"
        return room_for(half.layers, f"training {half.name}", less)

    def rehearsal(
        self,
        half: HalfBlock,
        layers: Mapping[str, nn.Module],
        masks: Mapping[str, Bool[Tensor, "out in"]],
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """A training step on the first batch, and a look at its error, as functions to be timed.

        They do what `train_` does, on copies of the weights: the layers stay as they are.
        """
        training = _Training(half, layers, masks, ALONE)
        optimizer = training.optimizer()
        return partial(training.step, optimizer, 0), partial(training.held_out_error, [0])

    def train_(
        self,
        half: HalfBlock,
        layers: Mapping[str, nn.Module],
        masks: Mapping[str, Bool[Tensor, "out in"]],
        team: Team = ALONE,
    ) -> tuple[float, float]:
        """The half-block's error on held-out batches before and after its weights are trained.

        The error is the mean squared distance to the dense half-block's outputs over their
        variance. It is computed after every epoch, and the layers end with the best weights seen,
        the start among them: the second error is never above the first. At every step each process
        of a `team` takes a batch, and all use the mean of their gradients.
        """
        training = _Training(half, layers, masks, team)
        counts = team.all_gather(len(half.targets))
        first = sum(counts[: team.rank])  # batches are numbered as for held-out Gram matrices
        held_out = [b for b in range(len(half.targets)) if is_held_out(first + b)]
        trained = [b for b in range(len(half.targets)) if b not in held_out]
        best = {name: w.detach().clone() for name, w in training.weights.items()}
        before = after = training.held_out_error(held_out)
        longest = max(team.all_gather(len(trained)))
        steps = self.epochs * longest
        with bar(half.name, steps, unit="step", within=True) as shown:
            optimizer = training.optimizer()
            for epoch in range(self.epochs):
                for step, b in enumerate(_shuffled(trained, epoch, longest), epoch * longest):
                    rate = self.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["scale"]
                    training.step(optimizer, b)
                    shown.update()
                now = training.held_out_error(held_out)
                if now < after:
                    after = now
                    for name, weight in training.weights.items():
                        best[name].copy_(weight.detach())
        if after < before:
            for name, stored in training.stored(best).items():
                weight_of(layers[name]).copy_(stored)
        return before, after


def blockwise(
    method: Callable[..., Any],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    distil: int = 0,
) -> Blockwise:
    """The method layer by layer, then the kept weights of each half-block trained together.

    `sc.reconstruct_(model, plan, sc.blockwise(sc.alps), batches)`. A criterion's mask is refitted
    first, as by `refit`. A half-block is what lies between two sums into the residual stream; a
    block with no such point inside is trained as a whole, and layers outside a list of blocks stay
    as the method left them. Only the planned weights are trained, by Adam, one batch per step, with
    a learning rate that falls along a cosine to 0, in units of the root mean square of each layer's
    kept weights. One batch in eight is held out, and the weights that do best on the held-out
    batches are kept, the start among them. Kept weights leave a grid that an algorithm rounded to.
    Under torchrun each process takes a batch at every step: fewer and larger steps.

    After the last block, another `distil` epochs train the planned weights of all blocks together,
    in float32, towards the outputs of the dense model as `sc.distil_` does, on the same batches
    with the same ones held out; if that does not lower the loss on the held-out batches, the
    weights stay as they were before.

    Cost: the method's; each epoch a forward and a backward of every half-block, and a forward of
        what is before it in its block. Memory: weights in float32, gradients, Adam's moments and
        activations of one half-block for one batch, and up to four copies of the hidden states of
        all batches, on the CPU with `offload`. With `distil` also the dense model throughout, and
        at the end both in float32, three times the planned weights and a batch's activations.
    Raises:
        ValueError: if the method is not a function, or an option is out of range.
    Source: AdaPrune, arXiv:2102.08124; BRECQ, arXiv:2102.05426.
    """
    if not callable(method):
        raise ValueError(
            f"blockwise takes a criterion or an algorithm such as sc.alps, got {method!r}: pass "
            "the function itself"
        )
    if epochs < 1 or distil < 0 or not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(
            f"blockwise needs at least 1 epoch, a learning rate above 0 and distil at least 0, got "
            f"{epochs}, {learning_rate:g} and {distil}"
        )
    chooses = "pattern" in inspect.signature(method).parameters
    return Blockwise(method if chooses else refit(method), epochs, learning_rate, distil)


class _Training:
    """A half-block with float32 copies of its weights, which are trained in place of the stored."""

    def __init__(
        self,
        half: HalfBlock,
        layers: Mapping[str, nn.Module],
        masks: Mapping[str, Bool[Tensor, "out in"]],
        team: Team,
    ) -> None:
        self._half = half
        self._team = team
        stored = {name: weight_of(layers[name]).detach() for name in half.layers}
        self._dtypes = {name: weight.dtype for name, weight in stored.items()}
        self._dropped = {
            name: _layers.from_matrix(layers[name], ~masks[name]) for name in half.layers
        }
        self.weights = {
            name: weight.to(torch.float32, copy=True).requires_grad_()
            for name, weight in stored.items()
        }
        self._variance = self._variance_of_targets()

    def optimizer(self) -> torch.optim.Adam:
        """Adam for the weights; `scale` is the unit of each weight's learning rate."""
        return torch.optim.Adam(
            [{"params": [w], "scale": _kept_rms(w)} for w in self.weights.values()]
        )

    @torch.enable_grad()
    def step(self, optimizer: torch.optim.Adam, batch: int | None) -> None:
        """Train the weights on the batch, or on other processes' batches alone if it is None."""
        self.add_gradients(batch)
        optimizer.step()
        optimizer.zero_grad()

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as the layers will store them: with exact zeros, in the model's dtype."""
        return {
            name: weight.masked_fill(self._dropped[name], 0).to(self._dtypes[name])
            for name, weight in weights.items()
        }

    def error(self, batch: int) -> Float[Tensor, ""]:
        """The mean squared error on a batch over the variance of the targets."""
        output = self._half.output(batch, self.stored(self.weights)).float()
        target = self._half.targets[batch].to(output.device, non_blocking=True).float()
        return (output - target).square().mean() / self._variance

    def add_gradients(self, batch: int | None) -> None:
        """Give the weights the mean gradient of the processes' batches; None is no batch."""
        with self._team.raising_together():
            if batch is not None and (error := self.error(batch)).requires_grad:
                error.backward()  # else no trained weight affects this batch
        if self._team.size == 1:
            return
        had_one = float(batch is not None)
        counted = torch.tensor(had_one, dtype=torch.float32, device=self._half.device)
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        self._team.all_reduce_([counted, *gradients])
        for gradient in gradients:
            gradient /= counted

    @torch.no_grad()
    def held_out_error(self, batches: Sequence[int]) -> float:
        """The mean error on the batches of all processes."""
        sums = torch.zeros(2, device=self._half.device, dtype=torch.float32)
        with self._team.raising_together():
            for b in batches:
                sums += torch.stack([self.error(b), sums.new_ones(())])
        self._team.all_reduce_([sums])
        return float(sums[0] / sums[1])

    def _variance_of_targets(self) -> Float[Tensor, ""]:
        """The variance of the targets, all channels together."""
        device = self._half.device
        there = float64_device(device)
        n, total, squares = (torch.zeros((), device=there, dtype=torch.float64) for _ in range(3))
        for target in self._half.targets:
            y = target.to(device).float()
            n += y.numel()
            total += in_float64(y.sum())
            squares += in_float64(y.square().sum())
        self._team.all_reduce_([n, total, squares])
        variance = squares / n - (total / n).square()
        return variance.clamp(min=torch.finfo(torch.float32).tiny).float().to(device)


def _kept_rms(weight: Float[Tensor, "..."]) -> float:
    """The root mean square of the weights that are not zero."""
    w = weight.detach()
    return float(w.norm() / w.count_nonzero().clamp(min=1).float().sqrt())


def _shuffled(batches: Sequence[int], epoch: int, longest: int) -> list[int | None]:
    """The batches in a new order every epoch, then None up to the `longest` of all processes."""
    order = torch.randperm(
        len(batches), generator=torch.Generator().manual_seed(epoch), device="cpu"
    )
    return [*(batches[i] for i in order.tolist()), *[None] * (longest - len(batches))]
