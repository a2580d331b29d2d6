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
from secateur.core.undo import all_or_nothing
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.layers import weight_of
from secateur.model.outputs import answer, device_of, eval_mode
from secateur.model.statistics import is_held_out
from secateur.patterns.grids import Grid
from secateur.train.distil import Distillation, Trained, distil_, own_gradients
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
    trained = [batch for i, batch in enumerate(batches) if not is_held_out(i)]
    weights = {name: weight_of(module) for name, module in layers.items()}
    before = held_out_loss(model, teacher, batches)
    with all_or_nothing() as undo:
        undo.remember(weights)
        with (
            _in_float32(model, teacher),
            in_tf32(device_of(model)),
            _requiring_gradients(model, weights.values()),
        ):
            distil_(
                model,
                teacher,
                [_float32(batch) for batch in trained],
                steps=epochs * len(trained),
                learning_rate=LEARNING_RATE * kept_rms(weights.values()),
                checkpoint=checkpoint,
            )
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
    trained = [batch for i, batch in enumerate(batches) if not is_held_out(i)]
    weights = {name: weight_of(module) for name, module in layers.items()}
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    before = held_out_loss(model, teacher, batches)
    with all_or_nothing() as undo:
        undo.remember(weights)

        def train_(make: Callable[[float], Trained], epochs: int, rate: float, part: str) -> None:
            with (
                _in_float32(model, teacher),
                in_tf32(device_of(model)),
                _requiring_gradients(model, weights.values()),
                own_gradients(weights),
            ):
                rate *= kept_rms(weights.values())
                steps, listed = epochs * len(trained), [_float32(batch) for batch in trained]
                run = Distillation(model, teacher, listed, steps, rate, output_loss, seed=0)
                run(make(rate), checkpoint and checkpoint / part, undo)

        train_(partial(_masked, layers, masks), epochs[0], LEARNING_RATE, "off-grid")
        latent = OnGrid(layers, round_(), grid, dtypes)
        rounded = {name: weight.detach().clone() for name, weight in weights.items()}
        as_rounded = held_out_loss(model, teacher, batches)
        train_(latent.trained, epochs[1], RATE_ON_GRID, "on-grid")
        after = held_out_loss(model, teacher, batches)
        if as_rounded <= after:
            after = as_rounded
            for name, weight in weights.items():
                weight.data.copy_(rounded[name])
        if after < before:
            return before, after
        undo.restore()
        return before, before


def _masked(
    layers: Mapping[str, nn.Module],
    masks: Mapping[str, Bool[Tensor, "out in"]],
    learning_rate: float,
) -> Trained:
    """The layers' weights, of which those that the masks drop get no gradient."""
    weights = {name: weight_of(module) for name, module in layers.items()}
    dropped = {name: _layers.from_matrix(layers[name], ~mask) for name, mask in masks.items()}

    def mask_gradients_() -> None:
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(dropped[name], 0)

    optimizer = torch.optim.AdamW(weights.values(), learning_rate, weight_decay=0.0)
    return Trained(weights, optimizer, mask_gradients_)


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
