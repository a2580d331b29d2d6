"""Training all planned weights together after their blocks: the last step of `sc.thorough`."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.float64 import in_float64
from secateur.core.interrupts import putting_back
from secateur.core.undo import all_or_nothing
from secateur.model.blocks import Batch
from secateur.model.layers import weight_of
from secateur.model.outputs import answer, eval_mode
from secateur.model.statistics import is_held_out
from secateur.train.distil import distil_
from secateur.train.loss import output_loss

LEARNING_RATE = 0.003  # in units of the kept weights' root mean square


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
        with _in_float32(model, teacher), _requiring_gradients(model, weights.values()):
            distil_(
                model,
                teacher,
                [_float32(batch) for batch in trained],
                steps=epochs * len(trained),
                learning_rate=LEARNING_RATE * _kept_rms(weights),
                checkpoint=checkpoint,
            )
        after = held_out_loss(model, teacher, batches)
        if after < before:
            return before, after
        undo.restore()
        return before, before


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


def _kept_rms(weights: Mapping[str, nn.Parameter]) -> float:
    """The root mean square of all nonzero weights."""
    squares = sum(float(in_float64(w.detach()).square().sum()) for w in weights.values())
    count = sum(int(w.count_nonzero()) for w in weights.values())
    return float((squares / max(count, 1)) ** 0.5)
