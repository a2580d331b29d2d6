"""Which format a layer gets, and what it runs at which number of tokens: from measured times."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import prod
from typing import Literal

from secateur.accelerate.candidates import DENSE, PREPACKED, why_not_each
from secateur.accelerate.measurements import Measurement
from secateur.accelerate.report import LayerTimes, best_dense
from secateur.formats.contract import Format, held_tensors
from secateur.formats.linear import PROBED_TOKENS, SparseLinear, Table

LEAST_GAIN = 1.05  # what a change is worth; less may be noise
NO_LOSS = 0.97  # medians on a quiet machine repeat to about 3 %: above, a layer is as fast as dense

Policy = Literal["fastest", "memory"]


@dataclass(frozen=True)
class Decision:
    """The format, or None for dense, what it runs up to which tokens, and all reasons."""

    format: Format | None
    table: Table
    measured: tuple[LayerTimes, ...]
    reason: str
    cannot: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """A format and, for each number of tokens, the candidate that it would run."""

    format: Format
    names: tuple[str, ...]
    ratios: tuple[float, ...]
    nbytes: int

    @property
    def gains(self) -> bool:
        """Whether it is faster somewhere and slower nowhere; dense against itself is noise."""
        times = zip(self.names, self.ratios, strict=True)
        faster = any(ratio >= LEAST_GAIN and not _is_dense(name) for name, ratio in times)
        return faster and min(self.ratios) >= NO_LOSS


def decide(
    layers: Mapping[Format, SparseLinear],
    tokens: tuple[int, ...],
    found: Sequence[Measurement],
    dense_bytes: int,
    policy: Policy,
) -> Decision:
    """The format that gains most over all numbers of tokens, or none: `found` is one of each."""
    cannot = tuple(dict.fromkeys(reason for one in found for reason in one.cannot.values()))
    dropped = tuple(dict.fromkeys(reason for one in found for reason in one.dropped))
    choices = [choice for layer in layers.values() for choice in _choices(layer, found)]
    gaining = [choice for choice in choices if choice.gains]
    refused = list[str]()
    if policy == "memory":
        allowed = [choice for choice in gaining if choice.nbytes < dense_bytes]
        refused = [_refusal(one, dense_bytes) for one in gaining if one not in allowed]
        gaining = allowed
    dropped = (*dropped, *dict.fromkeys(refused))
    best = max(gaining, key=lambda one: (prod(one.ratios), -one.nbytes), default=None)
    names = [_fastest(one.microseconds) for one in found] if best is None else best.names
    measured = tuple(
        LayerTimes(count, tuple(one.microseconds.items()), name, one.remembered)
        for count, one, name in zip(tokens, found, names, strict=True)
    )
    if best is None:
        unmeasurable = [
            f"{one} has no implementation but the reference here" for one in _unmeasurable(layers)
        ]
        why = dict.fromkeys([*_losses(measured), *dropped, *cannot, *unmeasurable])
        return Decision(None, (), measured, "; ".join(why), cannot, dropped)
    table = _table(layers[best.format], best.names, tokens, policy)
    reason = _gains(tokens, best.ratios)
    return Decision(best.format, table, measured, reason, cannot, dropped)


def _choices(layer: SparseLinear, found: Sequence[Measurement]) -> Iterator[_Choice]:
    """For each set of the format's implementations, the fastest of it at every number of tokens."""
    format = layer.format
    known_to = {f"{format} {entry.name}": entry for entry in format.implementations}
    prefix = f"{format} "
    times = [
        {name: us for name, us in one.microseconds.items() if name.startswith(prefix)}
        for one in found
    ]
    everything = list(dict.fromkeys(name for known in times for name in known))
    seen = set[tuple[str, ...]]()
    for size in range(1, len(everything) + 1):
        for some in combinations(everything, size):
            usable = [{name: us for name, us in known.items() if name in some} for known in times]
            if not all(usable):
                continue
            names = tuple(min(known, key=known.__getitem__) for known in usable)
            if names in seen:
                continue
            seen.add(names)
            sizes = {**layer.held_bytes}
            for name, one in zip(names, found, strict=True):
                sizes |= one.holds[name]
            held = held_tensors(format, [known_to[name] for name in dict.fromkeys(names)])
            ratios = tuple(
                best_dense(one.microseconds)[1] / known[name]
                for name, known, one in zip(names, usable, found, strict=True)
            )
            yield _Choice(format, names, ratios, sum(sizes[name] for name in held))


def _table(
    layer: SparseLinear, names: Sequence[str], tokens: tuple[int, ...], policy: Policy
) -> Table:
    """What was fastest at each number of tokens serves up to it.

    The last serves as many more as it can run; above that an implementation that is held already,
    else dense unless memory counts, else the reference.
    """
    rows = list[tuple[str, int | None]]()
    short = [name.removeprefix(f"{layer.format} ") for name in names]
    for name, count in zip(short, tokens, strict=True):
        if rows and rows[-1][0] == name:
            rows.pop()
        rows.append((name, count))
    problems = {
        implementation.name: partial(implementation.why_not, layer.held)
        for implementation in layer.format.implementations
    }
    last, limit = short[-1], tokens[-1]
    beyond = [last, *problems.keys() & short, *([DENSE] if policy == "fastest" else [])]
    largest = max(PROBED_TOKENS[-1], limit)
    able = [name for name in beyond if name in problems and problems[name](largest) is None]
    tail = able[0] if able else "reference"
    if tail == last:
        return (*rows[:-1], (last, None))
    more = [count for count in PROBED_TOKENS if count > limit and problems[last](count) is None]
    return (*rows[:-1], (last, max(more, default=limit)), (tail, None))


def _fastest(microseconds: Mapping[str, float]) -> str | None:
    """The fastest packed candidate that does not run dense."""
    packed = [name for name in microseconds if not _is_dense(name)]
    return min(packed, key=lambda name: microseconds[name], default=None)


def _is_dense(name: str) -> bool:
    """Whether a candidate is the dense layer, or a format's implementation that runs as it does."""
    return name in (DENSE, PREPACKED) or name.endswith(f" {DENSE}")


def _unmeasurable(layers: Mapping[Format, SparseLinear]) -> list[Format]:
    """Formats without anything that could be measured on any device."""
    return [format for format, layer in layers.items() if not why_not_each(layer, 1)]


def _gains(tokens: Sequence[int], ratios: Sequence[float]) -> str:
    faster = [str(n) for n, ratio in zip(tokens, ratios, strict=True) if ratio >= LEAST_GAIN]
    others = [str(n) for n, ratio in zip(tokens, ratios, strict=True) if ratio < LEAST_GAIN]
    if not others:
        return "faster than dense at every number of tokens"
    return f"faster than dense at tokens {', '.join(faster)}, as fast at {', '.join(others)}"


def _losses(measured: Sequence[LayerTimes]) -> list[str]:
    """Where the fastest sparse candidate does not gain enough."""
    return [
        f"at {entry.tokens} token{'s' * (entry.tokens != 1)} {entry.fastest_sparse} is "
        f"{entry.ratio:.2f}x of the best dense"
        for entry in measured
        if entry.fastest_sparse is not None and entry.ratio < LEAST_GAIN
    ]


def _refusal(choice: _Choice, dense_bytes: int) -> str:
    names = ", ".join(dict.fromkeys(choice.names))
    return (
        f"policy 'memory' refuses {names}: it would hold {choice.nbytes} bytes, dense holds "
        f"{dense_bytes}"
    )
