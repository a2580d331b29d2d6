"""The one timer: variants in turn, weights cold by rotation, median with spread.

A model's layers take turns, so a weight is cold when its layer runs. One weight timed over and over
would be read from a cache; flushing the cache by writes leaves lines whose write-back competes with
what is timed. So every variant rotates over copies of its weights that no cache holds together.

On a CPU a sample is one call, by the wall clock. On a GPU it is a chain of launches in one CUDA
graph, by events around its replay: device time, as compiled and captured serving has it. A call
with a synchronise behind it would measure the host, which takes longer than a kernel of 3 to 50 us.
What an eager call costs the host is therefore not in the figures. A variant that cannot be captured
is called between the same events, host included.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from random import Random
from statistics import median, quantiles
from time import perf_counter

import torch

from secateur.formats.kernels.gpu import on

ROUNDS = 20
LEAST_ROUNDS = 5  # for calls so slow that `seconds` allows no more; quartiles need a few
WARM_UP_ROUNDS = 2  # the first call allocates, the second meets what it allocated
ROTATION_BYTES = 256 * 2**20  # 8x the last-level cache of a desktop, 5x the L2 cache of an H200
COLD_CACHES = 4  # a GPU's copies fill its L2 cache so often, where that is more
MOST_LAUNCHES = 260  # of a chain, unless it has more copies; more would only take longer
CHAIN_SECONDS = 0.01  # of eager calls; captured, small kernels take a tenth of it

Calls = Sequence[Callable[[], object]]


class VariantFailed(RuntimeError):
    """A variant raised when it was timed; the others can be timed without it."""

    def __init__(self, variant: str, problem: BaseException) -> None:
        super().__init__(f"{variant} failed: {problem}")
        self.variant, self.problem = variant, problem


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


@dataclass(frozen=True)
class Chain:
    """Launches one after another: `replay()` starts all, `result()` is what the last one wrote."""

    replay: Callable[[], object]
    result: Callable[[], object]
    launches: int
    captured: bool = False


def copies_for(bytes_of_one_each: int, rounds: int = ROUNDS) -> int:
    """The copies of every variant's weights to rotate over on a CPU, within `ROTATION_BYTES`.

    More copies than rounds are never used.
    """
    return max(1, min(rounds, ROTATION_BYTES // max(1, bytes_of_one_each)))


def copies_on(device: torch.device, read: int, held: int, variants: int) -> int:
    """The copies of one GPU variant to rotate over; a launch reads `read` of `held` bytes.

    Half of the free memory is for the copies of all variants.

    Raises: MemoryError if there is no room for copies that fill the caches.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    cold = max(ROTATION_BYTES, COLD_CACHES * cache)
    return cold_copies(read, held, cold, free // (2 * variants))


def cold_copies(read: int, held: int, cold: int, memory: int) -> int:
    """The copies of `held` bytes with which launches that read `read` of each read `cold` in all.

    Raises: MemoryError if they do not fit into `memory`.
    """
    wanted = min(MOST_LAUNCHES, max(1, -(-cold // max(1, read))))
    if wanted > 1 and wanted * held > memory:  # a warm cache would favour the smaller weight
        raise MemoryError(
            f"{wanted} copies of {held} bytes, which no cache holds, need room; "
            f"{memory} bytes are free for them"
        )
    return wanted


def compare(
    variants: Mapping[str, Calls],
    device: torch.device,
    rounds: int = ROUNDS,
    seconds: float = 3.0,
) -> dict[str, Timing]:
    """The timing of each variant, whose calls do the same on separate copies of the weights.

    Variants take turns within a round, and each round starts with the next one, so that drift of
    the machine and the cache left by the neighbour fall on all alike. Rounds end early after
    `seconds`. On a GPU it is the time of one launch in a captured chain (see the module).

    Raises: VariantFailed if one raises, with its name.
    """
    if device.type == "cuda":
        chains = {name: _blamed(name, calls, device) for name, calls in variants.items()}
        return in_turns(chains, device, rounds, seconds)
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
            with _blaming(name):
                call()
            if number >= 0:
                samples[name].append(1e6 * (perf_counter() - begin))
    return {name: _timing(times) for name, times in samples.items()}


def chain(calls: Calls, device: torch.device, launches: int | None = None) -> Chain:
    """The calls one after another, in rotation: one CUDA graph where they can be captured.

    Without `launches` there are as many whole rotations as take some milliseconds; one cut short
    would begin again with copies that the cache still holds.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _on_gpu(calls, device, launches)
    return _called(calls, launches or len(calls))


def in_turns(
    chains: Mapping[str, Chain],
    device: torch.device,
    rounds: int = ROUNDS,
    seconds: float = inf,
) -> dict[str, Timing]:
    """The timing of one launch of each chain.

    Chains take turns, in every round in another order, the same orders each time: at its limit of
    power a GPU runs a chain the slower the more the one before has drawn. A GPU is never waited for
    in between, so that it is never idle; with `seconds` it is once, after the warm-up, to know how
    many rounds that allows.

    Raises: VariantFailed if one raises, with its name.
    """
    names = list(chains)
    spans: dict[str, list[tuple[object, object]]] = {name: [] for name in names}
    with on(device):
        started, count, number = perf_counter(), rounds, -WARM_UP_ROUNDS
        while number < count:
            if number == 0 and seconds < inf:
                _wait_for(device)
                one = max(1e-9, (perf_counter() - started) / WARM_UP_ROUNDS)
                count = min(rounds, max(LEAST_ROUNDS, int(seconds / one)))
            for name in Random(number).sample(names, len(names)):
                begin = _mark(device)
                with _blaming(name):
                    chains[name].replay()
                end = _mark(device)
                if number >= 0:
                    spans[name].append((begin, end))
            number += 1
        _wait_for(device)
    return {
        name: _timing([_us(*span) / chains[name].launches for span in spans[name]])
        for name in names
    }


def _blamed(name: str, calls: Calls, device: torch.device) -> Chain:
    with _blaming(name):
        return chain(calls, device)


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as problem:
        raise VariantFailed(name, problem) from problem


def _on_gpu(calls: Calls, device: torch.device, launches: int | None) -> Chain:
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # a capture that fails does not put the stream back itself
        for call in calls:  # compiles, allocates workspaces, loads modules
            call()
        count = launches or _launches(calls, device)
        torch.cuda.synchronize(device)
        if not _waits(calls[0]):
            try:
                return _captured(calls, stream, count)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a library that synchronises or allocates behind torch's back
                _recover(device, stream)
    return _called(calls, count)


def _captured(calls: Calls, stream: torch.cuda.Stream, launches: int) -> Chain:
    graph, last = torch.cuda.CUDAGraph(), list[object]()
    # other threads of the program may call CUDA meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for number in range(launches):
            last[:] = [calls[number % len(calls)]()]
    return Chain(graph.replay, lambda: last[0], launches, captured=True)


def _recover(device: torch.device, stream: torch.cuda.Stream) -> None:
    """End what a broken capture began.

    Torch's random numbers raise outside a capture until a later one has ended.
    """
    torch.cuda.synchronize(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=device, dtype=torch.float32)


def _called(calls: Calls, launches: int) -> Chain:
    last = [calls[0]()]

    def replay() -> None:
        for number in range(launches):
            last[0] = calls[number % len(calls)]()

    return Chain(replay, lambda: last[0], launches)


def _launches(calls: Calls, device: torch.device) -> int:
    """Whole rotations that take at most `CHAIN_SECONDS` called one by one, or a single one."""
    torch.cuda.synchronize(device)
    begin = perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    rotation = max(1e-9, perf_counter() - begin)
    return len(calls) * max(1, min(MOST_LAUNCHES // len(calls), int(CHAIN_SECONDS / rotation)))


def _waits(call: Callable[[], object]) -> bool:
    """Whether the call waits for the GPU, which would break a capture and leave torch in disorder.

    Torch sees its own waits; a library's break the capture and are caught there.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see all waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that captures, so that libraries hold one workspace."""
    return torch.cuda.Stream(device)


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


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
