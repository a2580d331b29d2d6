"""The one timer: variants in turn, weights cold by rotation, median with spread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch

ROUNDS = 20
LEAST_ROUNDS = 5  # for calls so slow that `seconds` allows no more; quartiles need a few
WARM_UP_ROUNDS = 2  # the first call allocates, the second meets what it allocated
ROTATION_BYTES = 256 * 2**20  # of all copies together: 8x the last-level cache of a desktop

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one variant's calls."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a fraction of the median; a quiet machine is below 0.1."""
        return (self.high_us - self.low_us) / self.median_us


def copies_for(bytes_of_one_each: int, rounds: int = ROUNDS) -> int:
    """How many copies of every variant's weights to rotate over, within `ROTATION_BYTES`.

    A model's layers take turns in the cache, so a weight is cold when its layer runs. Timing one
    small weight over and over would measure the cache. More copies than rounds are never used.
    """
    return max(1, min(rounds, ROTATION_BYTES // max(1, bytes_of_one_each)))


def compare(
    variants: Mapping[str, Calls],
    device: torch.device,
    rounds: int = ROUNDS,
    seconds: float = 3.0,
) -> dict[str, Timing]:
    """The timing of each variant, whose calls do the same on separate copies of the weights.

    Variants take turns within a round, and each round starts with the next one, so that drift of
    the machine and the cache left by the neighbour fall on all alike. Rounds end early after
    `seconds`. A device that runs behind the host is waited for after every call.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = perf_counter()
    for number in range(-WARM_UP_ROUNDS, rounds):
        if number >= LEAST_ROUNDS and perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls = variants[name]
            call = calls[number % len(calls)]
            begin = perf_counter()
            call()
            _wait_for(device)
            if number >= 0:
                samples[name].append(1e6 * (perf_counter() - begin))
    return {name: _timing(times) for name, times in samples.items()}


def _timing(times_us: list[float]) -> Timing:
    low, _, high = quantiles(times_us, n=4, method="inclusive")
    return Timing(median_us=median(times_us), low_us=low, high_us=high, rounds=len(times_us))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
