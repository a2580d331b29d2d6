"""Training all planned weights together after their blocks: the last step of `sc.thorough`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.interrupts import putting_back
from secateur.core.tf32 import in_tf32
from secateur.core.undo import Undo, all_or_nothing
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.layers import parameters_of, weight_in, weight_of
from secateur.model.outputs import answer, device_of, eval_mode
from secateur.model.piece import parameter_name
from secateur.model.statistics import is_held_out
from secateur.patterns.grids import Grid
from secateur.train.distil import Distillation, Trained, own_gradients
from secateur.train.loss import output_loss
from secateur.train.on_grid import Latent, OnGrid, kept_rms

LEARNING_RATE = 0.003  # in units of the kept weights' root mean square
RATE_ON_GRID = 0.001  # the same once weights are on a grid


def train_together_(
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    epochs: int,
    checkpoint: Path | None = None,
) -> tuple[float, float]:
    """Train the kept weights of all layers; return the held-out loss before and after.

    `distil_` trains these weights alone, in float32, with zeros held, on the batches that are not
    held out, each once an epoch. Unless the trained weights, in the model's dtype, have a lower
    loss, the original ones are restored: the second loss is never above the first.

    Raises: ValueError as `distil_`; the model is left as it was.
    """
    before = held_out_loss(model, teacher, batches)
    with all_or_nothing() as undo:
        masks = {name: _layers.matrix(module) != 0 for name, module in layers.items()}
        run = _Run(model, teacher, layers, batches, undo)
        run.train_(partial(_masked, layers, masks), epochs, LEARNING_RATE, checkpoint)
        after = held_out_loss(model, teacher, batches)
        if after < before:
            return before, after
        undo.restore()
        return before, before


def train_on_grid_(
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    epochs: tuple[int, int],
    grid: Grid,
    masks: Mapping[str, Bool[Tensor, "out in"]],
    round_: Callable[[], Mapping[str, Latent]],
    checkpoint: Path | None = None,
) -> tuple[float, float]:
    """Train weights that lie on a grid, and leave them on it; the held-out loss before and after.

    First they leave the grid and train as in `train_together_`, with zeros where `masks` drop. Then
    `round_` puts them on it again, as the layers stand, and what it returns is trained straight
    through rounding. `epochs` are those off the grid and on it. Of the weights before, as rounded
    and at the end, those with the lowest loss stay.

    Raises: ValueError as `distil_`; the model is left as it was.
    """
    dtypes = {name: weight_of(module).dtype for name, module in layers.items()}
    before = held_out_loss(model, teacher, batches)
    with all_or_nothing() as undo:
        run = _Run(model, teacher, layers, batches, undo)
        off = checkpoint and checkpoint / "off-grid"
        run.train_(partial(_masked, layers, masks), epochs[0], LEARNING_RATE, off)
        latent = OnGrid(layers, round_(), grid, dtypes)
        rounded = {name: p.detach().clone() for name, p in run.parameters.items()}
        as_rounded = held_out_loss(model, teacher, batches)
        run.train_(latent.trained, epochs[1], RATE_ON_GRID, checkpoint and checkpoint / "on-grid")
        after = held_out_loss(model, teacher, batches)
        if as_rounded <= after:
            after = as_rounded
            for name, parameter in run.parameters.items():
                parameter.data.copy_(rounded[name])
        if after < before:
            return before, after
        undo.restore()
        return before, before


class _Run:
    """A training of some layers' weights on the batches that are not held out, each once an epoch.

    It is that of `distil_`, in float32, and `undo` puts back what was there before.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        undo: Undo,
    ) -> None:
        self._model, self._teacher, self._layers, self._undo = model, teacher, layers, undo
        self._batches = [batch for i, batch in enumerate(batches) if not is_held_out(i)]
        self.parameters = parameters_of(layers)
        undo.remember(self.parameters)

    def train_(
        self, make: Callable[[float], Trained], epochs: int, rate: float, checkpoint: Path | None
    ) -> None:
        """Train what `make` makes for a learning rate, of which `rate` is in units of the weights.

        Raises: ValueError as `distil_`.
        """
        with (
            _in_float32(self._model, self._teacher),
            in_tf32(device_of(self._model)),
            _requiring_gradients(self._model, self.parameters.values()),
            own_gradients(self.parameters),
        ):
            unit = kept_rms(weight_of(module) for module in self._layers.values())
            steps, listed = epochs * len(self._batches), [_float32(b) for b in self._batches]
            run = Distillation(
                self._model, self._teacher, listed, steps, rate * unit, output_loss, seed=0
            )
            run(make(rate * unit), checkpoint, self._undo)


def _masked(
    layers: Mapping[str, nn.Module],
    masks: Mapping[str, Bool[Tensor, "out in"]],
    learning_rate: float,
) -> Trained:
    """The parameters with the layers' weights; only what the masks keep gets a gradient."""
    parameters = parameters_of(layers)
    fixed = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for name, module in layers.items():
        dropped = weight_in(module, fixed[parameter_name(name, module)])
        dropped.copy_(_layers.from_matrix(module, ~masks[name]))

    def mask_gradients_() -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(fixed[name], 0)

    optimizer = torch.optim.AdamW(parameters.values(), learning_rate, weight_decay=0.0)
    return Trained(parameters, optimizer, mask_gradients_)


@torch.no_grad()
def held_out_loss(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean of `output_loss` over the held-out batches.

    Raises: ValueError if there is none, or an output has no such loss.
    """
    held_out = {i: batch for i, batch in enumerate(batches) if is_held_out(i)}
    if not held_out:
        raise ValueError(
            f"training the whole model needs a batch to hold out, the second, got {len(batches)}: "
            "pass more batches"
        )
    with eval_mode(model, teacher):
        losses = [
            output_loss(answer(model, batch, where), answer(teacher, batch, where), batch)
            for i, batch in held_out.items()
            for where in [f"batch {i}"]
        ]
    return float(torch.stack([loss.float() for loss in losses]).mean())


@contextlib.contextmanager
def _in_float32(*models: nn.Module) -> Iterator[None]:
    """Hold 16-bit parameters and buffers in float32 inside the block."""
    small = {
        tensor: tensor.dtype
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    }
    with putting_back() as stack:
        for tensor, dtype in small.items():
            stack.callback(_cast_, tensor, dtype)
            tensor.data = tensor.data.float()
        yield


def _cast_(tensor: Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)


def _float32(batch: Batch) -> Batch:
    """The batch with its 16-bit tensors in float32."""

    def raised(leaf: Any) -> Any:
        is_small = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
        return leaf.float() if is_small else leaf

    made: Batch = pytree.tree_map(raised, batch)
    return made


@contextlib.contextmanager
def _requiring_gradients(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only these weights require gradients inside the block."""
    with putting_back() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_()
        yield
