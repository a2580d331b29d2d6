"""Running calibration data through a model and summing what its layers see.

`observe` is the one entry: a generator that hands out the statistics of some layers, lets the
caller change those layers, and goes on with what the changed layers pass on. Where the model holds
a chain of blocks (the decoder layers of a language model, the stages of a CNN), each block is
replayed on recorded inputs, so that only one block runs at a time and every layer sees pruned
inputs; layers outside a chain, and any model without one, are observed by running the whole model.
For half-blocks, blocks are also replayed on the dense model's own stream.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.autocast import without_autocast
from secateur.core.memory import room_for
from secateur.core.progress import progress
from secateur.model import layers as _layers
from secateur.model.attention import seen_in_attention
from secateur.model.blocks import (
    Batch,
    Call,
    Enough,
    as_batch,
    has_labels_beside,
    hooks,
    input_of,
    record_all,
    require_iterable,
    run_batch,
    to_device,
)
from secateur.model.distributed import ALONE, Team
from secateur.model.einsum import seen_in_einsum
from secateur.model.experts import called_by_expert
from secateur.model.half_blocks import DenseStream, HalfBlock
from secateur.model.outputs import device_of, eval_mode
from secateur.model.piece import is_expert, parameter_name
from secateur.model.recurrent import seen_in_recurrent
from secateur.model.statistics import STATISTICS, Statistic
from secateur.model.trace import (
    LayerTrace,
    Part,
    received_nothing,
    segments,
    trace_together,
    without_padding,
)
from secateur.model.window import Window


@dataclass(frozen=True)
class Observed:
    """What some layers of one block saw; layers with the same input hold the same tensors.

    `half` is their half-block, where half-blocks were asked for and found.
    """

    block: str
    statistics: Mapping[str, Mapping[str, Tensor]]
    tokens: Mapping[str, int]
    half: HalfBlock | None = None


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    statistics: Sequence[str],
    *,
    sequential: bool,
    offload: bool = False,
    halves: bool = False,
    finished: Collection[str] = (),
    team: Team = ALONE,
    window: Window | None = None,
) -> Generator[Observed]:
    """Yield the statistics of the layers, block by block; change a layer once it has been yielded.

    With `sequential`, the layers of a block come in the order in which they run, those that share
    an input together, and each sees inputs made by the layers already changed (SparseGPT's "true
    sequential"). Without it, a block comes as a whole. `offload` keeps activations between blocks
    on the CPU. Padding, where a batch has an attention mask, is not run: see
    `secateur.model.padding`. With `halves`, layers of blocks come half by half, each with the dense
    half-block's outputs to train towards. `finished` layers are still yielded, in order and without
    statistics, so that the caller can restore them. Each process of a `team` gets the statistics
    over the batches of all of them, in order of rank. With a `window` on the model, whose planned
    layers are then all in one chain, every block is loaded four times, however many batches there
    are.

    The model is in eval mode until the generator ends; close it to restore the model early.

    Cost: the model runs once to record, each block once for each yield and once more to pass on.
        Memory: the inputs of one block for all batches, and one yield's statistics. `halves` runs
        each block once more, and holds the dense model's inputs, cuts and outputs of a block too.
    Raises:
        ValueError: if there is no batch (fewer than two with `halves`), the model cannot run one, a
            layer sees no token, or NaN or infinity arrives at a layer.
    """
    if statistics:
        _require_activations(layers)
    device = window.device if window else device_of(model)
    inputs: list[Batch] = [to_device(batch, device) for batch in as_list(batches)]
    parts = without_padding(model, inputs)
    counts = team.all_gather(len({part.of for part in parts}))
    _check_batches(model, inputs, sum(counts), halves)
    with eval_mode(model), torch.no_grad(), pieces_shown(model, layers):
        trace, parts = trace_together(model, layers, inputs, parts, team)
        recorder = _Recorder(
            trace=trace,
            batch_of=[part.of for part in parts],
            statistics=tuple(statistics),
            sequential=sequential,
            device=device,
            halves=halves,
            finished=finished,
            team=team,
            window=window,
            first_batch=sum(counts[: team.rank]),
        )
        for chain, wanted in segments(model, layers, trace):
            yield from _observe_segment(recorder, model, wanted, chain, parts, offload)


@contextlib.contextmanager
def pieces_shown(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have modules that multiply by matrices of their own show these what they multiply."""
    with (
        called_by_expert(layers),
        seen_in_attention(model, layers),
        seen_in_recurrent(layers),
        seen_in_einsum(layers),
    ):
        yield


def _check_batches(model: nn.Module, batches: Sequence[Batch], count: int, halves: bool) -> None:
    """Warn of labels that nobody reads; raise for a single batch where some are held out."""
    if any(has_labels_beside(model, batch) for batch in batches):
        warnings.warn(
            f"batches are pairs of inputs and labels, which {type(model).__name__} does not take: "
            "it runs on the first of each, the labels are not read",
            stacklevel=3,
        )
    if halves and count < 2:
        raise ValueError(
            "half-blocks are trained on some batches and judged on others, got 1 batch: split it, "
            "as in tokens.split(8)"
        )


def _observe_segment(
    recorder: "_Recorder",
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    chain: Mapping[str, nn.Module],
    parts: Sequence[Part],
    offload: bool,
) -> Generator[Observed]:
    """Observe layers block by block where their chain can be replayed, else in the whole model."""
    batches, window = [part.batch for part in parts], recorder.window
    with recorder.team.raising_together():
        stand_in = window is not None
        recorded = record_all(model, chain, batches, offload, stand_in) if chain else None
    everywhere = all(recorder.team.all_gather(recorded is not None))
    if recorded is not None and everywhere:
        yield from _replay_chain(recorder, layers, chain, recorded)
    elif window is not None:
        raise ValueError(
            f"the blocks of this {type(model).__name__} cannot run one by one: they receive more "
            "than the previous block's output and what is known beforehand: load the model whole "
            "and call reconstruct_"
        )
    else:
        runs = [partial(run_batch, model, batch) for batch in batches]
        yield from recorder.observe("the model", layers, runs)


def _require_activations(layers: Mapping[str, nn.Module]) -> None:
    """Raise if a layer is an embedding: token ids are not activations, whatever their shape."""
    for name, module in layers.items():
        if isinstance(module, nn.Embedding):
            raise ValueError(
                f"{name} is an embedding, which is looked up by token ids and multiplies no "
                "activations: leave it out of the plan (ignore=), or use sc.magnitude for it"
            )


def _replay_chain(
    recorder: "_Recorder",
    layers: Mapping[str, nn.Module],
    chain: Mapping[str, nn.Module],
    recorded: list[list[Call]],
) -> Generator[Observed]:
    """Observe block after block, emptying `recorded` along the way to free its memory."""
    held = {
        block: {n: m for n, m in layers.items() if n == block or n.startswith(block + ".")}
        for block in chain
    }
    last = max(i for i, block in enumerate(chain) if held[block])
    dense = DenseStream(recorder.batch_of, recorder.device) if recorder.halves else None
    previous: list[list[Tensor | None]] = [[] for _ in recorded]
    for i, (name, block) in enumerate(chain.items()):
        if recorder.window:
            recorder.window.load(name)
        calls = [of_batch[i] for of_batch in recorded]
        wanted = [of_batch[i + 1].wanted for of_batch in recorded] if i < last else []
        runs = [
            partial(call.replay, block, before, recorder.device)
            for call, before in zip(calls, previous, strict=True)
        ]
        if dense is None:
            yield from recorder.observe(name, held[name], runs)
        else:
            in_order = {n: held[name][n] for n in recorder.trace.calls if n in held[name]}
            for half in dense.halves(name, block, in_order, calls, previous, wanted):
                for observed in recorder.observe(name, half.layers, runs):
                    yield replace(observed, half=half)
        if i == last:
            return
        with recorder.team.raising_together():
            for b, call in enumerate(calls):
                previous[b] = call.kept(runs[b](), wanted[b], previous[b])
                call.leaves.clear()


# --- summing what layers see ---------------------------------------------------------------------

# The memory goes to a Gram matrix, in^2 whatever the data.
LESS_MEMORY = (
    "leave the layer out of the plan (ignore=), pass shorter batches, or take a method that needs "
    "no Gram matrix, such as sc.wanda"
)


@dataclass(frozen=True)
class _Recorder:
    """Sums what layers see, with everything that stays the same from block to block."""

    trace: LayerTrace
    batch_of: Sequence[int]
    statistics: tuple[str, ...]
    sequential: bool
    device: torch.device
    halves: bool
    finished: Collection[str]
    team: Team
    window: Window | None
    first_batch: int

    def observe(
        self, block: str, layers: Mapping[str, nn.Module], runs: Sequence[Callable[[], Any]]
    ) -> Iterator[Observed]:
        """Yield a block's layers, all together or by shared input; each of `runs` runs one part."""
        in_order = [name for name in self.trace.calls if name in layers]
        stages: dict[str, list[str]] = {}
        for name in in_order:
            stages.setdefault(self._stage(name, layers[name]), []).append(name)
        for names in stages.values():
            if done := [name for name in names if name in self.finished]:
                yield Observed(block, {name: {} for name in done}, dict.fromkeys(done, 0))
            stage = {name: layers[name] for name in names if name not in self.finished}
            if not stage:
                continue
            with room_for(list(stage), f"the {self._described(stage)} of its inputs", LESS_MEMORY):
                sums = self._sum(block, stage, runs, share=True)
                if any(s.was_not_shared for s in sums.values()):
                    sums = self._sum(block, stage, runs, share=False)
            _lend_(stage, sums)
            if unseen := [name for name in stage if sums[name].counted == 0]:
                raise ValueError(received_nothing(unseen))
            with room_for(list(stage), f"the {self._described(stage)} of its inputs", LESS_MEMORY):
                values = {id(s): s.values(name) for name, s in sums.items()}
            yield Observed(
                block,
                {name: values[id(s)] for name, s in sums.items()},
                {name: s.tokens for name, s in sums.items()},
            )

    def _stage(self, name: str, module: nn.Module) -> str:
        """What layers have in common that are solved together: an input, or a stack of experts."""
        if not self.sequential:
            return ""
        if is_expert(module):
            return parameter_name(name, module)
        return self.trace.leader[name]

    def _described(self, layers: Mapping[str, nn.Module]) -> str:
        widest = max(_layers.matrix(module).shape[1] for module in layers.values())
        return f"{' and '.join(self.statistics) or 'activations'} (width {widest:,})"

    def _sum(
        self,
        block: str,
        layers: Mapping[str, nn.Module],
        runs: Sequence[Callable[[], Any]],
        share: bool,
    ) -> dict[str, "_Sums"]:
        by_input: dict[str, _Sums] = {}
        sums: dict[str, _Sums] = {}
        for name, module in layers.items():
            key = self.trace.leader[name] if share else name
            columns = _layers.matrix(module).shape[1]
            shared = by_input.setdefault(key, _Sums(self.statistics, columns, self.device))
            shared.members += 1
            sums[name] = shared
        once = all(self.trace.calls[name] == 1 for name in layers)
        current = {"batch": 0, "calls": 0}

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            sums[name].add(module, input_of(args, kwargs), self.first_batch + current["batch"])
            current["calls"] += 1
            if once and current["calls"] == len(layers):
                raise Enough  # nothing after the last of these layers is needed

        with (
            self.team.raising_together(),
            hooks(
                m.register_forward_pre_hook(partial(before, n), with_kwargs=True)
                for n, m in layers.items()
            ),
        ):
            for i, run in enumerate(progress(runs, block, within=True)):
                current.update(batch=self.batch_of[i], calls=0)
                with contextlib.suppress(Enough):
                    run()
        for of_input in by_input.values():
            of_input.all_reduce_(self.team)
        return sums


class _Sums:
    """The statistics of one input, which several layers may read."""

    def __init__(self, names: tuple[str, ...], columns: int, device: torch.device) -> None:
        self.statistics: dict[str, Statistic] = {n: STATISTICS[n](columns, device) for n in names}
        self.members = self.tokens = self.lent = self._calls = self._inputs = 0
        self._last: weakref.ref[Tensor] | None = None

    def add(self, module: nn.Module, x: Float[Tensor, "..."], batch: int) -> None:
        self._calls += 1
        if self.members > 1 and self._last is not None and self._last() is x:
            return
        self._last = weakref.ref(x)
        self._inputs += 1
        rows = _layers.input_rows(module, x)
        self.tokens += rows.shape[0]
        with without_autocast(rows.device):
            for statistic in self.statistics.values():
                statistic.update(rows, batch)

    def all_reduce_(self, team: Team) -> None:
        """Add what the other processes have summed."""
        for statistic in self.statistics.values():
            team.all_reduce_(statistic.sums)
        counts = team.all_gather((self.tokens, self._calls, self._inputs))
        self.tokens, self._calls, self._inputs = map(sum, zip(*counts, strict=True))

    @property
    def counted(self) -> int:
        """The tokens that the statistics are of: this input's, and as many as were lent to it."""
        return self.tokens + self.lent

    def borrow(self, tokens: int, of: Sequence[Tensor], among: int) -> None:
        """Count this many tokens more, as they are on average `among` the tokens with sums `of`."""
        own = (part for statistic in self.statistics.values() for part in statistic.sums)
        for part, all_of_them in zip(own, of, strict=True):
            part.add_(all_of_them, alpha=tokens / among)
        self.lent = tokens

    @property
    def was_not_shared(self) -> bool:
        """Whether layers that shared an input in the traced batch had different ones later."""
        return self._calls != self._inputs * self.members

    def values(self, layer: str) -> dict[str, Tensor]:
        values = {name: s.value(self.counted) for name, s in self.statistics.items()}
        for value in values.values():
            if not value.isfinite().all():
                raise ValueError(
                    f"layer {layer} received NaN or infinite activations: check the weights before "
                    "it and the calibration data"
                )
        return values


# An expert that sees fewer tokens than this for each of its inputs is lent tokens of the others: a
# Gram matrix of fewer is hardly of full rank.
TOKENS_FOR_INPUT = 4


def _lend_(layers: Mapping[str, nn.Module], sums: Mapping[str, _Sums]) -> None:
    """Fill up the statistics of experts that saw few tokens with those of their whole stack."""
    stacks: dict[str, list[str]] = {}
    for name, module in layers.items():
        if is_expert(module):
            stacks.setdefault(parameter_name(name, module), []).append(name)
    for names in stacks.values():
        enough = TOKENS_FOR_INPUT * _layers.matrix(layers[names[0]]).shape[1]
        among = sum(sums[name].tokens for name in names)
        few = [name for name in names if sums[name].tokens < enough]
        if not (few and among):
            continue
        parts = ([p for s in sums[n].statistics.values() for p in s.sums] for n in names)
        total = [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]
        for name in few:
            sums[name].borrow(enough - sums[name].tokens, total, among)


# --- small things --------------------------------------------------------------------------------


def as_list(batches: Iterable[Batch]) -> list[Batch]:
    """The calibration batches as a list.

    Raises:
        ValueError: if it is one batch alone, or there is none.
    """
    require_iterable(batches, "calibration")
    listed = [as_batch(batch, f"calibration batch {i}") for i, batch in enumerate(batches)]
    if not listed:
        raise ValueError("calibration needs at least one batch, got none")
    return listed
