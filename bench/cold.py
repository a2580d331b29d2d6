"""Chains of launches, each on another copy of a weight, so that no cache holds what is read.

A model's layers take turns, so a weight is cold when its layer runs. One weight timed over and over
would be read from the L2 cache; flushing the cache by writes leaves lines whose write-back competes
with what is timed. So a chain rotates over copies of 1.3 GB together, in one CUDA graph, and the
time of one launch is that of the graph over its launches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

from secateur.kernels.timing import Timing

COLD_BYTES = 1_300_000_000  # of all copies together: 20x the L2 cache of an H200
MOST_LAUNCHES = 260  # what fills COLD_BYTES with the smallest layer in int4
CHAIN_BYTES = 13_500_000_000  # a chain reads no more: 3 ms at 4.5 TB/s
ROUNDS = 15
WARM_UP_ROUNDS = 2

Run = Callable[..., Tensor]
Tuned = tuple[Sequence[Run], str]


def as_made(runs: Sequence[Run], x: Tensor, exact: Tensor) -> Tuned:
    """The copies as they are, and nothing to say about them: `tune` of most candidates."""
    return runs, ""


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    `make()` is a copy with weights of its own, `exact` the float64 product of `x` with the very
    weight that they stand for. `tune(runs, x, exact)` prepares the copies for one input and says
    how. Tokens are padded to a multiple of `rows`; above `most` tokens it cannot run. Launches are
    captured inside `around()`. Candidates with the same `make` share copies.
    """

    name: str
    nbytes: int
    make: Callable[[], Run]
    x: Tensor
    exact: Tensor
    baseline: str
    tune: Callable[[Sequence[Run], Tensor, Tensor], Tuned] = as_made
    rows: int = 1
    most: int | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Chain:
    """Launches one after another: `replay()` starts all, `result()` is what the last one wrote."""

    replay: Callable[[], object]
    result: Callable[[], Tensor]
    launches: int


def copies_for(nbytes: int, memory: int) -> int:
    """How many copies of a weight of these bytes to rotate over, within `memory` bytes."""
    return max(1, min(-(-COLD_BYTES // nbytes), MOST_LAUNCHES, memory // nbytes))


def launches_for(nbytes: int, copies: int) -> int:
    """How many launches a chain has: about 3 ms of them, in whole rotations.

    A rotation cut short would begin again with copies that the cache still holds.
    """
    wanted = min(MOST_LAUNCHES, CHAIN_BYTES // nbytes)
    return copies * max(1, wanted // copies)


def chain(runs: Sequence[Run], x: Tensor, launches: int) -> Chain:
    """The launches on x, rotating over the copies: one CUDA graph, or plain calls on a CPU."""
    return _captured(runs, x, launches) if x.is_cuda else _called(runs, x, launches)


def in_turns(
    chains: Mapping[str, Chain], device: torch.device, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """The timing of one launch of each chain.

    Chains take turns within a round, and each round starts with the next one, so that drift of the
    clocks falls on all alike. A GPU is never waited for in between, so that it is never idle.
    """
    names = list(chains)
    spans: dict[str, list[tuple[object, object]]] = {name: [] for name in names}
    for number in range(-WARM_UP_ROUNDS, rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            begin = _mark(device)
            chains[name].replay()
            end = _mark(device)
            if number >= 0:
                spans[name].append((begin, end))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        name: _timing([_us(*span) / chains[name].launches for span in spans[name]])
        for name in names
    }


def product(x: Tensor, weight: Tensor, rows: int = 4096) -> Tensor:
    """The product of x and the transposed weight in float64, some rows of the weight at a time."""
    wide = x.double()
    return torch.cat([wide @ part.double().t() for part in weight.split(rows)], dim=1)


def error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; nan where the result has one."""
    return float((result.double() - exact).norm() / exact.norm())


def error_of_one(run: Run, x: Tensor, exact: Tensor) -> float:
    """The error of a single call, into memory that held nan."""
    poison = torch.full(exact.shape, torch.nan, dtype=x.dtype, device=x.device)
    del poison  # the allocator hands the same memory to the call
    return error(run(x), exact)


def error_of_last(chain: Chain, exact: Tensor) -> float:
    """The error of the last launch of one replay, into memory that held nan."""
    chain.result().fill_(torch.nan)
    chain.replay()
    return error(chain.result(), exact)


def _captured(runs: Sequence[Run], x: Tensor, launches: int) -> Chain:
    stream, graph = _stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates workspaces, loads modules
        for run in runs:
            run(x)
    torch.cuda.synchronize(x.device)
    with torch.cuda.graph(graph, stream=stream):
        for number in range(launches):
            result = runs[number % len(runs)](x)
    return Chain(graph.replay, lambda: result, launches)


def _called(runs: Sequence[Run], x: Tensor, launches: int) -> Chain:
    last = [runs[0](x)]

    def replay() -> None:
        for number in range(launches):
            last[0] = runs[number % len(runs)](x)

    return Chain(replay, lambda: last[0], launches)


@cache
def _stream() -> torch.cuda.Stream:
    """The one stream that captures, so that libraries hold one workspace."""
    return torch.cuda.Stream()


def _mark(device: torch.device) -> object:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _us(begin: object, end: object) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return 1e6 * (end - begin)
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return 1e3 * float(begin.elapsed_time(end))


def _timing(times_us: list[float]) -> Timing:
    low, _, high = quantiles(times_us, n=4, method="inclusive")
    return Timing(median_us=median(times_us), low_us=low, high_us=high, rounds=len(times_us))
