"""Which layers run when, and which of them share an input: found by running one calibration batch.

Batches are run without their padding where the model can do so: see `secateur.model.padding`.
"""

import contextlib
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from secateur.model.blocks import Batch, find_chains, hooks, input_of, run_batch, why_not
from secateur.model.distributed import Team
from secateur.model.layers import rows_key
from secateur.model.padding import SIDES, unpadded
from secateur.model.piece import is_expert, parameter_name

# Layers that share an input run close to one another; the keys and values of many decoder layers
# that all read the encoder's output need more than a few.
RECENT_INPUTS = 64


@dataclass(frozen=True)
class Part:
    """Rows of a batch that run together without padding, and the number of that batch."""

    batch: Batch
    of: int


@dataclass(frozen=True)
class LayerTrace:
    """How often each layer ran in one pass, in order of first call, and the first with its input.

    `leader` maps a layer to the first one that read the same input, which may be itself.
    """

    calls: Mapping[str, int]
    leader: Mapping[str, str]


def without_padding(
    model: nn.Module, batches: Sequence[Batch], sides: Collection[str] = SIDES[0]
) -> Sequence[Part]:
    """The batches in parts without padding; batches of padding alone are left out and not counted.

    Raises:
        ValueError: if no batch holds a token.
    """
    holding = [batch for batch in batches if unpadded(model, batch)]
    if not holding:
        raise ValueError(
            f"calibration needs a token that is no padding, the {len(batches)} batches hold none: "
            "check their attention_mask, which is 1 at tokens"
        )
    every = [unpadded(model, batch, sides) for batch in holding]
    return [Part(part, i) for i, parts in enumerate(every) for part in parts]


def trace_together(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    parts: Sequence[Part],
    team: Team,
) -> tuple[LayerTrace, Sequence[Part]]:
    """The team's trace, and the parts that can be run: with padding if the model needs it.

    Raises:
        ValueError: if the model can run none, or a layer does not run in any process.
    """
    with team.raising_together():
        trace, parts = _trace_unpadded(model, layers, batches, parts)
    return _merged(team.all_gather(trace), layers), parts


def segments(
    model: nn.Module, layers: Mapping[str, nn.Module], trace: LayerTrace
) -> Iterator[tuple[Mapping[str, nn.Module], dict[str, nn.Module]]]:
    """Each run of layers in one chain, in the order of their calls, with the chain's blocks.

    There are no blocks for layers outside a chain.
    """
    chains = find_chains(model, layers)
    home = {name: p for p in chains for name in layers if name.startswith(p + ".")}
    for prefix, names in groupby(trace.calls, key=lambda name: home.get(name, "")):
        yield chains.get(prefix, {}), {name: layers[name] for name in names}


def received_nothing(layers: Sequence[str]) -> str:
    """The message for layers that no calibration token reaches."""
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    return (
        f"layer {layers[0]}{more} received 0 tokens: its scores would be noise: add calibration "
        "data that reaches it, or ignore it in the plan"
    )


def _trace_unpadded(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    parts: Sequence[Part],
) -> tuple[LayerTrace, Sequence[Part]]:
    """The trace and its parts; if the model cannot run those, parts with more of the padding."""
    try:
        return _trace(model, layers, parts), parts
    except ValueError as error:
        if all(any(part.batch is batch for batch in batches) for part in parts):
            raise
        first = error
    for sides in SIDES[1:]:
        parts = without_padding(model, batches, sides)
        with contextlib.suppress(ValueError):
            trace = _trace(model, layers, parts)
            warnings.warn(
                f"{first}. So it runs with the padding that attention_mask marks, and the "
                f"{len(layers)} planned layers, {next(iter(layers))} first, count it where they "
                "see it: give rows without padding where the model can run them",
                stacklevel=4,
            )
            return trace, parts
    raise first


def _trace(model: nn.Module, layers: Mapping[str, nn.Module], parts: Sequence[Part]) -> LayerTrace:
    """The trace of the first part, and of later ones until every layer has run."""
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
                if input_() is x and rows_key(layers[first]) == rows_key(module)
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
    return LayerTrace(calls, leader)


def _merged(traces: Sequence[LayerTrace], layers: Mapping[str, nn.Module]) -> LayerTrace:
    """The processes' traces as one: each layer as the first process that ran it saw it."""
    calls: dict[str, int] = {}
    leader: dict[str, str] = {}
    for trace in traces:
        leader.update({name: trace.leader[name] for name in trace.calls if name not in calls})
        calls |= {name: count for name, count in trace.calls.items() if name not in calls}
    calls = _with_experts_not_chosen(calls, layers)
    if unseen := [name for name in layers if name not in calls]:
        raise ValueError(received_nothing(unseen))
    return LayerTrace(calls, leader | {name: name for name in calls if name not in leader})


def _with_experts_not_chosen(
    calls: Mapping[str, int], layers: Mapping[str, nn.Module]
) -> dict[str, int]:
    """The calls, and after the first expert of each stack those that no token was sent to."""
    waiting: dict[str, list[str]] = {}
    for name, module in layers.items():
        if is_expert(module) and name not in calls:
            waiting.setdefault(parameter_name(name, module), []).append(name)
    found: dict[str, int] = {}
    for name, count in calls.items():
        found[name] = count
        if is_expert(layers[name]):
            found |= dict.fromkeys(waiting.pop(parameter_name(name, layers[name]), ()), 1)
    return found
