"""Running calibration data through a model and summing what its layers see.

`observe` is the one entry: a generator that hands out the statistics of some layers, lets the
caller change those layers, and goes on with what the changed layers pass on. Where the model holds
a chain of blocks (the decoder layers of a language model, the stages of a CNN), each block is
replayed on recorded inputs, so that only one block runs at a time and every layer sees pruned
inputs; layers outside a chain, and any model without one, are observed by running the whole model.
For half-blocks the blocks are replayed on a second stream too, that of the dense model.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from secateur.core.autocast import without_autocast
from secateur.core.memory import room_for
from secateur.core.tables import printable
from secateur.model import layers as _layers
from secateur.model.blocks import (
    Batch,
    Call,
    Enough,
    find_chains,
    has_labels_beside,
    hooks,
    input_of,
    record_all,
    run_batch,
    to_device,
    usable,
    why_not,
)
from secateur.model.distributed import ALONE, Team
from secateur.model.half_blocks import DenseStream, HalfBlock
from secateur.model.outputs import eval_mode
from secateur.model.padding import SIDES, unpadded
from secateur.model.statistics import STATISTICS, Statistic
from secateur.model.window import Window


@dataclass(frozen=True)
class Observed:
    """What some layers of one block saw; layers with the same input hold the same tensors.

    `half` is the half-block that they are of, where half-blocks were asked for and found.
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
    """Yields the statistics of the layers, block by block; change a layer when it has been yielded.

    With `sequential`, the layers of a block come in the order in which they run, those that share
    an input together, and each sees inputs made by the layers already changed (SparseGPT's "true
    sequential"). Without, a block comes as a whole. `offload` keeps activations between blocks on
    the CPU. Padding, where a batch has an attention mask, is not run: see `secateur.model.padding`.
    With `halves`, layers of blocks come half by half, each with the dense half-block's outputs to
    train towards. Layers that are `finished` come in their turn without statistics, to be put in
    place. The processes of a `team` get the statistics of all their batches, laid end to end by
    rank. With a `window` on the model, all layers of one chain, blocks are loaded in their turn:
    four times in all, however many batches there are.

    The model is in eval mode meanwhile. Close the generator to restore it at once.

    Cost: the model runs once to record, each block once for each yield and once more to pass on.
        Memory: the inputs of one block for all batches, and one yield's statistics. `halves` runs
        each block once more, and holds the dense model's inputs, cuts and outputs of a block too.
    Raises:
        ValueError: if there is no batch (two with `halves`), the model cannot run one, a layer sees
            no token, or NaN or infinity arrives at a layer.
    """
    if statistics:
        _require_activations(layers)
    own = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = window.device if window else own
    inputs: list[Batch] = [to_device(batch, device) for batch in as_list(batches)]
    parts = _unpadded(model, inputs)
    counts = team.all_gather(len({part.of for part in parts}))
    _check_batches(model, inputs, sum(counts), halves)
    with eval_mode(model), torch.no_grad():
        with team.raising_together():
            trace, parts = _trace_unpadded(model, layers, inputs, parts)
        trace = _merged(team.all_gather(trace), layers)
        recorder = _Recorder(
            trace,
            [part.of for part in parts],
            tuple(statistics),
            sequential,
            device,
            halves,
            finished,
            team,
            window,
            first_batch=sum(counts[: team.rank]),
        )
        for chain, wanted in _segments(model, layers, trace):
            yield from _observe_segment(recorder, model, wanted, chain, parts, offload)


def _check_batches(model: nn.Module, batches: Sequence[Batch], count: int, halves: bool) -> None:
    """Warn of labels that nobody reads, and refuse one batch where some are held out."""
    if any(has_labels_beside(model, batch) for batch in batches):
        warnings.warn(
            f"batches are pairs and {type(model).__name__} takes one argument: it runs on the "
            "first of each, the labels are not read",
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
    parts: Sequence["_Part"],
    offload: bool,
) -> Generator[Observed]:
    """Observe layers block by block where their chain can be replayed, else in the whole model."""
    batches, window = [part.batch for part in parts], recorder.window
    with recorder.team.raising_together():
        recorded = record_all(model, chain, batches, offload, once=bool(window)) if chain else None
    everywhere = all(recorder.team.all_gather(recorded is not None))
    if recorded is not None and everywhere:
        yield from _replay_chain(recorder, layers, chain, recorded)
    elif window is not None:
        raise ValueError(
            f"the blocks of this {type(model).__name__} cannot run one by one: they receive more "
            "than what the one before returned and what is known beforehand: load the model whole "
            "and call reconstruct_"
        )
    else:
        runs = [partial(run_batch, model, batch) for batch in batches]
        yield from recorder.observe("the model", layers, runs)


# --- batches without their padding ---------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What is run of a batch at once, and which batch that is."""

    batch: Batch
    of: int


def _unpadded(
    model: nn.Module, batches: Sequence[Batch], sides: Collection[str] = SIDES[0]
) -> Sequence[_Part]:
    """The batches in parts without padding; a batch of nothing else is left out and not counted."""
    holding = [batch for batch in batches if unpadded(model, batch)]
    if not holding:
        raise ValueError(
            f"calibration needs a token that is no padding, the {len(batches)} batches hold none: "
            "check their attention_mask, which is 1 at tokens"
        )
    every = [unpadded(model, batch, sides) for batch in holding]
    return [_Part(part, i) for i, parts in enumerate(every) for part in parts]


def _trace_unpadded(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    parts: Sequence[_Part],
) -> tuple["_Trace", Sequence[_Part]]:
    """The trace of the parts, and these; of parts with padding if the model can run only those."""
    try:
        return _trace(model, layers, parts), parts
    except ValueError as error:
        if all(any(part.batch is batch for batch in batches) for part in parts):
            raise
        first = error
    for sides in SIDES[1:]:
        parts = _unpadded(model, batches, sides)
        with contextlib.suppress(ValueError):
            trace = _trace(model, layers, parts)
            warnings.warn(
                f"{first}. So it runs with the padding that attention_mask marks, and the "
                f"{len(layers)} planned layers, {next(iter(layers))} first, count it where they "
                "see it: give rows without padding where the model can run them",
                stacklevel=3,
            )
            return trace, parts
    raise first


def _require_activations(layers: Mapping[str, nn.Module]) -> None:
    """Token ids are no activations, whatever their shape."""
    for name, module in layers.items():
        if isinstance(module, nn.Embedding):
            raise ValueError(
                f"{name} is an embedding, which is looked up by token ids and multiplies no "
                "activations: leave it out of the plan (ignore=), or use sc.magnitude for it"
            )


# --- which layers run when, and which share an input ---------------------------------------------


@dataclass(frozen=True)
class _Trace:
    """How often each layer ran in one pass, in order of first call, and who shared inputs."""

    calls: Mapping[str, int]
    leader: Mapping[str, str]


def _trace(model: nn.Module, layers: Mapping[str, nn.Module], parts: Sequence[_Part]) -> _Trace:
    """The trace of the first part, and of as many more as it takes until every layer has run."""
    calls: dict[str, int] = {}
    leader: dict[str, str] = {}
    recent: list[tuple[weakref.ref[Tensor], str]] = []
    earlier: set[str] = set()

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in calls:
            x = input_of(args, kwargs)
            # Convolutions that read one input by other kernels or strides see other rows.
            same = [
                first
                for input_, first in recent
                if input_() is x and _layers.reading(layers[first]) == _layers.reading(module)
            ]
            leader[name] = same[0] if same else name
            recent.append((weakref.ref(x), leader[name]))
            del recent[:-RECENT_INPUTS]
        if name not in earlier:
            calls[name] = calls.get(name, 0) + 1

    with hooks(
        m.register_forward_pre_hook(partial(before, n), with_kwargs=True) for n, m in layers.items()
    ):
        for part in parts:
            try:
                run_batch(model, part.batch)
            except Exception as error:
                where = f"calibration batch {part.of}"
                raise ValueError(why_not(model, part.batch, where, error)) from error
            if len(calls) == len(layers):
                break
            earlier.update(calls)
    return _Trace(calls, leader)


def _merged(traces: Sequence[_Trace], layers: Collection[str]) -> _Trace:
    """One trace of several processes: what the first did not see, as the next one saw it."""
    calls: dict[str, int] = {}
    leader: dict[str, str] = {}
    for trace in traces:
        leader.update({name: trace.leader[name] for name in trace.calls if name not in calls})
        calls |= {name: count for name, count in trace.calls.items() if name not in calls}
    if unseen := [name for name in layers if name not in calls]:
        raise ValueError(_received_nothing(unseen))
    return _Trace(calls, leader)


# What takes the room is in^2 for a Gram matrix, whatever the data.
LESS = (
    "leave the layer out of the plan (ignore=), pass shorter batches, or take a method that needs "
    "no Gram matrix, such as sc.wanda"
)

# Layers that share an input run close to one another; keys and values of many decoder layers that
# all read the encoder's output need more than a few.
RECENT_INPUTS = 64


def _segments(
    model: nn.Module, layers: Mapping[str, nn.Module], trace: _Trace
) -> Iterator[tuple[Mapping[str, nn.Module], dict[str, nn.Module]]]:
    """The chain of blocks, empty for none, and its layers: in runs, in the order of the calls."""
    chains = find_chains(model, layers)
    home = {name: p for p in chains for name in layers if name.startswith(p + ".")}
    for prefix, names in groupby(trace.calls, key=lambda name: home.get(name, "")):
        yield chains.get(prefix, {}), {name: layers[name] for name in names}


def _replay_chain(
    recorder: "_Recorder",
    layers: Mapping[str, nn.Module],
    chain: Mapping[str, nn.Module],
    recorded: list[list[Call]],
) -> Generator[Observed]:
    """Observe block after block; `recorded` is emptied on the way, so that its memory is freed."""
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
            in_order = [n for n in recorder.trace.calls if n in held[name]]
            for half in dense.halves(name, block, in_order, calls, previous, wanted):
                of_half = {n: held[name][n] for n in half.layers}
                for observed in recorder.observe(name, of_half, runs):
                    yield replace(observed, half=half)
        if i == last:
            return
        with recorder.team.raising_together():
            for b, call in enumerate(calls):
                previous[b] = call.kept(runs[b](), wanted[b], previous[b])
                call.leaves.clear()


# --- summing what layers see ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Recorder:
    """What stays the same from block to block."""

    trace: _Trace
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
        """Yields a block's layers, all together or by shared input; `runs` are its parts."""
        in_order = [name for name in self.trace.calls if name in layers]
        stages: dict[str, list[str]] = {}
        for name in in_order:
            stages.setdefault(self.trace.leader[name] if self.sequential else "", []).append(name)
        for names in stages.values():
            if done := [name for name in names if name in self.finished]:
                yield Observed(block, {name: {} for name in done}, dict.fromkeys(done, 0))
            stage = {name: layers[name] for name in names if name not in self.finished}
            if not stage:
                continue
            with room_for(list(stage), f"the {self._told(stage)} of its inputs", LESS):
                sums = self._sum(block, stage, runs, share=True)
                if any(s.broken for s in sums.values()):
                    sums = self._sum(block, stage, runs, share=False)
            if unseen := [name for name in stage if sums[name].tokens == 0]:
                raise ValueError(_received_nothing(unseen))
            with room_for(list(stage), f"the {self._told(stage)} of its inputs", LESS):
                values = {id(s): s.values(name) for name, s in sums.items()}
            yield Observed(
                block,
                {name: values[id(s)] for name, s in sums.items()},
                {name: s.tokens for name, s in sums.items()},
            )

    def _told(self, layers: Mapping[str, nn.Module]) -> str:
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
                raise Enough  # nothing behind the last of these layers is needed

        with (
            self.team.raising_together(),
            hooks(
                m.register_forward_pre_hook(partial(before, n), with_kwargs=True)
                for n, m in layers.items()
            ),
        ):
            for i, run in enumerate(tqdm(runs, desc=printable(block), leave=False, disable=None)):
                current.update(batch=self.batch_of[i], calls=0)
                with contextlib.suppress(Enough):
                    run()
        for of_input in by_input.values():
            of_input.all_reduce_(self.team)
        return sums


class _Sums:
    """The statistics of one input, whichever layers read it."""

    def __init__(self, names: tuple[str, ...], columns: int, device: torch.device) -> None:
        self.statistics: dict[str, Statistic] = {n: STATISTICS[n](columns, device) for n in names}
        self.members = self.tokens = self._calls = self._inputs = 0
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
        """Take in what the other processes have summed."""
        for statistic in self.statistics.values():
            team.all_reduce_(statistic.sums)
        counts = team.all_gather((self.tokens, self._calls, self._inputs))
        self.tokens, self._calls, self._inputs = map(sum, zip(*counts, strict=True))

    @property
    def broken(self) -> bool:
        """Whether layers that shared an input in the traced batch did not always do so."""
        return self._calls != self._inputs * self.members

    def values(self, layer: str) -> dict[str, Tensor]:
        values = {name: s.value(self.tokens) for name, s in self.statistics.items()}
        for value in values.values():
            if not value.isfinite().all():
                raise ValueError(
                    f"layer {layer} received NaN or infinite activations: check the weights before "
                    "it and the calibration data"
                )
        return values


# --- small things --------------------------------------------------------------------------------


def as_list(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list; an error for one batch alone, or none."""
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(
            f"batches must be an iterable of batches, got one {type(batches).__name__}: wrap it in "
            "a list, or split it, as in tokens.split(8)"
        )
    if not isinstance(batches, Iterable):
        kind = "none" if batches is None else type(batches).__name__
        raise ValueError(f"batches must be an iterable of batches, got {kind}: pass a list of them")
    listed = [usable(batch, f"calibration batch {i}") for i, batch in enumerate(batches)]
    if not listed:
        raise ValueError("calibration needs at least one batch, got none")
    return listed


def _received_nothing(layers: Sequence[str]) -> str:
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    return (
        f"layer {layers[0]}{more} received 0 tokens: its scores would be noise: add calibration "
        "data that reaches it, or ignore it in the plan"
    )
