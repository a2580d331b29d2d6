"""An order of hidden units in which N:M pruning loses less and the model computes the same.

Nothing sees the order of the units between `up_proj` and `down_proj`, nor their order within a head
between `v_proj` and `o_proj`. So the columns of the second layer may be reordered to suit its
pattern if the rows of the first are reordered alike: the weights change, the function does not.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.float64 import in_float64
from secateur.core.shown import Shown, Table
from secateur.core.undo import all_or_nothing
from secateur.core.wrappers import unwrapped
from secateur.model.blocks import Batch, hooks, tensors_of
from secateur.model.calibrate import as_list
from secateur.model.gradients import Loss
from secateur.model.layers import weight_of
from secateur.model.outputs import answer, eval_mode
from secateur.model.plan import Plan, as_plan, match
from secateur.model.statistics import needed_by
from secateur.patterns import Pattern
from secateur.prune.free_dimensions import FREE, Free, Pair, find_pairs
from secateur.prune.permutation import find_permutation, kept_score
from secateur.prune.preconditions import require_sound
from secateur.reconstruct.methods import CRITERION_GIVEN
from secateur.reconstruct.scores import scores


@dataclass(frozen=True)
class PermutedLayer:
    """A layer whose inputs were reordered, with the layers whose outputs were reordered for it.

    `kept_before` and `kept` are the shares of the layer's score that its pattern keeps.
    """

    layer: str
    producers: tuple[str, ...]
    pattern: str
    kept_before: float
    kept: float


@dataclass(frozen=True)
class PermuteReport(Shown):
    """What `permute_` did, and why it left the other layers of the plan as they are."""

    layers: tuple[PermutedLayer, ...]
    left: Mapping[str, str]
    seconds: float

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "with", "pattern", "kept before", "kept")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (r.layer, ", ".join(r.producers), r.pattern, f"{r.kept_before:.2%}", f"{r.kept:.2%}")
            for r in self.layers
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        left = "".join(f"\n  {n} layers: {why}" for why, n in Counter(self.left.values()).items())
        return (
            Table(self.columns, self.rows()),
            f"permuted the inputs of {len(self.layers)} layers in {self.seconds:.1f} s"
            + (f"\nleft as they are:{left}" if left else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode(False)
def permute_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    criterion: Callable[..., Tensor],
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    free: Sequence[Free] = FREE,
) -> PermuteReport:
    """Reorder the hidden units of a dense model so that its N:M patterns keep more of the score.

    The model computes the same as before, up to rounding; prune it afterwards. Only layers whose
    inputs are a free dimension gain: the second layer of an MLP, and the output projection of
    attention within its heads, by the names in `free`. Each is verified by running the first batch
    before and after, and put back where the output changes, with the reason in the report.
    `batches` also give the criterion's statistics on the dense model; `loss` is as in `prune_`.

    Cost: two runs of the first batch for each layer permuted, besides the statistics and the
        search (`secateur.prune.permutation`).
    Raises:
        ValueError: before anything is changed, if no layer of the plan has free inputs, the plan is
            for another model, the model cannot run a batch, a score is not finite, or scipy is
            missing. Whatever is raised, also by Ctrl-C, the model is left as it was.
    """
    begin = time.perf_counter()
    model = unwrapped(model)
    plan = as_plan(model, plan)
    needed_by(criterion, given=CRITERION_GIVEN)  # refuses a function that is no criterion
    listed = as_list(batches)
    require_sound(match(model, plan))
    pairs, left = find_pairs(model, plan.layers, free)
    if not pairs:
        name, reason = next(iter(left.items()))
        raise ValueError(
            f"permute_ needs a layer with free inputs, none of the {len(left)} planned has any: "
            f"{name}: {reason}"
        )
    consumers = {name: pair.consumer for name, pair in pairs.items()}
    orders = {
        name: _order(pairs[name], found)
        for name, found in scores(model, consumers, criterion, listed, loss)
    }
    done = {}
    with all_or_nothing() as undo, torch.no_grad(), eval_mode(model):
        for name, pair in pairs.items():
            order, before, kept = orders[name]
            if not kept > before:
                left[name] = "no order was found that keeps more"
                continue
            undo.remember(pair.parameters())
            if changed := _permute_verified(model, pair, order, listed[0]):
                left[name] = changed
            else:
                done[name] = PermutedLayer(
                    name, tuple(pair.producers), str(pair.pattern), before, kept
                )
        in_order = {name: left[name] for name in plan.layers if name in left}
        return PermuteReport(tuple(done.values()), in_order, time.perf_counter() - begin)


# --- finding an order, and verifying it ----------------------------------------------------------


def _order(
    pair: Pair, scores: Float[Tensor, "out in"]
) -> tuple[Int[Tensor, "heads width"], float, float]:
    """An order for each head, and the shares of the score kept before and after."""
    if not scores.isfinite().all():
        raise ValueError(
            f"permute_ needs finite scores, {pair.name} has NaN or infinite ones: repair its "
            "weights or the data"
        )
    # 1 where all scores are zero; the absolute value, lest a negative sum turn more into less.
    total = abs(float(in_float64(scores).sum())) or 1.0
    orders, before, after = [], 0.0, 0.0
    for head in pair.columns():
        # Runs that share an order count as more rows of the same columns.
        rows = torch.cat([scores[:, run] for run in head])
        orders.append(find_permutation(rows, pair.pattern))
        before += kept_score(rows, pair.pattern) / total
        after += kept_score(rows[:, orders[-1]], pair.pattern) / total
    return torch.stack(orders), before, after


def _permute_verified(
    model: nn.Module, pair: Pair, order: Int[Tensor, "heads width"], batch: Batch
) -> str | None:
    """Permute the pair and return None, or leave it and return why."""
    before, model_before = _outputs(model, pair.consumer, batch)
    if not before or not model_before:
        what = "the model returns no tensor" if before else "it did not run"
        return f"{what} for the first batch, so another order cannot be verified"
    pair.permute_(order)
    after, model_after = _outputs(model, pair.consumer, batch)
    # Summing in another order changes the rounding, which later layers may amplify; a wrong order
    # changes a good part of the output.
    allowed = torch.finfo(weight_of(pair.consumer).dtype).eps ** 0.5
    change = _change(before + model_before, after + model_after)
    if change <= allowed:
        return None
    pair.permute_(order.argsort(1))
    return f"another order changes the output (by {change:.1g} of it): something sees the order"


def _outputs(model: nn.Module, layer: nn.Module, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The layer's outputs, call by call, and the model's outputs that are floating-point."""
    calls: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(output)

    with hooks(module.register_forward_hook(keep) for module in [layer]):
        returned = tensors_of(answer(model, batch, "batch 0"))
    return calls, [tensor for tensor in returned if tensor.is_floating_point()]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative change of a tensor, in the Euclidean norm; infinite if NaN appears."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return math.inf
    changes = [_relative_change(a, b) for a, b in zip(before, after, strict=True)]
    return max(math.inf if math.isnan(change) else change for change in changes)


def _relative_change(before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> float:
    if torch.equal(before, after):
        return 0.0
    dtype = torch.promote_types(before.dtype, torch.float32)  # squares overflow in float16
    change, whole = (torch.linalg.vector_norm(x, dtype=dtype) for x in (after - before, before))
    return float(change / whole)
