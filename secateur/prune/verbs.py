"""The verbs of the half that finds sparse weights: `prune_`, `reconstruct_` and `check`."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.undo import all_or_nothing
from secateur.core.wrappers import unwrapped
from secateur.criteria import magnitude
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.gradients import Loss
from secateur.model.plan import Plan, as_plan, match
from secateur.patterns import Pattern
from secateur.prune.passes import Pass, pass_over_, reconstruction
from secateur.prune.preconditions import require_sound
from secateur.prune.report import LayerResult, PruneReport
from secateur.reconstruct import Blockwise, Solution
from secateur.reconstruct.methods import bind_criterion

__all__ = ["LayerResult", "PruneReport", "check", "prune_", "reconstruct_"]


@torch.inference_mode(False)  # the caller's would forbid training, and writing to weights
def prune_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    criterion: Callable[..., Tensor] = magnitude,
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    keep_zeros: bool = False,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> PruneReport:
    """Zero the weights that the criterion scores lowest; a kept weight never changes.

    The criterion's statistics are gathered from `batches`, block by block, each block on the
    outputs of the pruned blocks before it. Gradients, where the criterion asks for them, are taken
    on the dense model: of `loss(output, batch)`, by default
    `secateur.model.gradients.model_loss`, the loss for labels or of the next token. With
    `keep_zeros`, weights that are zero already are the first that the pattern drops, and all of
    them stay zero. `offload` keeps activations between blocks on the CPU. With `checkpoint`, a
    folder, finished layers are kept there, and the same call continues where an interrupted one
    stopped.

    Where `torch.distributed` is initialised (torchrun) and data is needed, every process makes this
    call with its own batches, any number of them. Statistics cover all batches, layers that do not
    depend on one another are solved by different processes, and all end with the same model. A
    checkpoint has to be a folder that all of them can see.

    Error: with several processes, the order in which float32 sums are added up.
    Raises:
        ValueError: before anything is changed, if the plan is for another model, weights are not
            finite, are parametrized or are held in training, or data is needed and missing.
            Whatever is raised, also by Ctrl-C, the model is left as it was.
        MemoryError: if a layer, which is named, needs more memory than there is; on a GPU it is a
            torch.OutOfMemoryError.
    """
    method = bind_criterion(criterion)
    model = unwrapped(model)
    the_pass = Pass(model, as_plan(model, plan), method, loss, keep_zeros=keep_zeros)
    with all_or_nothing() as undo:
        return pass_over_(the_pass, batches, undo, offload=offload, checkpoint=checkpoint)


@torch.inference_mode(False)
def reconstruct_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    algorithm: Callable[..., Solution] | Blockwise,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    keep_zeros: bool = False,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> PruneReport:
    """Zero weights and refit the kept ones to the layers' outputs on the calibration batches.

    Layers are solved in the order in which they run, each on inputs from the layers already done.
    With `sc.blockwise(sc.alps)` the kept weights of each half-block are then trained together. A
    weight that is zero may get a value, unless `keep_zeros`; a warning says so beforehand if the
    plan has fewer zeros than a layer, by more than 1 % of its weights.
    Set an algorithm's options with `functools.partial(sc.sparsegpt, damping=0.1)`. The rest is as
    in `prune_`.

    Raises:
        ValueError: as `prune_`, and if the algorithm cannot solve a layer. Whatever is raised, also
            by Ctrl-C, the model is left as it was.
    """
    model = unwrapped(model)
    the_pass = reconstruction(model, as_plan(model, plan), algorithm, loss, keep_zeros=keep_zeros)
    with all_or_nothing() as undo:
        return pass_over_(the_pass, batches, undo, offload=offload, checkpoint=checkpoint)


@torch.no_grad()
def check(model: nn.Module, plan: Plan | Pattern | str) -> dict[str, float]:
    """The sparsity of every planned layer, once the contract has been verified on the model.

    The contract: each layer's weight is an ordinary finite parameter whose exact zeros satisfy the
    layer's pattern. Any model will do, whoever pruned it. A pattern stands for the plan that gives
    it to every layer.

    Raises:
        ValueError: if any layer breaks it, with all such layers and the first place in each.
    """
    plan = as_plan(model, plan)
    layers = match(model, plan)
    require_sound(layers, written=False)
    masks = {name: _layers.matrix(module) != 0 for name, module in layers.items()}
    broken = {
        name: violation
        for name, mask in masks.items()
        if (violation := plan.layers[name].violation(mask)) is not None
    }
    if broken:
        listed = "; ".join(f"{name} ({plan.layers[name]}) {why}" for name, why in broken.items())
        raise ValueError(
            f"{len(broken)} of {len(layers)} layers break the plan: {listed}. Zeros are lost by "
            "training without sc.hold and by merging a dense adapter other than by "
            "secateur.integrations.peft.merge_adapters_"
        )
    return {name: float((~mask).float().mean()) for name, mask in masks.items()}
