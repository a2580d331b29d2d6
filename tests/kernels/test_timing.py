"""The timer: order, rotation, rounds and statistics, with a clock that the test moves."""

from collections.abc import Callable

import pytest
import torch

from secateur.kernels import timing
from secateur.kernels.timing import LEAST_ROUNDS, WARM_UP_ROUNDS, Timing, compare, copies_for

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


def taking(clock: Clock, log: list[str], name: str, *seconds: float) -> Callable[[], None]:
    """A call that logs its name and takes the given times in turn, then the last for ever."""
    remaining = list(seconds)

    def call() -> None:
        log.append(name)
        clock.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return call


def test_the_median_leaves_out_the_warm_up(clock: Clock) -> None:
    slow_start = [9.0] * WARM_UP_ROUNDS
    call = taking(clock, [], "a", *slow_start, 1e-6, 2e-6, 3e-6, 4e-6, 100e-6)
    timed = compare({"a": [call]}, CPU, rounds=5, seconds=1e9)["a"]
    assert timed.median_us == pytest.approx(3.0, rel=1e-3)
    assert timed.low_us == pytest.approx(2.0, rel=1e-3)
    assert timed.high_us == pytest.approx(4.0, rel=1e-3)
    assert timed.rounds == 5
    assert timed.spread == pytest.approx(2 / 3, rel=1e-3)


def test_variants_take_turns_and_each_round_starts_with_the_next(clock: Clock) -> None:
    log: list[str] = []
    compare({name: [taking(clock, log, name, 1.0)] for name in "abc"}, CPU, 3, 1e9)
    timed = log[3 * WARM_UP_ROUNDS :]
    assert ["".join(timed[at : at + 3]) for at in (0, 3, 6)] == ["abc", "bca", "cab"]
    assert len(log) == 3 * (WARM_UP_ROUNDS + 3)


def test_copies_are_rotated(clock: Clock) -> None:
    log: list[str] = []
    copies = [taking(clock, log, f"copy{number}", 1.0) for number in range(3)]
    compare({"a": copies}, CPU, 6, 1e9)
    assert log[WARM_UP_ROUNDS:] == ["copy0", "copy1", "copy2"] * 2


def test_slow_calls_get_fewer_rounds_but_enough(clock: Clock) -> None:
    call = taking(clock, [], "a", 1.0)
    assert compare({"a": [call]}, CPU, 20, seconds=0.5)["a"].rounds == LEAST_ROUNDS
    call = taking(clock, [], "a", 1.0)
    assert compare({"a": [call]}, CPU, 20, seconds=9.5)["a"].rounds == 10 - WARM_UP_ROUNDS


def test_copies_fill_the_rotation_and_no_more() -> None:
    assert copies_for(2**20, rounds=1000) == 256
    assert copies_for(2**20, rounds=20) == 20
    assert copies_for(100 * 2**20, rounds=20) == 2
    assert copies_for(2**30, rounds=20) == 1
    assert copies_for(0, rounds=20) == 20


def test_spread_is_relative() -> None:
    assert Timing(median_us=200.0, low_us=190.0, high_us=220.0, rounds=20).spread == 0.15
