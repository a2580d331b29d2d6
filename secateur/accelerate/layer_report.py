"""What `accelerate_` measured of one layer and made of it, as data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secateur.accelerate.candidates import DENSE, PREPACKED


@dataclass(frozen=True)
class LayerTimes:
    """One layer at one number of tokens: the time of each candidate, and the one that would run.

    The fastest candidate, of the chosen format if one was chosen.
    `remembered` times are from an earlier call on a like layer.
    """

    tokens: int
    microseconds: tuple[tuple[str, float], ...]
    fastest_sparse: str | None
    remembered: bool = False

    def ratio_to(self, baseline: str) -> float | None:
        """How many times faster the fastest sparse candidate is, if both were measured."""
        times = dict(self.microseconds)
        if self.fastest_sparse is None or baseline not in times:
            return None
        return times[baseline] / times[self.fastest_sparse]

    @property
    def ratio(self) -> float:
        """Against the faster of eager and prepacked dense; 0 where nothing sparse could run."""
        ratios = [self.ratio_to(DENSE), self.ratio_to(PREPACKED)]
        return min((ratio for ratio in ratios if ratio is not None), default=0.0)

    def fastest_of(self, formats: Sequence[str]) -> tuple[str, float] | None:
        """The fastest candidate of these formats and its microseconds."""
        found = [entry for entry in self.microseconds if entry[0].rpartition(" ")[0] in formats]
        return min(found, key=lambda entry: entry[1], default=None)


@dataclass(frozen=True)
class OtherPolicy:
    """What the other policy would have made of a layer: candidates and their microseconds.

    One of each for every number of tokens, and the bytes that the weight would take.
    """

    policy: str
    runs: tuple[str, ...]
    microseconds: tuple[float, ...]
    nbytes: int


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: the format it runs in (or `dense`), and why.

    `table` says which implementation runs up to which number of tokens. Bytes are those of the
    weight in use; `stored` are those that a checkpoint takes, less where implementations hold it
    once more. `weight_error` is ||W - W'|| / ||W||, 0 unless the format rounds weights to a grid.
    `cannot` is what implementations said that cannot run here, `dropped` why others were no choice:
    out of memory, a library's error, a wrong result. `other` is what the other policy would have
    chosen, where it is something else. Of an expert in a stack `chosen` is the share of calls with
    each number of tokens that run it, if the router sends tokens everywhere alike.
    """

    layer: str
    shape: tuple[int, int]
    format: str
    measured: tuple[LayerTimes, ...]
    measured_on: str
    bytes_before: int
    bytes_after: int
    reason: str
    weight_error: float = 0.0
    table: tuple[tuple[str, int | None], ...] = ()
    stored: int = 0
    cannot: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    other: OtherPolicy | None = None
    chosen: tuple[float, ...] = ()

    @property
    def dense_us(self) -> tuple[float, ...]:
        """Microseconds of the best dense at each measured number of tokens, in a call."""
        return self.a_call(best_dense(dict(one.microseconds))[1] for one in self.measured)

    @property
    def us(self) -> tuple[float, ...]:
        """Microseconds of what the layer now runs at each number of tokens, in a call."""
        if self.format == DENSE:
            return self.dense_us
        ran = (dict(one.microseconds)[one.fastest_sparse or DENSE] for one in self.measured)
        return self.a_call(ran)

    def a_call(self, microseconds: Iterable[float]) -> tuple[float, ...]:
        """What a call of the model spends on the layer on average, which takes so long to run."""
        us = tuple(microseconds)
        return tuple(s * t for s, t in zip(self.chosen, us, strict=True)) if self.chosen else us


def best_dense(microseconds: Mapping[str, float]) -> tuple[str, float]:
    """The faster of eager and prepacked dense, and its microseconds."""
    return min(
        ((name, us) for name, us in microseconds.items() if name in (DENSE, PREPACKED)),
        key=lambda entry: entry[1],
    )


def token_count(number: int) -> str:
    return f"{number} token{'s' * (number != 1)}"
