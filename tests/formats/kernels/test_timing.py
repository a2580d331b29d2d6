"""The timer: order, rotation, rounds and statistics, with a clock that the test moves."""

from collections.abc import Callable

import pytest
import torch

from secateur.formats.kernels import timing
from secateur.formats.kernels.timing import (
    LEAST_ROUNDS,
    MOST_LAUNCHES,
    WARM_UP_ROUNDS,
    Timing,
    VariantFailed,
    chain,
    cold_copies,
    compare,
    copies_for,
    copies_on,
    in_turns,
)

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


def test_a_variant_that_raises_is_named(clock: Clock) -> None:
    def refuse() -> None:
        raise RuntimeError("status 7")

    good = taking(clock, [], "good", 1.0)
    with pytest.raises(VariantFailed, match="bad failed: status 7") as raised:
        compare({"good": [good], "bad": [refuse]}, CPU, 3, 1e9)
    assert raised.value.variant == "bad" and str(raised.value.problem) == "status 7"
    chains = {"good": chain([good], CPU)}
    chains["bad"] = timing.Chain(refuse, lambda: None, 1)
    with pytest.raises(VariantFailed, match="bad failed: status 7"):
        in_turns(chains, CPU)


def test_a_chains_time_is_that_of_one_launch(clock: Clock) -> None:
    log: list[str] = []
    calls = [taking(clock, log, name, 1e-6) for name in ("copy0", "copy1")]
    made = chain(calls, CPU, 4)
    assert made.launches == 4 and not made.captured
    log.clear()
    found = in_turns({"a": made}, CPU, rounds=3)["a"]
    assert found.median_us == pytest.approx(1.0, rel=1e-3) and found.rounds == 3
    assert log == ["copy0", "copy1"] * 2 * (3 + WARM_UP_ROUNDS)


def test_chains_take_turns_and_none_always_follows_the_same(clock: Clock) -> None:
    def logged() -> list[str]:
        log: list[str] = []
        chains = {name: chain([taking(clock, log, name, 1e-6)], CPU, 1) for name in "abc"}
        log.clear()
        in_turns(chains, CPU, rounds=20)
        return ["".join(log[at : at + 3]) for at in range(0, len(log), 3)]

    rounds = logged()
    assert len(rounds) == WARM_UP_ROUNDS + 20
    assert {"".join(sorted(turns)) for turns in rounds} == {"abc"}
    followed = {pair for turns in rounds for pair in (turns[:2], turns[1:])}
    assert followed == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert logged() == rounds


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 20), (7.5, 7), (0.1, LEAST_ROUNDS)])
def test_slow_chains_get_fewer_rounds_but_enough(clock: Clock, seconds: float, rounds: int) -> None:
    made = chain([taking(clock, [], "a", 0.5)], CPU, 2)
    assert in_turns({"a": made}, CPU, 20, seconds)["a"].rounds == rounds


def test_copies_are_cold_or_there_is_no_room() -> None:
    assert cold_copies(read=10, held=20, cold=1000, memory=2000) == 100
    assert cold_copies(read=300, held=300, cold=1000, memory=1200) == 4
    assert cold_copies(read=1, held=1, cold=1000, memory=10**6) == MOST_LAUNCHES
    assert cold_copies(read=5000, held=5000, cold=1000, memory=10) == 1  # the weight itself
    with pytest.raises(MemoryError, match="100 copies of 20 bytes, .* need room; 1999 bytes are"):
        cold_copies(read=10, held=20, cold=1000, memory=1999)


# --- on a GPU -----------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@gpu
def test_calls_are_captured_and_rotate() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    weights = [torch.full((64, 64), float(value), device=device) for value in (1, 2)]
    x = torch.ones(8, 64, device=device)
    calls = [lambda weight=weight: x @ weight for weight in weights]
    made = chain(calls, device, 4)
    assert made.captured and made.launches == 4
    result = made.result()
    assert isinstance(result, torch.Tensor)
    result.zero_()
    made.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, torch.full((8, 64), 128.0, device=device))  # of the last copy
    free = chain(calls, device)
    assert free.captured and free.launches % 2 == 0 and free.launches <= MOST_LAUNCHES
    found = compare({"once": calls, "twice": [lambda: x @ weights[0] @ weights[1]]}, device)
    assert all(timing.median_us > 0 and timing.rounds >= LEAST_ROUNDS for timing in found.values())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("how", ["torch", "library"])
def test_what_cannot_be_captured_is_called(how: str) -> None:
    """And leaves torch as it was: random numbers and later captures work."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(64, 64, device=device)

    def waiting() -> torch.Tensor:
        if how == "torch":
            return x * float(x.sum())
        torch.cuda.synchronize()
        return x * 2

    made = chain([waiting], device, 3)
    assert not made.captured and made.launches == 3
    assert compare({"waiting": [waiting], "x": [lambda: x @ x]}, device)["waiting"].median_us > 0
    assert bool(torch.randn(8, device=device).isfinite().all())
    assert chain([lambda: x @ x], device, 3).captured
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


@pytest.mark.gpu
@gpu
def test_copies_on_a_gpu_are_more_than_its_cache() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert copies_on(device, 2**20, 2**20, 2) * 2**20 > 3 * cache
    with pytest.raises(MemoryError, match="need room"):
        copies_on(device, 2**20, 2**50, 2)
