"""A little of what `blockwise` does, on one batch, timed and thrown away: how long all will take.

Counts of operations over the rate of a product do not say it: attention, norms, gradients, small
products and Python take most of the time of small models, and several times that of the products
in others.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.func import functional_call

from secateur.model import layers as _layers
from secateur.model.blocks import Batch, arguments_of, run_batch, to_device
from secateur.model.calibrate import Observed, observe
from secateur.model.half_blocks import HalfBlock, first_tensor
from secateur.model.layers import weight_of
from secateur.model.outputs import divergence, eval_mode, on_device
from secateur.model.statistics import HELD_OUT, STATISTICS
from secateur.patterns import Pattern
from secateur.reconstruct.blockwise import Blockwise
from secateur.reconstruct.methods import bind_algorithm

# Kinds of blocks, and of stages, of which one each is rehearsed: those with most work.
KINDS = 4
ENOUGH = 4  # tokens for each input of a layer that is solved
# Inputs and outputs of a layer that is solved to see how long it takes; of larger ones this part.
PROBE = {"cpu": 512, "cuda": 4096}
WARM = 64
ROUNDS = 3  # of all else that is timed, once warm; the median counts


@dataclass(frozen=True)
class Stage:
    """Layers of a block that share an input: their shapes, and how many tokens reach them."""

    block: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # [out, in]
    tokens: int

    @property
    def inputs(self) -> int:
        return self.shapes[0][1]

    @property
    def outputs(self) -> int:
        return sum(out for out, _ in self.shapes)

    @property
    def work(self) -> float:
        """Operations of the layers' products in a forward."""
        return 2.0 * self.tokens * self.outputs * self.inputs


@dataclass(frozen=True)
class Passes:
    """Seconds of a block: for its forward, for all passes of a batch, for a step and for a look."""

    forward: float = 0.0
    batch: float = 0.0
    step: float = 0.0
    look: float = 0.0

    def plus(self, other: "Passes") -> "Passes":
        """Those of both together."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Passes(*(one + more for one, more in pairs))

    def times(self, factor: float) -> "Passes":
        """Those of a block with so many times as much to do."""
        return Passes(*(factor * seconds for seconds in astuple(self)))


@dataclass(frozen=True)
class Solved:
    """Seconds for the layers of a stage: for what depends on the input alone, and for the rest."""

    shared: float
    own: float
    inputs: int
    outputs: int

    def of(self, stage: Stage) -> float:
        """Those of another stage: eigenvectors take the cube of the inputs, products the square."""
        wider = stage.inputs / self.inputs
        return self.shared * wider**3 + self.own * wider**2 * stage.outputs / self.outputs


def stages_of(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> Iterator[Stage]:
    """The stages in the order in which they run, with the tokens of this batch."""
    for observed in observe(model, layers, [batch], [], sequential=True):
        yield _stage(observed, layers)


def rehearse(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    batches: Sequence[Batch],
    method: Blockwise,
    stages: Sequence[Stage],
) -> tuple[list[Passes], float]:
    """What each block takes for such a batch as the first, and the seconds to solve all layers.

    The layers stay as they are. They are solved on as many batches as give `ENOUGH` tokens for each
    input, since with fewer the iterations would be others. Where there are more kinds of blocks, or
    of stages, than are rehearsed, the others take as long in proportion to their work.
    """
    blocks: dict[str, list[Stage]] = {}
    for stage in stages:
        blocks.setdefault(stage.block, []).append(stage)
    work = {block: sum(stage.work for stage in inside) for block, inside in blocks.items()}
    kinds = {b: tuple((s.shapes, s.tokens) for s in inside) for b, inside in blocks.items()}
    shown = _stand_ins(kinds, work, blocks)
    planned = {n: layers[n] for s in stages if s.block in shown.values() for n in s.layers}
    solved_by = _stand_ins(
        {stage.layers[0]: stage.shapes for stage in stages},
        {stage.layers[0]: stage.work for stage in stages},
        planned,
    )
    is_cuda = weight_of(next(iter(planned.values()))).is_cuda
    passes: dict[str, Passes] = {}
    solved: dict[str, Solved] = {}
    masks: dict[str, Tensor] = {}
    needs = bind_algorithm(method.method).needs
    some = _enough([stage for stage in stages if stage.layers[0] in planned], batches)
    source = observe(model, planned, some, needs, sequential=True, halves=True)
    with contextlib.closing(source):
        for observed in source:
            stage, half = _stage(observed, planned), observed.half
            if stage.layers[0] in solved_by.values():
                if not solved:  # once for nothing: the first call of a library takes longer
                    _solve(stage, planned, patterns, observed, method, WARM)
                most = PROBE["cuda" if is_cuda else "cpu"]
                seconds, found = _solve(stage, planned, patterns, observed, method, most)
                solved[stage.layers[0]] = seconds
                masks |= found
            for name in stage.layers:
                if name not in masks:
                    masks[name] = patterns[name].mask(_layers.matrix(planned[name]).float().abs())
            one = Passes(batch=_summing(stage, planned, len(some), needs))
            if half is not None and half.layers[-1] in stage.layers:
                one = one.plus(_training(half, planned, method, masks))
            passes[stage.block] = passes.get(stage.block, Passes()).plus(one)
    for block, one in passes.items():
        # A block is recorded, runs densely and passes on; without blocks the whole model runs.
        whole = one.forward or seconds_of_a_forward(model, batches[0])
        runs = (3 if one.forward else 0) + _reached(blocks[block])
        passes[block] = one.plus(Passes(batch=runs * whole))
    return (
        [passes[shown[block]].times(work[block] / work[shown[block]]) for block in blocks],
        sum(solved[solved_by[stage.layers[0]]].of(stage) for stage in stages),
    )


def _enough(stages: Sequence[Stage], batches: Sequence[Batch]) -> list[Batch]:
    """As many batches, at least two, as give `ENOUGH` tokens for each input of these stages."""
    needed = max(ENOUGH * stage.inputs / stage.tokens for stage in stages)
    return [*batches, *batches][: max(2, min(math.ceil(needed), len(batches)))]


def _training(
    half: HalfBlock,
    layers: Mapping[str, nn.Module],
    method: Blockwise,
    masks: Mapping[str, Bool[Tensor, "out in"]],
) -> Passes:
    """What training the half-block takes for a batch, and a forward of its block if it ends it."""
    with method.room_for(half):
        step, look = map(_seconds, method.rehearsal(half, layers, masks))
    forward = _seconds(partial(half.output, 0, {})) if half.end is None else 0.0
    return Passes(forward, 0.0, step, look)


def seconds_of_a_forward(model: nn.Module, batch: Batch) -> float:
    """How long the model runs on the batch."""
    with eval_mode(model), torch.no_grad():
        return _seconds(partial(run_batch, model, on_device(batch, model)))


def seconds_of_a_step(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> float:
    """How long it takes to train the layers of the whole model together on the batch, by Adam.

    What the dense model takes for its outputs is not in it.
    """
    weights = {f"{n}.weight": weight_of(m).detach().requires_grad_() for n, m in layers.items()}
    given = to_device(batch, next(iter(weights.values())).device)
    args, named = arguments_of(model, given)
    block = list(weights.values())[: math.ceil(len(weights) / KINDS)]
    part = sum(w.numel() for w in block) / sum(w.numel() for w in weights.values())
    copies = [weight.detach().to(torch.float32, copy=True).requires_grad_() for weight in block]
    for weight in copies:
        weight.grad = torch.zeros_like(weight)

    @torch.enable_grad()
    def gradients() -> None:
        found = first_tensor(functional_call(model, weights, args, named))
        loss = divergence(found.detach(), found).mean()
        torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    with eval_mode(model):
        return _seconds(gradients) + _seconds(torch.optim.Adam(copies).step) / part


def slower_in_float32(stages: Sequence[Stage], dtype: torch.dtype, device: torch.device) -> float:
    """How many times as long the largest product takes in float32 as in the dtype."""
    if dtype == torch.float32:
        return 1.0
    largest = max(stages, key=lambda stage: stage.work)
    ours, floats = (
        _seconds(
            partial(
                torch.mm,
                torch.zeros(largest.tokens, largest.inputs, dtype=kind, device=device),
                torch.zeros(largest.inputs, largest.outputs, dtype=kind, device=device),
            )
        )
        for kind in (dtype, torch.float32)
    )
    return floats / ours


def _stand_ins(
    kinds: Mapping[str, Hashable], work: Mapping[str, float], possible: Collection[str]
) -> dict[str, str]:
    """For each name one that stands for it: of its kind, or of the kind with the nearest work.

    Those are of the kinds with most work, the first that is possible of each.
    """
    first: dict[Hashable, str] = {}
    total: dict[Hashable, float] = {}
    for name, kind in kinds.items():
        total[kind] = total.get(kind, 0) + work[name]
        if name in possible:
            first.setdefault(kind, name)
    most = sorted(first, key=lambda kind: total[kind], reverse=True)[:KINDS]
    chosen = [first[kind] for kind in most]
    return {
        name: first[kind] if kind in most else min(chosen, key=lambda c: abs(work[c] - work[name]))
        for name, kind in kinds.items()
    }


def _stage(observed: Observed, layers: Mapping[str, nn.Module]) -> Stage:
    names = tuple(observed.tokens)
    shapes = tuple((out, columns) for out, columns in (_matrix(layers, n).shape for n in names))
    return Stage(observed.block, names, shapes, observed.tokens[names[0]])


def _matrix(layers: Mapping[str, nn.Module], name: str) -> Tensor:
    return _layers.matrix(layers[name])


def _reached(inside: Sequence[Stage]) -> float:
    """How many times a block's work its stages' inputs take together: each run ends at a stage."""
    total, before, reached = sum(stage.work for stage in inside), 0.0, 0.0
    for stage in inside:
        reached += before / total
        before += stage.work
    return reached


def _summing(
    stage: Stage, layers: Mapping[str, nn.Module], batches: int, needs: Sequence[str]
) -> float:
    """Seconds to sum up a batch's inputs of the stage, which was observed on so many batches."""
    weight = weight_of(layers[stage.layers[0]])
    sums = [STATISTICS[name](stage.inputs, weight.device) for name in needs]
    tokens = stage.tokens // batches
    rows = torch.zeros(tokens, stage.inputs, dtype=weight.dtype, device=weight.device)
    fitted, held_out = (sum(_seconds(partial(s.update, rows, b)) for s in sums) for b in (0, 1))
    return fitted + (held_out - fitted) / HELD_OUT


def _solve(
    stage: Stage,
    layers: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    observed: Observed,
    method: Blockwise,
    most: int,
) -> tuple[Solved, dict[str, Tensor]]:
    """The seconds for the layers of the stage, `most` inputs and outputs of each, and masks.

    There are masks where a layer is solved as a whole, which all are if the pattern needs it.
    """

    def run(out: int, columns: int) -> tuple[float, float, dict[str, Tensor]]:
        """Seconds of what is shared and of the rest, for so much of each layer, and the masks."""
        shared = 0.0
        given = {
            name: value[..., :columns][:columns] if value.dim() == 2 else value[:columns]
            for name, value in observed.statistics[stage.layers[0]].items()
        }

        @functools.cache
        def memo(function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal shared
            begin = _now()
            result = function(*arguments)
            shared += _now() - begin
            return result

        found = {}
        begin = _now()
        for name in stage.layers:
            weight = _matrix(layers, name).float()[:out, :columns].clone()
            available = {"weight": weight, "pattern": patterns[name], "layer": name, "memo": memo}
            available["dtype"] = weight_of(layers[name]).dtype
            found[name] = bind_algorithm(method.method).solve({**available, **given}).mask
        return shared, _now() - begin - shared, found

    def fits(out: int, columns: int) -> bool:
        return all(
            patterns[name].why_not((min(out, rows), columns)) is None
            for name, (rows, _) in zip(stage.layers, stage.shapes, strict=True)
        )

    columns = min(most, stage.inputs)
    if not fits(most, columns):
        most, columns = max(out for out, _ in stage.shapes), stage.inputs
    shared, own, found = run(most, columns)
    outputs = sum(min(most, out) for out, _ in stage.shapes)
    whole = columns == stage.inputs
    masks = {
        name: found[name]
        for name, (out, _) in zip(stage.layers, stage.shapes, strict=True)
        if whole and out <= most
    }
    return Solved(shared, own, columns, outputs), masks


def _seconds(run: Callable[[], object]) -> float:
    """How long a call takes, once warm: the median of some."""
    run()
    taken = []
    for _ in range(ROUNDS):
        begin = _now()
        run()
        taken.append(_now() - begin)
    return median(taken)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
