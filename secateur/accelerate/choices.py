"""What a layer could run: a format with an implementation for each number of tokens, its cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from itertools import combinations, groupby
from typing import Literal

from secateur.accelerate.candidates import DENSE, PREPACKED, failure
from secateur.accelerate.layer_report import best_dense
from secateur.accelerate.measurements import Measurement
from secateur.accelerate.tokens import Day
from secateur.formats.contract import Format
from secateur.formats.linear import PROBED_TOKENS, REFERENCE, SparseLinear, Table

LEAST_GAIN = 1.05  # what a change is worth; less may be noise
NO_LOSS = 0.97  # medians on a quiet machine repeat to about 3 %: above, a layer is as fast as dense
ONE_FORM = 1.02  # of its packed bytes: a second copy is 2, padding and row numbers are less

Policy = Literal["memory", "fastest"]


@dataclass(frozen=True)
class Choice:
    """A format and, for each number of tokens, the candidate that it would run.

    `ratios` are to the best dense, `day` is the day's time as a fraction of the dense day's.
    """

    format: Format
    names: tuple[str, ...]
    microseconds: tuple[float, ...]
    ratios: tuple[float, ...]
    day: Fraction

    @property
    def is_fast(self) -> bool:
        """Whether it is faster than dense somewhere and slower nowhere.

        Dense against itself is noise.
        """
        times = zip(self.names, self.ratios, strict=True)
        faster = any(ratio >= LEAST_GAIN and not is_dense(name) for name, ratio in times)
        return faster and min(self.ratios) >= NO_LOSS

    @property
    def gains(self) -> bool:
        """Whether it is fast at every number of tokens and in all of them together."""
        return self.is_fast and self.day < 1


@dataclass(frozen=True)
class Held:
    """What a layer runs at which number of tokens, and the bytes that its weight then takes."""

    table: Table
    nbytes: int


@dataclass(frozen=True)
class Options:
    """One layer in every format that fits it, with `found` measured at each number of tokens.

    `failed` collects why choices were none: what they need could not be arranged.
    """

    layers: Mapping[Format, SparseLinear]
    day: Day
    found: tuple[Measurement, ...]
    failed: list[str] = field(default_factory=list)
    known: dict[tuple[str, ...], Held | None] = field(default_factory=dict)

    @cached_property
    def dense(self) -> tuple[float, ...]:
        """Microseconds of the best dense at each number of tokens."""
        return tuple(best_dense(one.microseconds)[1] for one in self.found)

    def only(self, tokens: Sequence[int]) -> "Options":
        """The same layer, called with these numbers of tokens alone."""
        found = zip(self.day.tokens, self.found, strict=True)
        kept = tuple(one for count, one in found if count in tokens)
        return Options(self.layers, self.day.only(tokens), kept)

    def best(self, policy: Policy) -> tuple[Choice, Held] | None:
        """The choice whose day is shortest, and of those the smallest; None where dense is."""
        gaining = (choice for choice in self.choices() if choice.gains)
        for _, tied in groupby(sorted(gaining, key=_day), key=_day):
            held = [(choice, self._held(choice)) for choice in tied]
            allowed = [
                (choice, one)
                for choice, one in held
                if one is not None and (policy == "fastest" or one.nbytes <= self._limit(choice))
            ]
            if allowed:
                return min(allowed, key=lambda pair: pair[1].nbytes)
        return None

    def choices(self) -> Iterator[Choice]:
        """For each set of a format's implementations, the fastest of it everywhere."""
        seen = set[tuple[str, ...]]()
        for format in self.layers:
            for some in self.sets_of(format):
                names = self.fastest_of(some)
                if None in names or names in seen:
                    continue
                chosen = tuple(name for name in names if name is not None)
                seen.add(chosen)
                at = list(zip(self.found, self.dense, chosen, strict=True))
                us = tuple(one.microseconds[name] for one, _, name in at)
                ratios = tuple(dense / one.microseconds[name] for one, dense, name in at)
                day = self.day.relative([_worth(*each) for each in at], self.dense)
                yield Choice(format, chosen, us, ratios, day)

    def sets_of(self, format: Format) -> Iterator[tuple[str, ...]]:
        """Every set of the format's candidates that were measured at any number of tokens."""
        names = [f"{format} {one.name}" for one in format.implementations]
        own = [name for name in names if any(name in one.microseconds for one in self.found)]
        for size in range(1, len(own) + 1):
            yield from combinations(own, size)

    def fastest_of(self, some: Sequence[str]) -> tuple[str | None, ...]:
        """The fastest of these candidates at each number of tokens, None where none can run."""
        fastest = list[str | None]()
        for one, dense in zip(self.found, self.dense, strict=True):
            able = [name for name in some if name in one.microseconds]
            fastest.append(min(able, key=partial(_worth, one, dense), default=None))
        return tuple(fastest)

    def _limit(self, choice: Choice) -> float:
        return ONE_FORM * self.layers[choice.format].stored_bytes

    def _held(self, choice: Choice) -> Held | None:
        """The table of the choice that takes the fewest bytes, found by using it."""
        if choice.names not in self.known:
            layer, options = self.layers[choice.format], list[Held]()
            for table in self._tables(choice):
                try:
                    layer.use(table)
                    options.append(Held(table, layer.nbytes))
                except (RuntimeError, ValueError, MemoryError) as problem:
                    self.failed.append(failure(", ".join(dict.fromkeys(choice.names)), problem))
                finally:
                    layer.use(REFERENCE)
            self.known[choice.names] = min(options, key=lambda one: one.nbytes, default=None)
        return self.known[choice.names]

    def _tables(self, choice: Choice) -> list[Table]:
        """The tables that run the choice: they differ above the largest number of tokens.

        The last implementation serves as many more as it can. Then one that is used anyway, one
        that was right at the largest number, or the reference goes on, whichever takes least: no
        bytes are spent on numbers of tokens that nobody named.
        """
        layer, rows = self.layers[choice.format], list[tuple[str, int | None]]()
        prefix = f"{choice.format} "
        short = [name.removeprefix(prefix) for name in choice.names]
        for name, count in zip(short, self.day.tokens, strict=True):
            if rows and rows[-1][0] == name:
                rows.pop()
            rows.append((name, count))
        why_not = {
            one.name: partial(one.why_not, layer.held) for one in layer.format.implementations
        }
        last, limit = short[-1], self.day.tokens[-1]
        largest = max(PROBED_TOKENS[-1], limit)
        if why_not[last](largest) is None:
            return [(*rows[:-1], (last, None))]
        more = [count for count in PROBED_TOKENS if count > limit and why_not[last](count) is None]
        rows[-1] = (last, max(more, default=limit))
        right = [name for name in self.found[-1].microseconds if name.startswith(prefix)]
        ends = dict.fromkeys([*reversed(short), *(name.removeprefix(prefix) for name in right)])
        able = [name for name in ends if why_not[name](largest) is None]
        return [(*rows, (name, None)) for name in (*able, "reference")]


def is_dense(name: str) -> bool:
    """Whether a candidate is the dense layer, or a format's implementation that runs as it does."""
    return name in (DENSE, PREPACKED) or name.endswith(f" {DENSE}")


def runs_at(table: Table, tokens: int) -> str:
    """The implementation that the table runs at this number of tokens."""
    return next(name for name, limit in table if limit is None or tokens <= limit)


def _worth(found: Measurement, dense: float, name: str) -> float:
    """The candidate's microseconds: what runs as dense does is no faster than dense, but noise."""
    us = found.microseconds[name]
    return max(us, dense) if is_dense(name) else us


def _day(choice: Choice) -> Fraction:
    return choice.day
