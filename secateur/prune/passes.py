"""One pass over a model: every planned layer gets a new weight, or all stay as they were.

`pass_over_` prepares the pass, and `solve_stages_` goes through the layers in stages: layers whose
inputs are known at the same time. Everything else here is a step of one of the two.
"""

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.autocast import without_autocast
from secateur.core.disk.checkpoint import Checkpoint, digest
from secateur.core.memory import room_for
from secateur.core.progress import bar, say
from secateur.core.undo import Undo
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import LESS_MEMORY, Observed, as_list, observe
from secateur.model.distributed import ALONE, Team, team
from secateur.model.gradients import Loss, gradients
from secateur.model.layers import weight_of
from secateur.model.piece import is_expert
from secateur.model.plan import Plan, match
from secateur.model.statistics import STATISTICS, call, name_of
from secateur.model.window import Window
from secateur.patterns import Pattern
from secateur.patterns.grids import QUANTISABLE, Grid
from secateur.patterns.keeping import KeepingZeros
from secateur.prune.preconditions import require_sound, warn_of_lost_zeros, zeros_at_risk
from secateur.prune.report import LayerResult, PruneReport
from secateur.reconstruct import Blockwise, Solution
from secateur.reconstruct.estimate import foretold
from secateur.reconstruct.methods import Method, bind_algorithm, naming
from secateur.reconstruct.rounding import rounded
from secateur.train.on_grid import Latent
from secateur.train.steps import require_not_held
from secateur.train.together import held_out_loss, train_on_grid_, train_together_


@dataclass(frozen=True)
class Pass:
    """A pass about to be made: a method for the layers of a plan.

    With `sequential`, each layer's inputs come from the layers already changed. `blockwise` trains
    half-blocks, and perhaps the whole model, after the method; `alone` is its method for layers
    that are in no half-block. With `keep_zeros`, zeros that the weights have stay.
    """

    model: nn.Module
    plan: Plan
    method: Method
    loss: Loss | None = None
    sequential: bool = False
    blockwise: Blockwise | None = None
    alone: Method | None = None
    keep_zeros: bool = False

    def pattern_for(self, layer: str, weight: Float[Tensor, "out in"]) -> Pattern:
        """The pattern for the layer, whose weight is still as it was before the pass."""
        pattern = self.plan.layers[layer]
        return KeepingZeros(pattern, weight == 0) if self.keep_zeros else pattern

    def at_risk(self, layer: str, weight: Float[Tensor, "out in"]) -> float:
        """The share of the layer's weights that are zero and may get a value."""
        pattern, trained = self.plan.layers[layer], self.blockwise is not None
        return zeros_at_risk(weight, pattern, trained=trained)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics and gradients that its methods need."""
        return (self.alone or self.method).needs  # the former begins with the latter

    @property
    def name(self) -> str:
        """The method's name, as a user writes it."""
        return self.blockwise.name if self.blockwise else self.method.name

    @property
    def asks(self) -> bool:
        """Whether it needs data."""
        return bool(self.needs or self.blockwise)

    @property
    def distils(self) -> bool:
        """Whether it trains the whole model at the end."""
        return self.blockwise is not None and self.blockwise.distil > 0

    @property
    def team(self) -> Team:
        """The processes to agree with: without data, each does the same on its own."""
        return team() if self.asks else ALONE


def reconstruction(
    model: nn.Module,
    plan: Plan,
    algorithm: Callable[..., Solution] | Blockwise,
    loss: Loss | None = None,
    *,
    keep_zeros: bool = False,
) -> Pass:
    """The pass that `reconstruct_` makes with this algorithm.

    Raises:
        ValueError: as `bind_algorithm`.
    """
    if isinstance(algorithm, Blockwise):
        method, alone = bind_algorithm(algorithm.method), bind_algorithm(algorithm.alone)
        made = Pass(model, plan, method, loss, sequential=True, blockwise=algorithm, alone=alone)
    else:
        made = Pass(model, plan, bind_algorithm(algorithm), loss, sequential=True)
    return replace(made, keep_zeros=keep_zeros)


def pass_over_(
    the_pass: Pass,
    batches: Iterable[Batch] | None,
    undo: Undo,
    *,
    offload: bool = False,
    checkpoint: str | Path | None = None,
) -> PruneReport:
    """Give every planned layer its new weight; `undo` puts all back if something raises."""
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        layers, listed, saved = _prepared(the_pass, batches, checkpoint, stack)
        if the_pass.sequential and not the_pass.keep_zeros and the_pass.team.rank == 0:
            weights = {name: _layers.matrix(module) for name, module in layers.items()}
            warn_of_lost_zeros({name: the_pass.at_risk(name, w) for name, w in weights.items()})
        missing = {n: m for n, m in layers.items() if not saved or n not in saved.finished()}
        if the_pass.blockwise and missing:
            _foretell(the_pass, missing, listed, offload)
        dense = _dense_copy(the_pass) if the_pass.distils else None
        if dense is not None:
            held_out_loss(the_pass.model, dense, listed)  # before hours of work: is there one?
        found = gradients(
            the_pass.model, missing, listed, the_pass.needs, the_pass.loss, the_pass.team
        )
        stages = stages_of(the_pass, layers, listed, saved, offload=offload)
        results = solve_stages_(the_pass, layers, stages, saved, found, undo.remember)
        if dense is not None:
            folder = Path(checkpoint) / "distil" if checkpoint else None
            results = _distilled(the_pass, dense, layers, listed, folder, offload, results)
        return report_of(the_pass, layers, results, begin)


def stages_of(
    the_pass: Pass,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    saved: Checkpoint | None,
    *,
    offload: bool,
    window: Window | None = None,
) -> Generator[Observed]:
    """The layers with the statistics that the method needs, in the order in which to solve them.

    Layers in the checkpoint are still yielded, in order and without statistics, so that the caller
    can restore them.
    """
    sums = [name for name in the_pass.needs if name in STATISTICS]
    finished = saved.finished() if saved else {}
    whole = window is None  # else weights are there only while their block runs
    if len(finished) == len(layers) or (whole and not (sums or the_pass.blockwise)):
        yield from (Observed(name, {name: {}}, {name: 0}) for name in layers)
    else:
        seen = observe(
            the_pass.model,
            layers,
            batches,
            sums,
            sequential=the_pass.sequential,
            offload=offload,
            halves=the_pass.blockwise is not None,
            finished=finished,
            team=the_pass.team,
            window=window,
        )
        if the_pass.asks:
            yield from seen
        else:  # no token counts for such a method
            yield from (replace(one, tokens=dict.fromkeys(one.tokens, 0)) for one in seen)


@torch.no_grad()
def solve_stages_(
    the_pass: Pass,
    layers: Mapping[str, nn.Module],
    stages: Generator[Observed],
    saved: Checkpoint | None,
    gradient: dict[str, dict[str, Tensor]],
    remember: Callable[[Mapping[str, nn.Parameter]], None],
) -> tuple[LayerResult, ...]:
    """What became of each layer, stage by stage; weights go to `remember` before they change.

    Each process of a team solves one layer at a time. They do not share out the rows of a layer:
    most of a method's work is on the Gram matrix, which every process would repeat, and criteria
    and patterns look at several rows together.
    """
    results: dict[str, LayerResult] = {}
    masks: dict[str, Tensor] = {}
    shown = bar(the_pass.name, len(layers), unit="layer")
    with shown, contextlib.closing(stages):
        for observed in stages:
            remember(_layers.parameters_of({n: layers[n] for n in observed.statistics}))
            results |= _restored_(layers, observed.statistics, saved)
            names = [name for name in observed.statistics if name not in results]
            memo = functools.cache(call)  # what depends on the input alone is computed once
            found = {n: {**observed.statistics[n], **gradient.pop(n), "memo": memo} for n in names}
            for turn in _turns(names, the_pass.team):
                solved: tuple[LayerResult, Tensor] | None = None
                with the_pass.team.raising_together():
                    if the_pass.team.rank < len(turn):
                        name = turn[the_pass.team.rank]
                        with _solving(the_pass, name, layers[name]):
                            given = _given(the_pass, name, layers[name], found[name])
                            solution = _method_for(the_pass, observed).solve(given)
                            solved = _put_in_place_(
                                the_pass, name, layers[name], given, solution, observed.tokens[name]
                            )
                for result, mask in _synchronised(the_pass.team, turn, layers, solved):
                    results[result.layer], masks[result.layer] = result, mask
            shown.update(len(observed.statistics))
            done = _finalise_(the_pass, observed, layers, masks, results)
            if saved and done and the_pass.team.rank == 0:
                weights = {name: weight_of(layers[name]) for name in done}
                saved.add(weights, {name: asdict(results[name]) for name in done})
    return tuple(results[name] for name in layers)


def report_of(
    the_pass: Pass,
    layers: Mapping[str, nn.Module],
    results: Sequence[LayerResult],
    begin: float,
    parameters: int | None = None,
) -> PruneReport:
    """The report of a pass that began at `begin`; `parameters` is counted if it is not given."""
    zeros = sum(
        round(result.sparsity * weight_of(layers[result.layer]).numel()) for result in results
    )
    counted = parameters or sum(parameter.numel() for parameter in the_pass.model.parameters())
    return PruneReport(the_pass.name, tuple(results), time.perf_counter() - begin, zeros, counted)


# --- before the pass -----------------------------------------------------------------------------


def _prepared(
    the_pass: Pass,
    batches: Iterable[Batch] | None,
    checkpoint: str | Path | None,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, nn.Module], list[Batch], Checkpoint | None]:
    """The planned layers, the batches and the open checkpoint, once everything has been checked."""
    with the_pass.team.raising_together():
        layers = match(the_pass.model, the_pass.plan)
        require_sound(layers)
        require_not_held(the_pass.model)
        _require_data(the_pass, batches)
        if the_pass.blockwise:
            _require_quantisable(layers, the_pass.blockwise.grid)
        listed = as_list(batches) if the_pass.asks and batches is not None else []
        run = _fingerprint(the_pass, layers) if checkpoint or the_pass.team.size > 1 else {}
    data = the_pass.team.all_gather(digest(listed) if checkpoint else "")
    saved: Checkpoint | None = None
    with the_pass.team.raising_together():
        if checkpoint:
            saved = Checkpoint(checkpoint, run | {"batches": data}, writes=team().rank == 0)
            stack.enter_context(saved)
        finished = list(saved.finished()) if saved else []
    _require_same(the_pass.team, run | {"checkpoint": finished})
    return layers, listed, saved


def _require_data(the_pass: Pass, batches: Iterable[Batch] | None) -> None:
    if the_pass.needs and batches is None:
        raise ValueError(
            f"{the_pass.name} needs calibration data for {', '.join(the_pass.needs)}: "
            "pass batches, or use sc.magnitude"
        )
    if the_pass.distils and the_pass.team.size > 1:
        raise ValueError(
            f"{the_pass.name} trains the whole model in one process, these are "
            f"{the_pass.team.size}: take sc.best, or start it without torchrun"
        )


def _require_quantisable(layers: Mapping[str, nn.Module], grid: Grid | None) -> None:
    for name, module in layers.items() if grid else ():
        if (dtype := weight_of(module).dtype) not in QUANTISABLE:
            raise ValueError(
                f"layer {name}: {grid} needs a float32, bfloat16 or float16 weight, got {dtype}: "
                "cast the model to float32 first"
            )


def _fingerprint(the_pass: Pass, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {
        "method": the_pass.name,
        "plan": the_pass.plan.to_dict()["layers"],
        "keep_zeros": the_pass.keep_zeros,
        "loss": None if the_pass.loss is None else name_of(the_pass.loss),
        "weights": digest([weight_of(module) for module in layers.values()]),
    }


def _require_same(members: Team, run: Mapping[str, Any]) -> None:
    """Raise unless all processes are about to do the same, apart from their batches."""
    for rank, other in enumerate(members.all_gather(run)):
        if different := [key for key in run if other[key] != run[key]]:
            raise ValueError(
                f"processes that calibrate together need the same {different[0]}, process {rank} "
                "has another: give all of them one model, plan, method and checkpoint, and "
                "each its own batches"
            )


def _foretell(
    the_pass: Pass, missing: Mapping[str, nn.Module], batches: Sequence[Batch], offload: bool
) -> None:
    """Write to stderr what the pass will take, where an estimate is possible."""
    assert the_pass.blockwise is not None
    with the_pass.team.raising_together():
        if the_pass.team.rank == 0:
            patterns = the_pass.plan.layers
            told = foretold(
                the_pass.model, missing, patterns, batches, the_pass.blockwise, offload=offload
            )
            if told is not None:
                say(f"{the_pass.name}: {told}")


def _dense_copy(the_pass: Pass) -> nn.Module:
    try:
        return copy.deepcopy(the_pass.model)
    except Exception as error:  # whatever the modules' own copying raises
        raise ValueError(
            f"{the_pass.name} trains towards a copy of the dense model, and this "
            f"{type(the_pass.model).__name__} cannot be copied ({error}): take sc.best, or "
            "make copy.deepcopy(model) work"
        ) from error


# --- a stage -------------------------------------------------------------------------------------


def _restored_(
    layers: Mapping[str, nn.Module], stage: Iterable[str], saved: Checkpoint | None
) -> dict[str, LayerResult]:
    """The results of the layers in the checkpoint, once their weights are back in place."""
    if saved is None:
        return {}
    restored = saved.weights(list(stage))
    for name, weight in restored.items():
        weight_of(layers[name]).copy_(weight)
    return {name: result_of(saved.finished()[name]) for name in restored}


def result_of(row: Mapping[str, Any]) -> LayerResult:
    """The report row in a checkpoint.

    Raises:
        ValueError: if another version of the library wrote it.
    """
    try:
        return LayerResult(**row)
    except TypeError as error:
        raise ValueError(
            f"the checkpoint has a report row from another version: {error}: choose another folder"
        ) from None


def _turns(names: Sequence[str], members: Team) -> Iterator[Sequence[str]]:
    """The layers in turns, each with at most one layer for every process."""
    for first in range(0, len(names), members.size):
        yield names[first : first + members.size]


def _method_for(the_pass: Pass, observed: Observed) -> Method:
    """The method for layers that were observed together, by whether they are in a half-block."""
    return the_pass.alone if the_pass.alone and observed.half is None else the_pass.method


@contextlib.contextmanager
def _solving(the_pass: Pass, name: str, module: nn.Module) -> Iterator[None]:
    """Name the layer in errors, and switch autocast off, while it is solved."""
    with (
        room_for([name], f"what {the_pass.name} computes", LESS_MEMORY),
        without_autocast(weight_of(module).device),
        naming(name),
    ):
        yield


def _given(
    the_pass: Pass, name: str, module: nn.Module, found: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What the method is given for the layer; the weight is a copy that it may change."""
    weight = _in_float32(_layers.matrix(module))
    return {
        "weight": weight,
        "pattern": the_pass.pattern_for(name, weight),
        "dtype": weight_of(module).dtype,
        "layer": name,
        **found,
    }


def _put_in_place_(
    the_pass: Pass,
    name: str,
    module: nn.Module,
    given: Mapping[str, Any],
    solution: Solution,
    tokens: int,
) -> tuple[LayerResult, Tensor]:
    """What became of the layer, and its mask, once the solution's weight is in place."""
    pattern, before = given["pattern"], _in_float32(_layers.matrix(module))
    if (violation := pattern.violation(solution.mask)) is not None:
        raise ValueError(f"{the_pass.name} needs to give a mask of {pattern}, its mask {violation}")
    # What a method left unchanged, even only in float32, stays the same to the bit.
    same = (solution.weight == before) | (solution.weight == before.float())
    new = torch.where(same, before, solution.weight).masked_fill(~solution.mask, 0)
    if not new.isfinite().all():
        raise ValueError(
            f"{the_pass.name} gave weights that are not finite: add calibration data or raise the "
            "damping"
        )
    weight_of(module).copy_(_layers.from_matrix(module, new))
    after = _layers.matrix(module)
    result = LayerResult(
        name,
        str(pattern),
        float((before == 0).float().mean()),
        float((after == 0).float().mean()),
        _output_error(before, after, given.get("gram")),
        tokens,
        "; ".join(
            filter(None, [solution.note, _revived(before, after), _lent(the_pass, module, tokens)])
        ),
    )
    return result, solution.mask


def _revived(before: Float[Tensor, "out in"], after: Float[Tensor, "out in"]) -> str:
    """What to note of zeros that the layer lost."""
    lost = int(((before == 0) & (after != 0)).sum())
    return f"{lost:,} weights that were zero are not any more" if lost else ""


def _lent(the_pass: Pass, module: nn.Module, tokens: int) -> str:
    """What to note of an expert that no calibration token was sent to."""
    asked = any(name in STATISTICS for name in the_pass.needs)
    none = asked and is_expert(module) and tokens == 0
    return "no token reached it: by the other experts' inputs" if none else ""


def _in_float32(weight: Tensor) -> Tensor:
    """A copy in float32, or in float64 if it is in float64."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _output_error(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], gram: Tensor | None
) -> float | None:
    """The share of the layer's output energy that is lost, where the Gram matrix is known."""
    if gram is None:
        return None
    lost, energy = (((w @ gram) * w).sum() for w in ((before - after).float(), before.float()))
    return float(lost / energy) if energy > 0 else 0.0


def _synchronised(
    members: Team,
    turn: Sequence[str],
    layers: Mapping[str, nn.Module],
    solved: tuple[LayerResult, Tensor] | None,
) -> Iterator[tuple[LayerResult, Tensor]]:
    """The results and masks of a turn, once all processes have all of its weights."""
    results = members.all_gather(solved and solved[0])
    for rank, (name, result) in enumerate(zip(turn, results, strict=False)):
        assert result is not None
        members.broadcast_(rank, weight_of(layers[name]))
        if solved and members.size == 1:
            yield solved
        else:  # the same everywhere, though only the solver knows which kept weights are 0
            yield result, _layers.matrix(layers[name]) != 0


def _finalise_(
    the_pass: Pass,
    observed: Observed,
    layers: Mapping[str, nn.Module],
    masks: dict[str, Tensor],
    results: dict[str, LayerResult],
) -> Sequence[str]:
    """The layers that became final now: the observed ones, or their half-block once it is trained.

    Layers restored from a checkpoint were final before and are not among them.
    """
    half = observed.half
    if half is None or the_pass.blockwise is None:
        return [name for name in observed.statistics if masks.pop(name, None) is not None]
    if not all(name in masks for name in half.layers):
        return []
    with the_pass.blockwise.room_for(half):
        before, after = the_pass.blockwise.train_(half, masks, the_pass.team)
    for name in half.layers:
        del masks[name]
        if after < before:  # trained since it was measured
            results[name] = replace(results[name], error=None)
    last = results[[*half.layers][-1]]
    note = f"{half.name}: held-out error {before:.4g} before training, {after:.4g} after"
    results[last.layer] = replace(last, note="; ".join(filter(None, [last.note, note])))
    return [*half.layers]


# --- after the last stage ------------------------------------------------------------------------


def _distilled(
    the_pass: Pass,
    dense: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    checkpoint: Path | None,
    offload: bool,
    results: Sequence[LayerResult],
) -> tuple[LayerResult, ...]:
    """The results once the weights of all layers have been trained together."""
    assert the_pass.blockwise is not None
    model, method, grid = the_pass.model, the_pass.blockwise, the_pass.blockwise.grid
    if grid is None:
        before, after = train_together_(model, dense, layers, batches, method.distil, checkpoint)
    else:
        untouched = match(dense, the_pass.plan)
        masks = {
            n: the_pass.pattern_for(n, _layers.matrix(untouched[n])).mask(_magnitudes(m))
            for n, m in layers.items()
        }
        round_ = functools.partial(_rounded_, the_pass, layers, masks, grid, batches, offload)
        epochs = method.distil, method.distil_on_grid
        before, after = train_on_grid_(
            model, dense, layers, batches, epochs, grid, masks, round_, checkpoint
        )
    note = f"whole model: held-out loss {before:.4g} before training, {after:.4g} after"
    *others, last = (
        replace(result, error=None) if after < before else result for result in results
    )
    return (*others, replace(last, note="; ".join(filter(None, [last.note, note]))))


def _magnitudes(module: nn.Module) -> Tensor:
    return _layers.matrix(module).detach().float().abs()


@torch.no_grad()
def _rounded_(
    the_pass: Pass,
    layers: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    grid: Grid,
    batches: Sequence[Batch],
    offload: bool,
) -> dict[str, Latent]:
    """Round all layers in the order in which they run, each on inputs from those before it."""
    found: dict[str, Latent] = {}
    stages = observe(the_pass.model, layers, batches, ["gram"], sequential=True, offload=offload)
    with contextlib.closing(stages):
        for observed in stages:
            for name, statistics in observed.statistics.items():
                weight, mask = _in_float32(_layers.matrix(layers[name])), masks[name]
                with _solving(the_pass, name, layers[name]):
                    dtype = weight_of(layers[name]).dtype
                    one = rounded(weight, mask, statistics["gram"], grid, dtype=dtype)
                weight_of(layers[name]).copy_(_layers.from_matrix(layers[name], one.weight))
                found[name] = Latent(one.latent, one.scales, mask)
    return found
