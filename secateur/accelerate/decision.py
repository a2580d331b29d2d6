"""Which format a layer gets, and what it runs at which number of tokens: from measured times."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from secateur.accelerate.candidates import DENSE, why_not_each
from secateur.accelerate.choices import (
    LEAST_GAIN,
    NO_LOSS,
    Choice,
    Held,
    Options,
    Policy,
    is_dense,
    runs_at,
)
from secateur.accelerate.layer_report import LayerTimes, OtherPolicy, token_count
from secateur.accelerate.measurements import Measurement
from secateur.accelerate.tokens import Day
from secateur.core.tables import as_bytes
from secateur.formats.contract import Format
from secateur.formats.linear import SparseLinear, Table

POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Decision:
    """The format, or None for dense, what it runs up to which tokens, and all reasons.

    `stored` are the bytes that the weight takes in a checkpoint, in that format. `other` is what
    the other policy would have chosen, where it is something else.
    """

    format: Format | None
    table: Table
    measured: tuple[LayerTimes, ...]
    reason: str
    cannot: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    stored: int = 0
    other: OtherPolicy | None = None


def decide(
    layers: Mapping[Format, SparseLinear],
    day: Day,
    found: Sequence[Measurement],
    dense_bytes: int,
    policy: Policy,
) -> Decision:
    """The choice whose day is shortest under the policy, or dense: `found` is one of each number.

    A choice is faster than dense at one number of tokens (5 %) and slower (3 %) at none, however
    rarely it occurs.
    """
    options = Options(layers, day, tuple(found))
    chosen = options.best(policy)
    (another,) = (one for one in POLICIES if one != policy)
    alternative = options.best(another)
    other = None
    if _names(alternative) != _names(chosen):
        other = _as_other(another, alternative, options, dense_bytes)
    cannot = tuple(dict.fromkeys(reason for one in found for reason in one.cannot.values()))
    dropped = _each(reason for one in found for reason in one.dropped)
    dropped = _each((*dropped, *options.failed))
    names = _names(chosen) or [_fastest(one.microseconds) for one in found]
    measured = tuple(
        LayerTimes(count, tuple(one.microseconds.items()), name, one.remembered)
        for count, one, name in zip(day.tokens, found, names, strict=True)
    )
    if chosen is None:
        why = [*_refusals(options, other, dense_bytes), *_losses(measured), *dropped, *cannot]
        why += [
            f"{one} has no implementation but the reference here" for one in _unmeasurable(layers)
        ]
        reason = "; ".join(_each([*why, *_remedies(options, policy)]))
        return Decision(None, (), measured, reason, cannot, dropped, other=other)
    choice, held = chosen
    stored = layers[choice.format].stored_bytes
    reason = _gains(day, choice, options.dense)
    return Decision(choice.format, held.table, measured, reason, cannot, dropped, stored, other)


def _as_other(
    policy: Policy, chosen: tuple[Choice, Held] | None, options: Options, dense_bytes: int
) -> OtherPolicy:
    if chosen is None:
        names = (DENSE,) * len(options.dense)
        return OtherPolicy(policy, names, options.dense, dense_bytes)
    choice, held = chosen
    return OtherPolicy(policy, choice.names, choice.microseconds, held.nbytes)


def _names(chosen: tuple[Choice, Held] | None) -> tuple[str, ...]:
    return () if chosen is None else chosen[0].names


def _each(reasons: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reasons))


def _fastest(microseconds: Mapping[str, float]) -> str | None:
    """The fastest packed candidate that does not run dense."""
    packed = [name for name in microseconds if not is_dense(name)]
    return min(packed, key=lambda name: microseconds[name], default=None)


def _unmeasurable(layers: Mapping[Format, SparseLinear]) -> list[Format]:
    """Formats without anything that could be measured on any device."""
    return [format for format, layer in layers.items() if not why_not_each(layer, 1)]


def _gains(day: Day, choice: Choice, dense: Sequence[float]) -> str:
    times = list(zip(day.tokens, choice.ratios, strict=True))
    faster = [str(n) for n, ratio in times if ratio >= LEAST_GAIN]
    others = [str(n) for n, ratio in times if ratio < LEAST_GAIN]
    told = "faster than dense at every number of tokens"
    if others:
        told = f"faster than dense at tokens {', '.join(faster)}, as fast at {', '.join(others)}"
    now, before = day.average(choice.microseconds), day.average(dense)
    if now is None or before is None:
        return told
    return f"{told}; a call takes {now:.1f} us instead of {before:.1f} on average"


def _losses(measured: Sequence[LayerTimes]) -> list[str]:
    """Where the fastest sparse candidate does not gain enough."""
    return [
        f"at {token_count(entry.tokens)} {entry.fastest_sparse} is {entry.ratio:.2f}x of the best "
        "dense"
        for entry in measured
        if entry.fastest_sparse is not None and entry.ratio < LEAST_GAIN
    ]


def _refusals(options: Options, other: OtherPolicy | None, dense_bytes: int) -> Iterator[str]:
    """Why what is fast enough at every number of tokens was not taken."""
    if other is not None:
        ratios = [
            f"{dense / us:.2f}x at {token_count(count)}"
            for count, dense, us in zip(
                options.day.tokens, options.dense, other.microseconds, strict=True
            )
        ]
        yield (
            f"policy='memory' refuses {', '.join(_each(other.runs))} ({', '.join(ratios)}): it "
            f"would hold {as_bytes(other.nbytes)}, more than the weight once (dense holds "
            f"{as_bytes(dense_bytes)}): policy='fastest' takes it"
        )
        return
    longer = [one for one in options.choices() if one.is_fast and not one.gains]
    if longer:
        best = min(longer, key=lambda one: one.day)
        yield (
            f"all calls together would take {float(best.day):.3f}x as long as dense with "
            f"{', '.join(_each(best.names))}"
        )


def _remedies(options: Options, policy: Policy) -> Iterator[str]:
    """Which numbers of tokens stand in the way of a gain at the others, if some do."""
    tokens, tried = options.day.tokens, dict[tuple[int, ...], None]()
    for format in options.layers:
        for some in options.sets_of(format):
            names = options.fastest_of(some)
            fits = [
                name is not None and dense / one.microseconds[name] >= NO_LOSS
                for name, one, dense in zip(names, options.found, options.dense, strict=True)
            ]
            tried[tuple(n for n, fit in zip(tokens, fits, strict=True) if fit)] = None
    for kept in sorted(tried, key=len, reverse=True):
        if kept and len(kept) < len(tokens):
            without = options.only(kept)
            if (found := without.best(policy)) is not None:
                yield _remedy(options, kept, *found)
                return


def _remedy(options: Options, kept: tuple[int, ...], choice: Choice, held: Held) -> str:
    """The numbers to leave out, what is gained at the others, and what then runs at those."""
    left = [count for count in options.day.tokens if count not in kept]
    gains = [
        f"{ratio:.2f}x at {token_count(count)}"
        for count, ratio in zip(kept, choice.ratios, strict=True)
    ]
    costs = []
    for count, one, dense in zip(options.day.tokens, options.found, options.dense, strict=True):
        if count in left:
            name = f"{choice.format} {runs_at(held.table, count)}"
            us = one.microseconds.get(name)
            speed = "not measured" if us is None else f"{dense / us:.2f}x of dense"
            costs.append(f"at {token_count(count)} it then runs {name}, {speed}")
    return (
        f"leave {', '.join(map(str, left))} out of tokens= and it runs {choice.format}, "
        f"{', '.join(gains)}; {', '.join(costs)}"
    )
