"""One pass over a model: every planned layer gets a new weight, or all stay as they were."""

import contextlib
import copy
import functools
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from secateur.core.autocast import without_autocast
from secateur.core.disk.checkpoint import Checkpoint, digest
from secateur.core.memory import room_for
from secateur.core.undo import Undo, all_or_nothing
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import LESS, Observed, as_list, observe
from secateur.model.distributed import ALONE, Team, team
from secateur.model.gradients import Loss, gradients
from secateur.model.layers import weight_of
from secateur.model.plan import Plan, match
from secateur.model.statistics import STATISTICS, call, call_with, name_of, needed_by
from secateur.model.window import Window
from secateur.prune.preconditions import require_kind, require_sound
from secateur.prune.report import LayerResult, PruneReport
from secateur.reconstruct import Blockwise, Solution, best, estimate, thorough
from secateur.train.together import held_out_loss, train_together_


def reconstruction(
    model: nn.Module,
    plan: Plan,
    algorithm: Callable[..., Solution] | Blockwise,
    loss: Loss | None = None,
) -> "Run":
    """The pass that `reconstruct_` makes with this algorithm."""
    blockwise: Blockwise | None = None
    method: Callable[..., Solution]
    if isinstance(algorithm, Blockwise):
        blockwise, method = algorithm, algorithm.method
    else:
        method = algorithm
    name = blockwise.name if blockwise else name_of(method)
    require_kind(method, is_algorithm=True)
    needs = needed_by(method, given=("weight", "pattern", "dtype", "layer"))

    def solve(available: Mapping[str, Any], layer: str) -> Solution:
        try:
            solution: Solution = call_with(method, {**available, "layer": layer})
            return solution
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error

    return Run(model, plan, name, needs, solve, loss, True, blockwise)


@dataclass(frozen=True)
class Run:
    """One pass that gives every planned layer a new weight, or leaves all as they were."""

    model: nn.Module
    plan: Plan
    method: str
    needs: tuple[str, ...]
    solve: Callable[[Mapping[str, Any], str], Solution]
    loss: Loss | None
    sequential: bool
    blockwise: Blockwise | None = None

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
        """The processes that have to be asked: without data, each does the same on its own."""
        return team() if self.asks else ALONE

    def _require_data(self, batches: Iterable[Batch] | None) -> None:
        if self.needs and batches is None:
            raise ValueError(
                f"{self.method} needs calibration data for {', '.join(self.needs)}: pass batches, "
                "or use sc.magnitude"
            )
        if self.distils and self.team.size > 1:
            raise ValueError(
                f"{self.method} trains the whole model in one process, these are {self.team.size}: "
                "take sc.best, or start it without torchrun"
            )

    @torch.inference_mode(False)  # the user's own would forbid training, and writing to weights
    def __call__(
        self, batches: Iterable[Batch] | None, offload: bool, checkpoint: str | Path | None
    ) -> PruneReport:
        with all_or_nothing() as undo:
            return self._whole(undo, batches, offload, checkpoint)

    def _whole(
        self,
        undo: Undo,
        batches: Iterable[Batch] | None,
        offload: bool,
        checkpoint: str | Path | None,
    ) -> PruneReport:
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            with self.team.together():
                layers = match(self.model, self.plan)
                require_sound(layers)
                self._require_data(batches)
                listed = as_list(batches) if self.asks and batches is not None else []
                known = checkpoint or self.team.size > 1
                fingerprint = self._fingerprint(layers) if known else {}
            data = self.team.everyones(digest(listed) if checkpoint else "")
            with self.team.together():
                saved: Checkpoint | None = None
                if checkpoint:
                    run = fingerprint | {"batches": data}
                    saved = Checkpoint(checkpoint, run, writes=team().rank == 0)
                    stack.enter_context(saved)
                finished = saved.finished() if saved else {}
                missing = {name: m for name, m in layers.items() if name not in finished}
            _require_same(self.team, fingerprint | {"checkpoint": list(finished)})
            if self.blockwise in (best, thorough) and missing:
                with self.team.together():
                    if self.team.rank == 0:
                        patterns = self.plan.layers
                        told = estimate(
                            self.model, missing, patterns, listed, self.blockwise, offload=offload
                        )
                        tqdm.write(f"{self.method}: {told}", file=sys.stderr)
            dense = self._dense_copy() if self.distils else None
            if dense is not None:
                held_out_loss(self.model, dense, listed)  # before hours of work: is there one?
            found = gradients(self.model, missing, listed, self.needs, self.loss, self.team)
            source = self._observed(layers, finished, listed, offload, None)
            results = self._walk(layers, source, saved, found, undo.remember)
            if dense is not None:
                results = self._distilled(dense, layers, listed, checkpoint, results)
            return self._report(layers, results, begin, self._parameters())

    @torch.inference_mode(False)
    def streamed(self, batches: Sequence[Batch], saved: Checkpoint, window: Window) -> PruneReport:
        """The pass over a model whose blocks are loaded one by one; `saved` gets the weights.

        Activations are kept on the CPU. The model itself is left without weights.

        The method may not ask for gradients or train the whole model, and all layers lie in one
        chain of blocks.
        """
        assert not self.distils
        begin, parameters = (
            time.perf_counter(),
            self._parameters(),
        )  # tied ones are one until it runs
        layers = match(self.model, self.plan)
        finished = saved.finished()
        if all(name in finished for name in layers):
            results = tuple(_result(finished[name]) for name in layers)
        else:
            with window.opened():
                none: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
                source = self._observed(layers, finished, batches, True, window)
                results = self._walk(layers, source, saved, none, lambda _: None)
        return self._report(layers, results, begin, parameters)

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _report(
        self,
        layers: Mapping[str, nn.Module],
        results: Sequence[LayerResult],
        begin: float,
        parameters: int,
    ) -> PruneReport:
        zeros = sum(
            round(result.sparsity * weight_of(layers[result.layer]).numel()) for result in results
        )
        seconds = time.perf_counter() - begin
        return PruneReport(self.method, tuple(results), seconds, zeros, parameters)

    def _dense_copy(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except Exception as error:  # whatever the modules' own copying raises
            raise ValueError(
                f"{self.method} trains towards a copy of the dense model, and this "
                f"{type(self.model).__name__} cannot be copied ({error}): take sc.best, or "
                "make copy.deepcopy(model) work"
            ) from error

    def _distilled(
        self,
        dense: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        checkpoint: str | Path | None,
        results: Sequence[LayerResult],
    ) -> tuple[LayerResult, ...]:
        """The results once the weights of all layers have been trained together."""
        assert self.blockwise is not None
        before, after = train_together_(
            self.model,
            dense,
            layers,
            batches,
            self.blockwise.distil,
            Path(checkpoint) / "distil" if checkpoint else None,
        )
        note = f"whole model: held-out loss {before:.4g} before training, {after:.4g} after"
        *others, last = (
            replace(result, error=None) if after < before else result for result in results
        )
        return (*others, replace(last, note="; ".join(filter(None, [last.note, note]))))

    @torch.no_grad()
    def _walk(
        self,
        layers: Mapping[str, nn.Module],
        source: Generator[Observed],
        saved: Checkpoint | None,
        gradient: dict[str, dict[str, Tensor]],
        remember: Callable[[Mapping[str, nn.Parameter]], None],
    ) -> tuple[LayerResult, ...]:
        """Give every layer its new weight in its turn; those before go to `remember`."""
        results: dict[str, LayerResult] = {}
        masks: dict[str, Tensor] = {}
        bar = tqdm(total=len(layers), desc=self.method, disable=None)
        with bar, contextlib.closing(source):
            for observed in source:
                stage = {name: layers[name] for name in observed.statistics}
                remember({name: weight_of(module) for name, module in stage.items()})
                finished = saved.weights(stage) if saved else {}
                for name, weight in finished.items():
                    assert saved is not None
                    weight_of(stage.pop(name)).copy_(weight)
                    results[name] = _result(saved.finished()[name])
                own = {name: gradient.pop(name) for name in stage}
                for result, mask in self._changed(stage, observed, own):
                    results[result.layer], masks[result.layer] = result, mask
                bar.update(len(observed.statistics))
                done = self._trained(observed, layers, masks, results)
                if saved and done and self.team.rank == 0:
                    weights = {name: weight_of(layers[name]) for name in done}
                    saved.add(weights, {name: asdict(results[name]) for name in done})
        return tuple(results[name] for name in layers)

    def _observed(
        self,
        layers: Mapping[str, nn.Module],
        finished: Collection[str],
        batches: Iterable[Batch],
        offload: bool,
        window: Window | None,
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
                team=self.team,
                window=window,
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
        with self.blockwise.room_for(half):
            before, after = self.blockwise.train_(half, layers, masks, self.team)
        for name in half.layers:
            del masks[name]
            if after < before:  # moved since, so that it is another now
                results[name] = replace(results[name], error=None)
        last = results[half.layers[-1]]
        note = f"{half.name}: held-out error {before:.4g} before training, {after:.4g} after"
        results[last.layer] = replace(last, note="; ".join(filter(None, [last.note, note])))
        return half.layers

    def _changed(
        self,
        stage: Mapping[str, nn.Module],
        observed: Observed,
        gradient: Mapping[str, Mapping[str, Tensor]],
    ) -> Iterator[tuple[LayerResult, Tensor]]:
        """What became of each layer and its mask; every process of the team solves one at a time.

        Not rows of one layer: what most methods need of a Gram matrix is the larger part of their
        work, and criteria and patterns look at several rows.
        """
        names = list(stage)
        once = functools.cache(call)  # what depends on the input alone is computed once for all
        for first in range(0, len(names), self.team.size):
            at_once = names[first : first + self.team.size]
            mine: tuple[LayerResult, Tensor] | None = None
            with self.team.together():
                if self.team.rank < len(at_once):
                    name = at_once[self.team.rank]
                    statistics = {**observed.statistics[name], **gradient[name], "once": once}
                    tokens = observed.tokens[name]
                    device = weight_of(stage[name]).device
                    with (
                        room_for([name], f"what {self.method} computes", LESS),
                        without_autocast(device),
                    ):
                        mine = self._change(name, stage[name], statistics, tokens)
            results = self.team.everyones(mine and mine[0])
            for rank, (name, result) in enumerate(zip(at_once, results, strict=False)):
                assert result is not None
                self.team.copy_from_(rank, weight_of(stage[name]))
                if mine and self.team.size == 1:
                    yield mine
                else:  # the same everywhere, though who solved it knows which kept weights are 0
                    yield result, _layers.matrix(stage[name]) != 0

    def _change(
        self, name: str, module: nn.Module, statistics: Mapping[str, Any], tokens: int
    ) -> tuple[LayerResult, Tensor]:
        pattern = self.plan.layers[name]
        stored = _layers.matrix(module)
        before = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
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
        # What a method leaves as it was, in float32 too, stays to the bit.
        same = (solution.weight == before) | (solution.weight == before.float())
        new = torch.where(same, before, solution.weight).masked_fill(~solution.mask, 0)
        if not new.isfinite().all():
            raise ValueError(
                f"{self.method} gave layer {name} weights that are not finite: add calibration "
                "data or raise the damping"
            )
        weight_of(module).copy_(_layers.like_weight(module, new))
        after = _layers.matrix(module)
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
        return {
            "method": self.method,
            "plan": self.plan.to_dict()["layers"],
            "loss": None if self.loss is None else name_of(self.loss),
            "weights": digest([weight_of(module) for module in layers.values()]),
        }


def _result(row: Mapping[str, Any]) -> LayerResult:
    """The report row that a checkpoint kept."""
    try:
        return LayerResult(**row)
    except TypeError as error:
        raise ValueError(
            f"the checkpoint has a report row of another version: {error}: choose another folder"
        ) from None


def _require_same(members: Team, run: Mapping[str, Any]) -> None:
    """All processes must be about to do the same, but for their batches."""
    for rank, other in enumerate(members.everyones(run)):
        if different := [key for key in run if other[key] != run[key]]:
            raise ValueError(
                f"processes that calibrate together need the same {different[0]}, process {rank} "
                "has another: give all of them one model, plan, method and checkpoint, and "
                "batches of their own"
            )


def _output_error(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], gram: Tensor | None
) -> float | None:
    if gram is None:
        return None
    lost, energy = (((w @ gram) * w).sum() for w in ((before - after).float(), before.float()))
    return float(lost / energy) if energy > 0 else 0.0
