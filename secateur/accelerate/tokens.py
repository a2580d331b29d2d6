"""The numbers of tokens that a model is called with, and how often each of them occurs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from numbers import Real

MOST_TOKENS = 2**20  # in one call

Tokens = Sequence[int] | Mapping[int, int | float]


@dataclass(frozen=True)
class Day:
    """Numbers of tokens in one call, ascending, and how often each occurs; `often` may be empty.

    Then each number counts for an equal share of the time that the dense layer would take. If it
    were called equally often with each, the largest number would decide alone: 2,048 tokens take
    as long as dozens of single ones.
    """

    tokens: tuple[int, ...]
    often: tuple[float, ...] = ()

    def relative(self, microseconds: Sequence[float], dense: Sequence[float]) -> Fraction:
        """The day's time with these times of a call, as a fraction of the dense day's; exact."""
        baseline = [Fraction(us) for us in dense]
        often = [Fraction(times) for times in self.often] or [1 / us for us in baseline]
        took = [n * Fraction(us) for n, us in zip(often, microseconds, strict=True)]
        usual = [n * us for n, us in zip(often, baseline, strict=True)]
        return sum(took, Fraction()) / sum(usual, Fraction())

    def average(self, microseconds: Sequence[float]) -> float | None:
        """The time of a call on average, if it is known how often each number occurs."""
        if not self.often:
            return None
        total = sum(n * us for n, us in zip(self.often, microseconds, strict=True))
        return total / sum(self.often)

    def only(self, tokens: Sequence[int]) -> "Day":
        """The day's calls with these numbers of tokens."""
        often = dict(zip(self.tokens, self.often, strict=False))
        return Day(tuple(tokens), tuple(often[count] for count in tokens if often))


def day_of(tokens: Tokens) -> Day:
    """The day that the argument `tokens` describes: numbers, or a mapping to how often they occur.

    Raises: ValueError for no numbers, what is no number of tokens, or no finite positive frequency.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        counts = list[object]()
    else:
        counts = list[object](tokens)
    if not counts or any(type(n) is not int or not 1 <= n <= MOST_TOKENS for n in counts):
        raise ValueError(
            f"accelerate_ needs numbers of tokens from 1 upwards, got {tokens!r}: "
            f"name those that the model will be called with, such as (1, 16), at most {MOST_TOKENS}"
        )
    if not isinstance(tokens, Mapping):
        return Day(tuple(sorted(set(tokens))))
    for count, often in tokens.items():
        if not _is_frequency(often):
            raise ValueError(
                f"accelerate_ needs to know how often {count} tokens occur, a finite number above "
                f"0, got {often!r}: leave out what never occurs, and give the others as in "
                "{1: 1000, 2048: 1}"
            )
    ordered = sorted(tokens.items())
    return Day(tuple(count for count, _ in ordered), tuple(float(often) for _, often in ordered))


def _is_frequency(often: object) -> bool:
    if not isinstance(often, Real) or isinstance(often, bool):
        return False
    try:
        return isfinite(often) and float(often) > 0
    except OverflowError:  # an integer that no float holds
        return False
