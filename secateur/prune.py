"""The verbs of the front half: `prune_`, `reconstruct_` and `check`."""

import contextlib
import inspect
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from secateur import layers as _layers
from secateur.calibrate import Observed, as_list, observe
from secateur.checkpoint import Checkpoint
from secateur.criteria import magnitude
from secateur.gradients import Loss, gradients
from secateur.layers import weight_of
from secateur.patterns import Pattern
from secateur.plan import Plan, as_plan, match
from secateur.reconstruct import Blockwise, Solution, refit, swap
from secateur.replay import Batch
from secateur.statistics import STATISTICS, call_with, name_of, needed_by, score
from secateur.tables import text_table
from secateur.undo import all_or_nothing


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    `error` is the share of the layer's output energy that is lost, ||(W - W')X||^2 / ||WX||^2 on
    the calibration inputs; None where the method does not gather what it takes to know.
    """

    layer: str
    pattern: str
    sparsity_before: float
    sparsity: float
    error: float | None
    tokens: int
    note: str


@dataclass(frozen=True)
class PruneReport:
    """What `prune_` or `reconstruct_` did, layer by layer."""

    method: str
    layers: tuple[LayerResult, ...]
    seconds: float

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "pattern", "sparsity", "output error", "tokens", "note")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.layer,
                r.pattern,
                f"{r.sparsity:.2%}",
                "-" if r.error is None else f"{r.error:.4f}",
                f"{r.tokens:,}",
                r.note,
            )
            for r in self.layers
        ]

    def __str__(self) -> str:
        head = f"{self.method}: {len(self.layers)} layers in {self.seconds:.1f} s"
        return f"{text_table(self.columns, self.rows())}\n{head}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prune_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    criterion: Callable[..., Tensor] = magnitude,
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> PruneReport:
    """Zero the weights that the criterion scores lowest; a kept weight never changes.

    `batches` is what the criterion's statistics are gathered from, block by block, each block on
    inputs that the pruned blocks before it made. Gradients, where the criterion names them, are
    those of the dense model: of `loss(output, batch)`, by default `secateur.gradients.model_loss`,
    the loss for labels or of the next token. `offload` keeps activations between blocks on the
    CPU. With `checkpoint`, a folder, finished layers are kept there and the same call goes on
    where an interrupted one stopped.

    Raises:
        ValueError: before anything is changed, if the plan is for another model, weights are not
            finite or parametrized, or data is needed and missing. Whatever is raised, also by
            Ctrl-C, the model is left as it was.
    """
    _require_kind(criterion, is_algorithm=False)
    needs = needed_by(criterion, given=("weight", "layer_seed"))

    def solve(available: Mapping[str, Any], name: str) -> Solution:
        weight = available["weight"]
        mask = available["pattern"].mask(score(criterion, name, weight, available))
        return Solution(weight.masked_fill(~mask, 0), mask)

    run = _Run(model, as_plan(model, plan), name_of(criterion), needs, solve, loss, False)
    return run(batches, offload, checkpoint)


def reconstruct_(
    model: nn.Module,
    plan: Plan | Pattern | str,
    algorithm: Callable[..., Solution] | Blockwise,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> PruneReport:
    """Zero weights and refit the kept ones to the layers' outputs on the calibration batches.

    Layers come in the order in which they run, each on inputs made by the layers already done.
    With `sc.blockwise(sc.alps)` the kept weights of each half-block are trained together then.
    Options of an algorithm are fixed with `functools.partial(sc.sparsegpt, damping=0.1)`. The rest
    is as in `prune_`.

    Raises:
        ValueError: as `prune_`, and if the algorithm cannot solve a layer. Whatever is raised, also
            by Ctrl-C, the model is left as it was.
    """
    blockwise: Blockwise | None = None
    method: Callable[..., Solution]
    if isinstance(algorithm, Blockwise):
        blockwise, method = algorithm, algorithm.method
    else:
        method = algorithm
    name = blockwise.name if blockwise else name_of(method)
    _require_kind(method, is_algorithm=True)
    needs = needed_by(method, given=("weight", "pattern", "dtype", "layer"))

    def solve(available: Mapping[str, Any], layer: str) -> Solution:
        try:
            solution: Solution = call_with(method, {**available, "layer": layer})
            return solution
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error

    run = _Run(model, as_plan(model, plan), name, needs, solve, loss, True, blockwise)
    return run(batches, offload, checkpoint)


def check(model: nn.Module, plan: Plan | Pattern | str) -> dict[str, float]:
    """The sparsity of every planned layer, once the contract is verified on the model as it is.

    The contract: each layer's weight is an ordinary finite parameter whose exact zeros satisfy the
    layer's pattern. Any model will do, whoever pruned it. A pattern stands for the plan that gives
    it to every layer.

    Raises:
        ValueError: if any layer breaks it, with all those layers and the first place in each.
    """
    plan = as_plan(model, plan)
    layers = match(model, plan)
    _require_sound(layers)
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
            "training without sc.hold and by merging a dense adapter"
        )
    return {name: float((~mask).float().mean()) for name, mask in masks.items()}


@dataclass(frozen=True)
class _Run:
    """One pass that gives every planned layer a new weight, or leaves all as they were."""

    model: nn.Module
    plan: Plan
    method: str
    needs: tuple[str, ...]
    solve: Callable[[Mapping[str, Any], str], Solution]
    loss: Loss | None
    sequential: bool
    blockwise: Blockwise | None = None

    def __call__(
        self, batches: Iterable[Batch] | None, offload: bool, checkpoint: str | Path | None
    ) -> PruneReport:
        layers = match(self.model, self.plan)
        _require_sound(layers)
        if self.needs and batches is None:
            raise ValueError(
                f"{self.method} needs calibration data for {', '.join(self.needs)}: pass batches, "
                "or use sc.magnitude"
            )
        begin = time.perf_counter()
        saved = Checkpoint(checkpoint, self._fingerprint(layers)) if checkpoint else None
        finished = saved.finished() if saved else {}
        missing = {name: m for name, m in layers.items() if name not in finished}
        asks = bool(self.needs or self.blockwise)
        listed = as_list(batches) if missing and asks and batches is not None else []
        found = gradients(self.model, missing, listed, self.needs, self.loss)
        results: dict[str, LayerResult] = {}
        masks: dict[str, Tensor] = {}
        with all_or_nothing() as undo, torch.no_grad():
            bar = tqdm(total=len(layers), desc=self.method, disable=None)
            with (
                bar,
                contextlib.closing(self._observed(layers, finished, listed, offload)) as source,
            ):
                for observed in source:
                    stage = {name: layers[name] for name in observed.statistics}
                    undo.remember({name: weight_of(module) for name, module in stage.items()})
                    for name, module in stage.items():
                        if name in finished:
                            weight, row = finished[name]
                            weight_of(module).copy_(weight)
                            results[name] = LayerResult(**row)
                        else:
                            statistics = {**observed.statistics[name], **found.pop(name)}
                            tokens = observed.tokens[name]
                            results[name], masks[name] = self._change(
                                name, module, statistics, tokens
                            )
                        bar.update()
                    done = self._trained(observed, layers, masks, results)
                    if saved and done:
                        weights = {name: weight_of(layers[name]) for name in done}
                        saved.add(weights, {name: asdict(results[name]) for name in done})
        in_order = tuple(results[name] for name in layers)
        return PruneReport(self.method, in_order, time.perf_counter() - begin)

    def _observed(
        self,
        layers: Mapping[str, nn.Module],
        finished: Collection[str],
        batches: Iterable[Batch],
        offload: bool,
    ) -> Generator[Observed]:
        sums = [name for name in self.needs if name in STATISTICS]
        if len(finished) == len(layers) or not (sums or self.blockwise):
            yield from (Observed(name, {name: {}}, {name: 0}) for name in layers)
        else:
            yield from observe(
                self.model,
                layers,
                batches,
                sums,
                sequential=self.sequential,
                offload=offload,
                halves=self.blockwise is not None,
                finished=finished,
            )

    def _trained(
        self,
        observed: Observed,
        layers: Mapping[str, nn.Module],
        masks: dict[str, Tensor],
        results: dict[str, LayerResult],
    ) -> Sequence[str]:
        """The layers that are final now: those observed, or their half-block, once it is trained.

        What was finished before is final too, but not anew.
        """
        half = observed.half
        if half is None or self.blockwise is None:
            return [name for name in observed.statistics if masks.pop(name, None) is not None]
        if not all(name in masks for name in half.layers):
            return []
        before, after = self.blockwise.train_(half, layers, masks)
        for name in half.layers:
            del masks[name]
            if after < before:  # moved since, so that it is another now
                results[name] = replace(results[name], error=None)
        last = results[half.layers[-1]]
        note = f"{half.name}: held-out error {before:.4g} before training, {after:.4g} after"
        results[last.layer] = replace(last, note="; ".join(filter(None, [last.note, note])))
        return half.layers

    def _change(
        self, name: str, module: nn.Module, statistics: Mapping[str, Tensor], tokens: int
    ) -> tuple[LayerResult, Tensor]:
        pattern = self.plan.layers[name]
        before = _layers.matrix(module).to(torch.float32, copy=True)
        available = {
            "weight": before.clone(),
            "pattern": pattern,
            "dtype": weight_of(module).dtype,
            **statistics,
        }
        solution = self.solve(available, name)
        if (violation := pattern.violation(solution.mask)) is not None:
            raise ValueError(
                f"{self.method} needs to give {name} a mask of {pattern}, its mask {violation}"
            )
        new = solution.weight.masked_fill(~solution.mask, 0)
        if not new.isfinite().all():
            raise ValueError(
                f"{self.method} gave layer {name} weights that are not finite: add calibration "
                "data or raise the damping"
            )
        weight_of(module).copy_(_layers.like_weight(module, new))
        after = _layers.matrix(module).float()
        result = LayerResult(
            name,
            str(pattern),
            float((before == 0).float().mean()),
            float((after == 0).float().mean()),
            _output_error(before, after, statistics.get("gram")),
            tokens,
            solution.note,
        )
        return result, solution.mask

    def _fingerprint(self, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
        sums = {
            name: float(weight_of(m).detach().double().abs().sum()) for name, m in layers.items()
        }
        return {"method": self.method, "plan": self.plan.to_dict()["layers"], "weights": sums}


def _require_kind(function: Callable[..., Any], is_algorithm: bool) -> None:
    """An algorithm asks for the pattern, a criterion does not: tell who mixes them up."""
    if not callable(function):
        raise ValueError(
            f"prune_ and reconstruct_ take functions such as sc.wanda, got {function!r}: pass the "
            "function itself"
        )
    if function in (refit, swap):
        name = name_of(function)
        raise ValueError(
            f"{name} makes an algorithm of a criterion or another algorithm: pass "
            f"sc.{name}(sc.wanda)"
        )
    if ("pattern" in inspect.signature(function).parameters) == is_algorithm:
        return
    name = name_of(function)
    if is_algorithm:
        raise ValueError(f"{name} only scores weights, reconstruct_ refits them: use prune_")
    raise ValueError(f"{name} refits weights, prune_ changes none that it keeps: use reconstruct_")


def _require_sound(layers: Mapping[str, nn.Module]) -> None:
    """Weights must be plain, present and finite."""
    for name, module in layers.items():
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"{name}.weight must be an ordinary parameter, {type(module).__name__} computes "
                "it: unpack_ a packed model first, or remove its parametrizations "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        weight = weight_of(module)
        if weight.is_meta:
            raise ValueError(f"{name}.weight has no data (meta device): load the weights first")
        if not (finite := weight.isfinite()).all():
            raise ValueError(
                f"{name}.weight holds {int((~finite).sum())} NaN or infinite values: repair or "
                "reload it"
            )


def _output_error(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], gram: Tensor | None
) -> float | None:
    if gram is None:
        return None
    lost, energy = (((w @ gram) * w).sum() for w in (before - after, before))
    return float(lost / energy) if energy > 0 else 0.0
