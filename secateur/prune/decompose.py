"""A model as sparse plus low rank: weights with zeros, and a LoRA adapter found before them.

`secateur.reconstruct.compensate` adds a low-rank part to weights that are already pruned. Here the
low-rank part comes first: each weight is split in two, and while one part is pruned the other runs
beside it.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from secateur.core.autocast import without_autocast
from secateur.core.interrupts import putting_back
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.wrappers import unwrapped
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list, observe
from secateur.model.distributed import team
from secateur.model.gradients import Loss
from secateur.model.layers import weight_of
from secateur.model.plan import Plan, as_plan, match
from secateur.patterns import Pattern
from secateur.prune.passes import pass_over_, reconstruction
from secateur.prune.preconditions import require_sound
from secateur.reconstruct import (
    Blockwise,
    CompensationReport,
    Solution,
    compensate,
    low_rank_part,
)
from secateur.reconstruct.lowrank import adding, rank_within, why_not_compensated
from secateur.reconstruct.peft import require_new

__all__ = ["decompose_"]


@torch.inference_mode(False)
def decompose_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    algorithm: Callable[..., Solution] | Blockwise,
    batches: Iterable[Batch],
    folder: str | Path,
    *,
    rank: int | None = None,
    extra: float | None = None,
    loss: Loss | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> CompensationReport:
    """Prune the dense model, and write the LoRA adapter for PEFT that belongs to it.

    Like `reconstruct_` followed by `compensate`, except that the zeros are chosen with low-rank
    factors already in place: each layer's low-rank part (`secateur.reconstruct.low_rank_part`) is
    subtracted from its weight and added back by a hook, the algorithm prunes the rest by its plan,
    and `compensate` replaces the factors by the best ones for these zeros. The model ends up with
    zeros, without hooks and without the low-rank part: use it with the adapter only. `rank`,
    `extra` and the report are as in `compensate`, the rest as in `reconstruct_`. It runs in one
    process.

    Cost: `reconstruct_`, `compensate`, a pass over the data, and a copy of the planned weights on
        the CPU.
    Raises:
        ValueError: before anything is changed, if the folder exists, a layer is not linear, the
            rank does not suit a layer, or as `reconstruct_`. Whatever is raised, also by Ctrl-C,
            the model is left as it was and nothing is written.
    Source: OATS, Zhang and Papyan 2024, arXiv:2409.13652, for the order; EoRA, arXiv:2410.21271.
    """
    with all_or_nothing() as undo:
        return _decompose(
            undo, model, plan, algorithm, batches, folder, rank, extra, loss, offload, checkpoint
        )


def _decompose(
    undo: Undo,
    model: nn.Module,
    plan: Plan | Pattern | str,
    algorithm: Callable[..., Solution] | Blockwise,
    batches: Iterable[Batch],
    folder: str | Path,
    rank: int | None,
    extra: float | None,
    loss: Loss | None,
    offload: bool,
    checkpoint: str | Path | None,
) -> CompensationReport:
    begin = time.perf_counter()
    require_new(Path(folder))
    if team().size > 1:
        raise ValueError("decompose_ runs in one process: start it without torchrun")
    model = unwrapped(model)
    plan = as_plan(model, plan)
    the_pass = reconstruction(model, plan, algorithm, loss)
    layers = match(model, plan)
    require_sound(layers)
    for name, module in layers.items():
        if reason := why_not_compensated(module):
            raise ValueError(f"{name} cannot be decomposed: {reason}")
    parameters = sum(p.numel() for p in model.parameters())
    shapes = {name: _layers.matrix(module).shape for name, module in layers.items()}
    rank = rank_within(shapes, parameters, rank, extra)
    listed = as_list(batches)
    weights = {f"{name}.weight": weight_of(module).detach() for name, module in layers.items()}
    dense = model.state_dict() | {n: w.to("cpu", copy=True) for n, w in weights.items()}
    undo.remember({name: weight_of(module) for name, module in layers.items()})
    with _low_rank_parts_beside(model, plan, layers, listed, rank, offload):
        pass_over_(the_pass, listed, undo, offload=offload, checkpoint=checkpoint)
    undo.call(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    report = compensate(model, dense, listed, folder, rank=rank, offload=offload)
    return replace(report, seconds=time.perf_counter() - begin)


@contextlib.contextmanager
def _low_rank_parts_beside(
    model: nn.Module,
    plan: Plan,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    rank: int,
    offload: bool,
) -> Iterator[None]:
    """Subtract each layer's low-rank part from its weight; inside, a hook adds it back."""
    norms = observe(model, layers, batches, ["input_norm"], sequential=False, offload=offload)
    with putting_back() as stack:
        with torch.no_grad(), contextlib.closing(norms) as seen:
            for observed in seen:
                for name, statistics in observed.statistics.items():
                    module = layers[name]
                    W = _layers.matrix(module)
                    B, A = low_rank_part(W, statistics["input_norm"], plan.layers[name], rank)
                    with without_autocast(W.device):
                        rest = W.float() - B.float() @ A.float()
                    weight_of(module).copy_(_layers.from_matrix(module, rest))
                    hook = module.register_forward_hook(adding(B, A), with_kwargs=True)
                    stack.callback(hook.remove)
        yield
