"""Half-block reconstruction: kept weights trained together towards the dense half-block's outputs.

Layer by layer, each weight is fitted to its own layer's outputs. Here the layers up to the next sum
into the residual stream (attention, then MLP) are fitted together to that sum: they are trained
from where the layers' own method left them, on the outputs of the pruned blocks before, towards the
dense model's stream. So they make up for one another, and for what earlier blocks lost.

With a grid, a half-block is trained without it first, because rounding by the layers' own Gram
matrices (`rounding`) loses less than training that rounds from its first step. Then all of its
weights are rounded, and trained on with gradients straight through, at a lower rate, scales too.
Source: the idea comes from block-wise reconstruction in Li et al. (BRECQ), ICLR 2021,
arXiv:2102.05426, and for sparse weights Hubara et al. (AdaPrune), NeurIPS 2021, arXiv:2102.08124.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.autocast import without_autocast
from secateur.core.float64 import float64_device, in_float64
from secateur.core.graphs import Replayed
from secateur.core.memory import room_for
from secateur.core.progress import bar
from secateur.core.tf32 import in_tf32
from secateur.model import layers as _layers
from secateur.model.blocks import hooks, input_of
from secateur.model.distributed import ALONE, Team
from secateur.model.half_blocks import Arguments, HalfBlock
from secateur.model.layers import weight_of
from secateur.model.statistics import Gram, is_held_out, name_of
from secateur.patterns.grids import Grid, require_grid
from secateur.reconstruct.methods import naming
from secateur.reconstruct.refit import refit
from secateur.reconstruct.rounding import rounded

EPOCHS = 4
LEARNING_RATE = 0.01

# On a grid: the share of the learning rate, and that of scales beside weights, both in units of
# their root mean square. At the whole rate few steps undo what rounding found.
RATE_ROUNDED, RATE_OF_SCALES = 0.3, 0.1


@dataclass(frozen=True)
class Blockwise:
    """A method for each layer, and how half-blocks and the whole model are trained after it.

    Made by `blockwise`.
    """

    method: Callable[..., Any]
    epochs: int
    learning_rate: float
    distil: int = 0
    grid: Grid | None = None

    @property
    def epochs_on_grid(self) -> int:
        """Epochs of a half-block once its weights are on the grid: half as many as before."""
        return math.ceil(self.epochs / 2) if self.grid else 0

    @property
    def distil_on_grid(self) -> int:
        """The same for the whole model."""
        return math.ceil(self.distil / 2) if self.grid else 0

    @property
    def alone(self) -> Callable[..., Any]:
        """The method for a layer that is in no half-block; it asks for all that `method` does."""
        if self.grid is None:
            return self.method
        if "grid" in inspect.signature(self.method).parameters:
            return partial(self.method, grid=self.grid)
        return refit(self.method, grid=self.grid)

    @property
    def name(self) -> str:
        """The call as a user writes it, without the options left at their defaults."""
        options = {
            "epochs": (self.epochs, EPOCHS),
            "learning_rate": (self.learning_rate, LEARNING_RATE),
            "distil": (self.distil, 0),
            "grid": (self.grid, None),
        }
        changed = [
            f", {key}={value!r}" for key, (value, usual) in options.items() if value != usual
        ]
        return f"blockwise({name_of(self.method)}{''.join(changed)})"

    def room_for(self, half: HalfBlock) -> AbstractContextManager[None]:
        """A context that names the half-block if memory runs out while it is trained."""
        less = f"pass shorter batches, or take sc.{name_of(self.method)} alone"
        return room_for([*half.layers], f"training {half.name}", less)

    def rehearsal(
        self,
        half: HalfBlock,
        masks: Mapping[str, Bool[Tensor, "out in"]],
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """A training step on the first batch, and a look at its error, as functions to be timed.

        They do what `train_` does, on copies of the weights: the layers stay as they are.
        """
        training = _Training(half, masks, ALONE)
        optimizer = training.optimizer()
        gradients = Replayed(training.error_and_gradients, training.device)
        step = partial(training.step, optimizer, gradients, 0)
        return step, partial(training.held_out_error, [0])

    def train_(
        self,
        half: HalfBlock,
        masks: Mapping[str, Bool[Tensor, "out in"]],
        team: Team = ALONE,
    ) -> tuple[float, float]:
        """The half-block's error on held-out batches before and after its weights are trained.

        The error is the mean squared distance to the dense half-block's outputs over their
        variance. It is computed after every epoch, and the layers end with the best weights seen,
        the start among them: the second error is never above the first. With a grid the layers end
        with the best weights seen on it, and the second error is theirs. At every step each process
        of a `team` takes a batch, and all use the mean of their gradients.
        """
        training = _Training(half, masks, team)
        counts = team.all_gather(len(half.targets))
        first = sum(counts[: team.rank])  # batches are numbered as for held-out Gram matrices
        held_out = [b for b in range(len(half.targets)) if is_held_out(first + b)]
        trained = [b for b in range(len(half.targets)) if b not in held_out]
        before, after = self._fitted_(training, trained, held_out, self.epochs, self.learning_rate)
        if self.grid is not None:
            training.round_(self.grid)
            rate = RATE_ROUNDED * self.learning_rate
            _, after = self._fitted_(training, trained, held_out, self.epochs_on_grid, rate)
        if after < before or self.grid is not None:
            for name, stored in training.stored().items():
                weight_of(half.layers[name]).copy_(stored)
        return before, after

    def _fitted_(
        self,
        training: "_Training",
        trained: Sequence[int],
        held_out: Sequence[int],
        epochs: int,
        learning_rate: float,
    ) -> tuple[float, float]:
        """The held-out error at the start, and the least since then, whose weights stay."""
        longest = max(training.team.all_gather(len(trained)))
        steps = epochs * longest
        shown = bar(training.name, steps, unit="step", within=True)
        with shown, in_tf32(training.device):
            best, start = training.copies(), training.held_out_error(held_out)
            least, optimizer = start, training.optimizer()
            gradients = Replayed(training.error_and_gradients, training.device)
            for epoch in range(epochs):
                for step, b in enumerate(_shuffled(trained, epoch, longest), epoch * longest):
                    rate = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["scale"]
                    training.step(optimizer, gradients, b)
                    shown.update()
                now = training.held_out_error(held_out)
                if now < least:
                    best, least = training.copies(), now
        for tensor, kept in zip(training.tensors, best, strict=True):
            tensor.data.copy_(kept)
        return start, least


def blockwise(
    method: Callable[..., Any],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    distil: int = 0,
    grid: Grid | None = None,
) -> Blockwise:
    """The method layer by layer, then the kept weights of each half-block trained together.

    `sc.reconstruct_(model, plan, sc.blockwise(sc.alps), batches)`. A criterion's mask is refitted
    first, as by `refit`. A half-block is what lies between two sums into the residual stream; a
    block with no such point inside is trained as a whole, and layers outside a list of blocks stay
    as the method left them. Only the planned weights are trained, by Adam, one batch per step, with
    a learning rate that falls along a cosine to 0, in units of the root mean square of each layer's
    kept weights. One batch in eight is held out, and the weights that do best on the held-out
    batches are kept, the start among them. Under torchrun each process takes a batch at every
    step: fewer and larger steps.

    After the last block, another `distil` epochs train the planned weights of all blocks together,
    in float32, towards the outputs of the dense model as `sc.distil_` does, on the same batches
    with the same ones held out; if that does not lower the loss on the held-out batches, the
    weights stay as they were before.

    With a `grid` the kept weights end on it, for packing to find without loss, and the weights of
    `sc.Unstructured(0.0)` are all kept. Each half-block is trained as without, then rounded as by
    `secateur.reconstruct.refitted`, and trained for half as many epochs with gradients straight
    through rounding, scales too. So is the whole model, whose weights leave the grid for `distil`
    epochs. Layers in no half-block are given to the method with this grid, or, where it has no such
    option, refitted. Without a `grid`, kept weights leave one that a method rounded to.

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
    require_grid(grid, "blockwise")
    chooses = "pattern" in inspect.signature(method).parameters
    return Blockwise(method if chooses else refit(method), epochs, learning_rate, distil, grid)


class _Training:
    """A half-block with float32 copies of its weights, which are trained in place of the stored."""

    def __init__(
        self,
        half: HalfBlock,
        masks: Mapping[str, Bool[Tensor, "out in"]],
        team: Team,
    ) -> None:
        self._half, self._layers = half, half.layers
        self.name, self.team, self.device = half.name, team, half.device
        stored = {name: weight_of(m).detach() for name, m in half.layers.items()}
        self._dtypes = {name: weight.dtype for name, weight in stored.items()}
        self._masks = {name: masks[name] for name in half.layers}
        self._dropped = {
            name: _layers.from_matrix(m, ~masks[name]) for name, m in half.layers.items()
        }
        self._grid: Grid | None = None
        self.scales: dict[str, Tensor] = {}
        self.weights = {
            name: weight.to(torch.float32, copy=True).requires_grad_()
            for name, weight in stored.items()
        }
        self._variance = self._variance_of_targets()

    @property
    def tensors(self) -> list[Tensor]:
        """What is trained: the weights, and their scales once they are on a grid."""
        return [*self.weights.values(), *self.scales.values()]

    def copies(self) -> list[Tensor]:
        """Copies of what is trained, as it is now."""
        return [tensor.detach().clone() for tensor in self.tensors]

    def optimizer(self) -> torch.optim.Adam:
        """Adam for what is trained; `scale` is the unit of each tensor's learning rate."""
        units = [_kept_rms(w) for w in self.weights.values()]
        units += [RATE_OF_SCALES * _kept_rms(s) for s in self.scales.values()]
        groups = zip(self.tensors, units, strict=True)
        by_tensor = [{"params": [t], "scale": unit} for t, unit in groups]
        return torch.optim.Adam(by_tensor, fused=self.device.type == "cuda" or None)

    @torch.enable_grad()
    def step(self, optimizer: torch.optim.Adam, gradients: Replayed, batch: int | None) -> None:
        """Train on the batch, or on other processes' batches alone if it is None.

        `gradients` does what `error_and_gradients` does.
        """
        self.add_gradients(gradients, batch)
        optimizer.step()
        optimizer.zero_grad()

    def stored(self) -> dict[str, Tensor]:
        """The weights as the layers will store them: with exact zeros, in the model's dtype."""
        return {name: self._stored(name, weight) for name, weight in self.weights.items()}

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        module, dtype = self._layers[name], self._dtypes[name]
        if self._grid is not None:
            matrix = _layers.matrix(module, weight)
            on_grid = self._grid.straight_through(matrix, self.scales[name], dtype)
            weight = _layers.from_matrix(module, on_grid)
        return weight.masked_fill(self._dropped[name], 0).to(dtype)

    @torch.no_grad()
    def round_(self, grid: Grid) -> None:
        """Put the weights on the grid, each layer by what it sees on the batches of all processes.

        Layers see what the weights as trained pass on. What is trained from now on are the scales,
        and weights that round to the codes found.
        """
        grams = self._grams()
        for name, weight in self.weights.items():
            module = self._layers[name]
            with naming(name), without_autocast(self.device):
                found = rounded(
                    _layers.matrix(module, weight.detach()),
                    self._masks[name],
                    grams.pop(name),
                    grid,
                    dtype=self._dtypes[name],
                )
            weight.copy_(_layers.from_matrix(module, found.latent))
            self.scales[name] = found.scales.float().requires_grad_()
        self._grid = grid

    def _grams(self) -> dict[str, Float[Tensor, "in in"]]:
        """The Gram matrix of each layer's inputs on all batches, of which some layers share one."""
        columns = {n: _layers.matrix(self._layers[n], w).shape[1] for n, w in self.weights.items()}
        device = self.device
        sums = {
            n: torch.zeros(c, c, device=device, dtype=torch.float32) for n, c in columns.items()
        }
        tokens = dict.fromkeys(columns, 0)
        # By input, which is held so that no other one gets its id: the products, and how many rows.
        found: dict[Hashable, tuple[Tensor, Tensor, int]] = {}

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            x = input_of(args, kwargs)
            key = id(x), _layers.rows_key(module)
            if key not in found:
                rows, gram = _layers.input_rows(module, x), Gram(columns[name], device)
                with without_autocast(device):
                    gram.update(rows, 0)
                found[key] = x, gram.sums[0], len(rows)
            sums[name] += found[key][1]
            tokens[name] += found[key][2]

        run = ((self._layers[n], partial(before, n)) for n in columns)
        with (
            self.team.raising_together(),
            hooks(m.register_forward_pre_hook(look, with_kwargs=True) for m, look in run),
        ):
            for b in range(len(self._half.targets)):
                self._half.output(b, self.stored())
                found.clear()
        self.team.all_reduce_(list(sums.values()))
        everywhere = self.team.all_gather(tokens)
        return {n: g / max(1, sum(seen[n] for seen in everywhere)) for n, g in sums.items()}

    def error(self, batch: int) -> Float[Tensor, ""]:
        """The mean squared error on a batch over the variance of the targets."""
        return self._error((self._half.given(batch), self._half.targets[batch]))

    def _error(self, given: tuple[Sequence[Arguments], Tensor]) -> Float[Tensor, ""]:
        arguments, target = given
        output = self._half.output_for(arguments, self.stored()).float()
        target = target.to(output.device, non_blocking=True).float()
        return (output - target).square().mean() / self._variance

    def error_and_gradients(self, given: tuple[Sequence[Arguments], Tensor]) -> list[Tensor | None]:
        """The error, and the gradients of what is trained; None where it has none."""
        for tensor in self.tensors:
            tensor.grad = None
        if (error := self._error(given)).requires_grad:
            error.backward()  # else no trained weight affects this batch
        return [error.detach(), *(tensor.grad for tensor in self.tensors)]

    def add_gradients(self, gradients: Replayed, batch: int | None) -> None:
        """Give the weights the mean gradient of the processes' batches; None is no batch."""
        with self.team.raising_together():
            if batch is not None:
                given = self._half.given(batch), self._half.targets[batch]
                _, *found = gradients(given)
                for tensor, gradient in zip(self.tensors, found, strict=True):
                    tensor.grad = gradient
        if self.team.size == 1:
            return
        had_one = float(batch is not None)
        counted = torch.tensor(had_one, dtype=torch.float32, device=self.device)
        for tensor in self.tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        summed = [tensor.grad for tensor in self.tensors if tensor.grad is not None]
        self.team.all_reduce_([counted, *summed])
        for gradient in summed:
            gradient /= counted

    @torch.no_grad()
    def held_out_error(self, batches: Sequence[int]) -> float:
        """The mean error on the batches of all processes."""
        sums = torch.zeros(2, device=self.device, dtype=torch.float32)
        with self.team.raising_together():
            for b in batches:
                sums += torch.stack([self.error(b), sums.new_ones(())])
        self.team.all_reduce_([sums])
        return float(sums[0] / sums[1])

    def _variance_of_targets(self) -> Float[Tensor, ""]:
        """The variance of the targets, all channels together."""
        device = self.device
        there = float64_device(device)
        n, total, squares = (torch.zeros((), device=there, dtype=torch.float64) for _ in range(3))
        for target in self._half.targets:
            y = target.to(device).float()
            n += y.numel()
            total += in_float64(y.sum())
            squares += in_float64(y.square().sum())
        self.team.all_reduce_([n, total, squares])
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
