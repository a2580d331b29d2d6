"""Gradients of a loss for every weight, for criteria that ask for one of `GRADIENTS`.

A sample is a row of a batch. Gradients of single samples are taken by running the model row by row,
which is exact for any model that gives a row alone the output that it has in a batch.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from secateur.core.interrupts import putting_back
from secateur.core.memory import room_for
from secateur.core.progress import progress
from secateur.model import layers as _layers
from secateur.model.blocks import Batch, find_chains, hooks
from secateur.model.calibrate import as_list
from secateur.model.distributed import ALONE, Team
from secateur.model.layers import parameter_of, weight_in, weight_of, weights_of
from secateur.model.outputs import answer, counted, eval_mode, on_device
from secateur.model.padding import SIDES, unpadded
from secateur.model.statistics import GRADIENTS

# (the model's output, the batch or row) -> the mean loss of the rows, one number
Loss = Callable[[Any, Batch], Tensor]


def gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    names: Sequence[str],
    loss: Loss | None = None,
    team: Team = ALONE,
) -> dict[str, dict[str, Float[Tensor, "out in"]]]:
    """The named statistics of each layer, in float32, for the model as it is now.

    - `gradient`: the mean over the samples of the gradient of the loss.
    - `squared_gradient`: the mean over the samples of the squared gradient of a sample's loss.
    - `regional_gradient`: the root mean square over the samples of the gradient of the norm of the
      output of the layer's block, for a given input of that block. A layer outside a list of
      blocks is a block of its own. Padding is not run, as in calibration.

    Samples come from all processes of the `team`. Names of other statistics are ignored. The
    default loss is `model_loss`. The model runs in eval mode; no parameter's `.grad` or
    `requires_grad` changes.

    Cost: a forward and a backward pass for each row; for `gradient` alone, for each batch.
        `regional_gradient` takes no loss and keeps the graph of only one block. Memory: for each
        name a float32 tensor of every layer's weight; for the first two also the model's graph and
        a gradient of all layers in their dtype.
    Raises:
        ValueError: if there is no batch, or one cannot be split into rows, the loss is not one
            finite number computed from the output, or a gradient is not finite.
    """
    wanted = [name for name in names if name in GRADIENTS]
    if not wanted or not layers:
        return {name: {} for name in layers}
    less = "leave layers out of the plan (ignore=), pass shorter batches, or take a criterion that "
    less += "needs no gradients, such as sc.wanda"
    with room_for(list(layers), f"the {' and '.join(wanted)} of all layers", less):
        return _gradients(model, layers, batches, wanted, loss, team)


def _gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    wanted: Sequence[str],
    loss: Loss | None,
    team: Team,
) -> dict[str, dict[str, Float[Tensor, "out in"]]]:
    found = {name: {key: _zeros(module) for key in wanted} for name, module in layers.items()}
    listed = [on_device(batch, model) for batch in as_list(batches)]
    weights_of(layers)  # are they ordinary?
    with (
        torch.inference_mode(False),
        team.raising_together(),
        eval_mode(model),
        torch.enable_grad(),
        _differentiable(map(parameter_of, layers.values())),
    ):
        if "regional_gradient" in wanted:
            _add_regional(model, layers, listed, found)
        if "gradient" in wanted or "squared_gradient" in wanted:
            _add(model, layers, listed, found, loss or model_loss)
        rows = sum(_row_count(batch, i) for i, batch in enumerate(listed))
    _average_(found, rows, team)
    for name, module in layers.items():
        for key, value in found[name].items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{key} of layer {name} holds NaN or infinite values: check the weights and "
                    "the data, and run the model in bfloat16 or float32"
                )
            found[name][key] = _layers.matrix(module, value)
    return found


def model_loss(output: Any, batch: Batch) -> Float[Tensor, ""]:
    """The loss of the model's task, as `task_loss`.

    Raises:
        ValueError: if the output has no loss, and is neither kind of logits.
    """
    loss = task_loss(output, batch)
    if loss is None:
        raise ValueError(
            f"gradients need a loss, and {type(output).__name__} has none: give the batches "
            "labels, or pass loss=, a function (output, batch) -> a number"
        )
    return loss


def task_loss(output: Any, batch: Batch) -> Float[Tensor, ""] | None:
    """The output's own `loss` if it has one, as with labels; else a cross-entropy in nats.

    For a classifier and a pair (inputs, labels) it is the cross-entropy of the labels. For token
    ids and logits [rows, tokens, vocabulary] it is the mean cross-entropy of the next token, over
    the tokens that are not padding. It means nothing for a model that is no causal language model:
    give such a batch labels. It is None for other outputs.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    logits = getattr(output, "logits", output)
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if isinstance(labels, Tensor) and _are_classes(labels, logits):
        return F.cross_entropy(logits.float(), labels.to(logits.device))
    if (
        not isinstance(ids, Tensor)
        or not isinstance(logits, Tensor)
        or ids.is_floating_point()
        or logits.dim() != 3
        or ids.shape != logits.shape[:2]
    ):
        return None
    tokens = counted(batch, output, ids.shape, logits.device)
    mask = tokens[:, :-1] & tokens[:, 1:]  # padding may be on the left, and predicts nothing
    return F.cross_entropy(logits[:, :-1][mask].float(), ids[:, 1:].to(logits.device)[mask])


def _are_classes(labels: Shaped[Tensor, "..."], logits: Any) -> bool:
    """Whether the labels are one integer for each row of logits [rows, classes]."""
    rows = logits.shape[:1] if isinstance(logits, Tensor) and logits.dim() == 2 else None
    return labels.shape == rows and not labels.is_floating_point()


# --- the whole model -----------------------------------------------------------------------------


def _add(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    sums: Mapping[str, Mapping[str, Tensor]],
    loss: Loss,
) -> None:
    """Add the means over all rows; rows run alone only if squared gradients are asked for."""
    rows = sum(_row_count(batch, i) for i, batch in enumerate(batches))
    alone = any("squared_gradient" in of_layer for of_layer in sums.values())
    for i, batch in enumerate(progress(batches, "gradients", within=True)):
        share = (1 if alone else _row_count(batch, i)) / rows
        for part in _rows(batch, i) if alone else (batch,):
            value = loss(answer(model, part, f"batch {i}"), part)
            _check_loss(value, i)
            for name, gradient in _gradients_of(value, layers):
                _accumulate(sums[name], gradient.float(), share)


def _accumulate(sums: Mapping[str, Tensor], gradient: Tensor, share: float) -> None:
    if "gradient" in sums:
        sums["gradient"].add_(gradient, alpha=share)
    if "squared_gradient" in sums:
        sums["squared_gradient"].addcmul_(gradient, gradient, value=share)


def _check_loss(value: Any, index: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"gradients need a loss that is one number made from the model's output, got {shape} "
            f"for batch {index}"
        )
    if not bool(value.isfinite()):
        raise ValueError(
            f"gradients need a finite loss, got {float(value.detach())} for batch {index}: check "
            "the weights, and that the batch has something to predict"
        )


# --- block by block ------------------------------------------------------------------------------


def _add_regional(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    sums: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Add the mean squared gradients of each block, which is cut off from the next one's graph."""
    rows = sum(_row_count(batch, i) for i, batch in enumerate(batches))
    sides = _sides(model, batches)
    modules = dict(model.named_modules())
    regions = {modules[block]: names for block, names in _regions(model, layers).items()}

    def before(block: nn.Module, args: Any, kwargs: Any) -> Any:
        return _detached(args), _detached(kwargs)

    def after(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor))
        norm = torch.linalg.vector_norm(first.float())
        for name, gradient in _gradients_of(norm, {n: layers[n] for n in regions[block]}):
            square = gradient.float().square()
            sums[name]["regional_gradient"].add_(square, alpha=1 / rows)
        return _detached(output)

    with (
        hooks(b.register_forward_pre_hook(before, with_kwargs=True) for b in regions),
        hooks(b.register_forward_hook(after, with_kwargs=True) for b in regions),
    ):
        for i, batch in enumerate(progress(batches, "gradients", within=True)):
            for row in _rows(batch, i):
                for part in unpadded(model, row, sides):
                    answer(model, part, f"batch {i}")


@torch.no_grad()
def _sides(model: nn.Module, batches: Sequence[Batch]) -> Collection[str]:
    """The sides whose padding the model can do without, tried on the first row that has any."""
    for i, batch in enumerate(batches):
        for row in _rows(batch, i):
            if any(part is row for part in unpadded(model, row)):
                continue
            for sides in SIDES:
                with suppress(ValueError):
                    for part in unpadded(model, row, sides):
                        answer(model, part, f"batch {i}")
                    return sides
    return SIDES[-1]


def _regions(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The layers of each block, by the block's name."""
    blocks = [block for chain in find_chains(model, layers).values() for block in chain]
    regions: dict[str, list[str]] = {}
    for name in layers:
        home = next((b for b in blocks if name.startswith(b + ".")), name)
        regions.setdefault(home, []).append(name)
    return regions


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _gradients_of(
    value: Float[Tensor, ""], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    """Each layer's name and the gradient of the value by its weight, as it is stored."""
    parameters = {id(p): p for p in map(parameter_of, layers.values())}
    found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    by_parameter = dict(zip(parameters, found, strict=True))
    for name, module in layers.items():
        whole = by_parameter[id(parameter_of(module))]
        yield name, weight_in(module, whole)


# --- small things --------------------------------------------------------------------------------


def _average_(found: Mapping[str, Mapping[str, Tensor]], rows: int, team: Team) -> None:
    """Average the processes' means, and take the roots of the regional mean squares."""
    share = rows / sum(team.all_gather(rows))
    for of_layer in found.values():
        for key, value in of_layer.items():
            if team.size > 1:
                team.all_reduce_([value.mul_(share)])
            if key == "regional_gradient":
                value.sqrt_()


def _zeros(module: nn.Module) -> Tensor:
    return torch.zeros_like(weight_of(module), dtype=torch.float32, requires_grad=False)


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make the parameters require gradients during the block."""
    with putting_back() as stack:
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        yield


def _row_count(batch: Batch, index: int) -> int:
    """The number of rows in a batch: its tensors' first size; 1 stands for one row for all."""
    sizes = {len(x) for x in _leaves(batch)[0] if _has_rows(x)}
    if not sizes or len(sizes - {1}) > 1:
        raise ValueError(
            f"gradients need batches whose tensors have one first size, the rows; batch {index} "
            f"has {sorted(sizes) or 'no tensor'}: give batches of one row"
        )
    return max(sizes)


def _rows(batch: Batch, index: int) -> Iterator[Batch]:
    """Yield each row of the batch as a batch of one."""
    leaves, spec = _leaves(batch)
    count = _row_count(batch, index)
    for i in range(count):
        take = partial(_row, i)
        yield pytree.tree_unflatten([take(x) for x in leaves], spec)


def _row(i: int, leaf: Any) -> Any:
    return leaf[i : i + 1] if _has_rows(leaf) and len(leaf) > 1 else leaf


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _leaves(batch: Batch) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
