"""A small part of what `blockwise` does, timed and thrown away, to tell how long the whole takes.

Counting operations and dividing by the rate of a product does not tell: attention, norms,
gradients, small products and Python take most of the time in small models, and several times as
long as the products in others.
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

from secateur.core.graphs import Replayed
from secateur.core.tf32 import in_tf32
from secateur.model import layers as _layers
from secateur.model.blocks import Batch, arguments_of, run_batch, to_device
from secateur.model.calibrate import Observed, observe
from secateur.model.half_blocks import HalfBlock, first_tensor
from secateur.model.layers import parameters_of, weight_of
from secateur.model.outputs import divergence, eval_mode, on_device
from secateur.model.piece import is_expert
from secateur.model.statistics import HELD_OUT, STATISTICS
from secateur.patterns import Pattern
from secateur.patterns.grids import Grid
from secateur.reconstruct.blockwise import Blockwise
from secateur.reconstruct.methods import bind_algorithm
from secateur.reconstruct.rounding import rounded

# Kinds of blocks, and of stages, that are rehearsed, one of each: the kinds with most work.
KINDS = 4
ENOUGH = 4  # tokens for each input of a layer that is solved
# Inputs and outputs up to which a layer is solved to time it; of a larger one this part is.
PROBE = {"cpu": 512, "cuda": 4096}
WARM = 64  # the same for the call that warms up
ROUNDS = 3  # for everything else that is timed, once warm; the median counts


@dataclass(frozen=True)
class Stage:
    """Layers of a block that share an input: their shapes, and how many tokens reach each.

    Experts of a stack have an `apart` input each, which as many tokens reach as do on average.
    """

    block: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # [out, in]
    tokens: int
    apart: int = 1

    @property
    def inputs(self) -> int:
        return self.shapes[0][1]

    @property
    def outputs(self) -> int:
        return sum(out for out, _ in self.shapes)

    @property
    def work(self) -> float:
        """Operations in the layers' products in one forward."""
        return 2.0 * self.tokens * self.outputs * self.inputs


@dataclass(frozen=True)
class Passes:
    """Seconds for a block: its forward, all passes of a batch, a training step, a held-out look."""

    forward: float = 0.0
    batch: float = 0.0
    step: float = 0.0
    look: float = 0.0

    def plus(self, other: "Passes") -> "Passes":
        """The seconds of both together."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Passes(*(one + more for one, more in pairs))

    def times(self, factor: float) -> "Passes":
        """The seconds of a block with `factor` times the work."""
        return Passes(*(factor * seconds for seconds in astuple(self)))


@dataclass(frozen=True)
class Solved:
    """Seconds to solve a stage's layers: for what depends on the input alone, and for the rest."""

    shared: float
    own: float
    inputs: int
    outputs: int
    rounding: float = 0.0  # again, once the whole model has been trained off the grid

    def scaled_to(self, stage: Stage) -> float:
        """Seconds for another stage: eigenvectors grow with its inputs cubed, products squared."""
        wider, own = stage.inputs / self.inputs, self.own + self.rounding
        return self.shared * wider**3 + own * wider**2 * stage.outputs / self.outputs


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
    """What each block takes for a batch like the first, and the seconds to solve all layers.

    The layers stay as they are. They are solved on as many batches as give `ENOUGH` tokens for each
    input, since with fewer the iterations would differ. Where there are more kinds of blocks, or of
    stages, than are rehearsed, the time of the others is scaled by their work.
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
    some = _enough([stage for stage in stages if stage.layers[0] in planned], batches)
    passes, solved = _timed(model, planned, patterns, some, method, set(solved_by.values()))
    for block, one in passes.items():
        # A block is recorded, runs densely and passes on; without blocks the whole model runs.
        whole = one.forward or seconds_of_a_forward(model, batches[0])
        runs = (3 if one.forward else 0) + _forwards_to_stages(blocks[block])
        passes[block] = one.plus(Passes(batch=runs * whole))
    return (
        [passes[shown[block]].times(work[block] / work[shown[block]]) for block in blocks],
        sum(solved[solved_by[stage.layers[0]]].scaled_to(stage) for stage in stages),
    )


def _timed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    batches: Sequence[Batch],
    method: Blockwise,
    to_solve: Collection[str],
) -> tuple[dict[str, Passes], dict[str, Solved]]:
    """What the blocks of these layers take, and what solving each stage in `to_solve` takes.

    A stage goes by its first layer. Layers that are not solved get a mask by magnitude.
    """
    is_cuda = weight_of(next(iter(layers.values()))).is_cuda
    passes: dict[str, Passes] = {}
    solved: dict[str, Solved] = {}
    masks: dict[str, Tensor] = {}
    needs = bind_algorithm(method.alone).needs
    source = observe(model, layers, batches, needs, sequential=True, halves=True)
    with contextlib.closing(source):
        for observed in source:
            stage, half = _stage(observed, layers), observed.half
            if stage.layers[0] in to_solve:
                if not solved:  # untimed: the first call of a library takes longer
                    _solve(stage, layers, patterns, observed, method, WARM)
                most = PROBE["cuda" if is_cuda else "cpu"]
                seconds, found = _solve(stage, layers, patterns, observed, method, most)
                solved[stage.layers[0]] = seconds
                masks |= found
            for name in stage.layers:
                if name not in masks:
                    masks[name] = patterns[name].mask(_layers.matrix(layers[name]).float().abs())
            summed = _seconds_to_sum(stage, layers, len(batches), needs)
            one = Passes(batch=summed * (1 if method.grid is None else 2))  # the weights as trained
            if half is not None and [*half.layers][-1] in stage.layers:
                one = one.plus(_training(half, method, masks))
            passes[stage.block] = passes.get(stage.block, Passes()).plus(one)
    return passes, solved


def _enough(stages: Sequence[Stage], batches: Sequence[Batch]) -> list[Batch]:
    """Enough batches, at least two, for `ENOUGH` tokens per input of these stages."""
    needed = max(ENOUGH * stage.inputs / stage.tokens for stage in stages)
    return [*batches, *batches][: max(2, min(math.ceil(needed), len(batches)))]


def _training(
    half: HalfBlock,
    method: Blockwise,
    masks: Mapping[str, Bool[Tensor, "out in"]],
) -> Passes:
    """What training the half-block takes per batch, with a forward of its block if it ends it."""
    with method.room_for(half), in_tf32(half.device):
        step, look = map(_seconds, method.rehearsal(half, masks))
    forward = _seconds(partial(half.output, 0, {})) if half.end is None else 0.0
    return Passes(forward, 0.0 if method.grid is None else look, step, look)


def seconds_of_a_forward(model: nn.Module, batch: Batch) -> float:
    """How long a forward of the model on the batch takes."""
    with eval_mode(model), torch.no_grad():
        return _seconds(partial(run_batch, model, on_device(batch, model)))


def seconds_of_a_step(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> float:
    """How long a step of Adam on the batch takes for the layers of the whole model together.

    The dense model's forward, for its outputs, is included.
    """
    stored = {name: p.detach().requires_grad_() for name, p in parameters_of(layers).items()}
    block = list(stored.values())[: math.ceil(len(stored) / KINDS)]
    part = sum(w.numel() for w in block) / sum(w.numel() for w in stored.values())
    copies = [weight.detach().to(torch.float32, copy=True).requires_grad_() for weight in block]
    for weight in copies:
        weight.grad = torch.zeros_like(weight)

    @torch.enable_grad()
    def gradients(batch: Batch) -> list[Tensor | None]:
        args, named = arguments_of(model, batch)
        with torch.no_grad():
            target = first_tensor(model(*args, **named))
        found = first_tensor(functional_call(model, stored, args, named))
        loss = divergence(target, found).mean()
        return list(torch.autograd.grad(loss, list(stored.values()), allow_unused=True))

    device = next(iter(stored.values())).device
    step = partial(Replayed(gradients, device), to_device(batch, device))
    with eval_mode(model), in_tf32(device):
        return _seconds(step) + _seconds(torch.optim.AdamW(copies).step) / part


def seconds_on_grid(layers: Mapping[str, nn.Module], grid: Grid) -> float:
    """How much longer such a step takes for weights on a grid, which it rounds and trains through.

    That is once before the forward, and once more to take the gradients through.
    """
    block, part = _quarter(layers)
    matrices = [_layers.matrix(module).detach().float() for module in block.values()]
    leaves = [(w.requires_grad_(), grid.scales(w).requires_grad_()) for w in matrices]

    @torch.enable_grad()
    def rounds(tree: Any) -> list[Tensor | None]:
        for weight, scales in leaves:
            with torch.no_grad():
                on_grid = grid.straight_through(weight, scales, weight.dtype)
            through = grid.straight_through(weight, scales, weight.dtype)
            torch.autograd.grad(through, (weight, scales), on_grid)
        return []

    return _seconds(partial(Replayed(rounds, matrices[0].device), ())) / part


def _quarter(layers: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], float]:
    """The first quarter of the layers, and their share of all weights."""
    block = dict(list(layers.items())[: math.ceil(len(layers) / KINDS)])
    sizes = (sum(weight_of(m).numel() for m in some.values()) for some in (block, layers))
    return block, next(sizes) / next(sizes)


def slower_in_float32(stages: Sequence[Stage], dtype: torch.dtype, device: torch.device) -> float:
    """How many times as long the largest product takes in float32 as in `dtype`."""
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
    """For each name the one that stands for it: of its kind, or of the kind with the nearest work.

    The first possible name of each of the `KINDS` kinds with most work stands for others.
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
    tokens = max(1, round(sum(observed.tokens.values()) / len(names)))
    apart = sum(is_expert(layers[name]) for name in names)
    return Stage(observed.block, names, shapes, tokens, max(1, apart))


def _matrix(layers: Mapping[str, nn.Module], name: str) -> Tensor:
    return _layers.matrix(layers[name])


def _forwards_to_stages(inside: Sequence[Stage]) -> float:
    """How many forwards of a block it takes to reach each of its stages once, in separate runs."""
    total, before, reached = sum(stage.work for stage in inside), 0.0, 0.0
    for stage in inside:
        reached += before / total
        before += stage.work
    return reached


def _seconds_to_sum(
    stage: Stage, layers: Mapping[str, nn.Module], batches: int, needs: Sequence[str]
) -> float:
    """Seconds to sum up the stage's inputs from a batch; its tokens are from `batches` of them."""
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
    """The seconds for the layers of the stage, up to `most` inputs and outputs of each, and masks.

    There are masks of the layers solved whole; all layers are if their pattern does not fit a part.
    """

    def run(out: int, columns: int) -> tuple[float, float, float, dict[str, Tensor]]:
        """Seconds for what is shared, the rest and rounding again, on these parts, and masks."""
        shared = 0.0

        @functools.cache
        def part(value: Tensor) -> Tensor:
            return value[..., :columns][:columns] if value.dim() == 2 else value[:columns]

        @functools.cache
        def memo(function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal shared
            begin = _now()
            result = function(*arguments)
            shared += _now() - begin
            return result

        found = {}
        begin, rounding = _now(), 0.0
        for name in stage.layers:
            weight = _matrix(layers, name).float()[:out, :columns].clone()
            dtype = weight_of(layers[name]).dtype
            own = {"weight": weight, "pattern": patterns[name], "layer": name, "dtype": dtype}
            given = {key: part(value) for key, value in observed.statistics[name].items()}
            solution = bind_algorithm(method.alone).solve({**own, "memo": memo, **given})
            found[name] = solution.mask
            rounding += _seconds_to_round(weight, solution.mask, given.get("gram"), method, dtype)
        return shared, _now() - begin - shared - rounding, rounding, found

    def fits(out: int, columns: int) -> bool:
        return all(
            patterns[name].why_not((min(out, rows), columns)) is None
            for name, (rows, _) in zip(stage.layers, stage.shapes, strict=True)
        )

    columns = min(most, stage.inputs)
    if not fits(most, columns):
        most, columns = max(out for out, _ in stage.shapes), stage.inputs
    shared, own, rounding, found = run(most, columns)
    outputs = sum(min(most, out) for out, _ in stage.shapes)
    masks = {
        name: found[name]
        for name, (out, _) in zip(stage.layers, stage.shapes, strict=True)
        if columns == stage.inputs and out <= most
    }
    return Solved(shared, own, columns, outputs, rounding), masks


def _seconds_to_round(
    weight: Tensor, mask: Tensor, gram: Tensor | None, method: Blockwise, dtype: torch.dtype
) -> float:
    """Seconds to round a layer once more, after the whole model has been trained off the grid."""
    if method.grid is None or not method.distil or gram is None:
        return 0.0
    begin = _now()
    rounded(weight, mask, gram, method.grid, dtype=dtype)
    return _now() - begin


def _seconds(run: Callable[[], object]) -> float:
    """How long a call takes once warm: the median of `ROUNDS`."""
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
