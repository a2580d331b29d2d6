"""Candidates of the GPU benches, timed by the library's chains of launches with cold weights.

The chains and their timing are `secateur.kernels.timing`, which says why. Here a chain rotates over
copies of 1.3 GB together, and lasts about 3 ms.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.kernels import timing
from secateur.kernels.timing import Chain, in_turns

COLD_BYTES = 1_300_000_000  # of all copies together: 20x the L2 cache of an H200
MOST_LAUNCHES = 260  # what fills COLD_BYTES with the smallest layer in int4
CHAIN_BYTES = 13_500_000_000  # a chain reads no more: 3 ms at 4.5 TB/s
ROUNDS = 15

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
    """The launches on x, rotating over the copies: one CUDA graph, or plain calls on a CPU.

    Raises: RuntimeError on a GPU if they cannot be captured: a row is device time.
    """
    made = timing.chain([partial(run, x) for run in runs], x.device, launches)
    if x.is_cuda and not made.captured:
        raise RuntimeError("cannot be captured in a CUDA graph")
    return made


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
    _result(chain).fill_(torch.nan)
    chain.replay()
    return error(_result(chain), exact)


def _result(chain: Chain) -> Tensor:
    result = chain.result()
    assert isinstance(result, Tensor)
    return result


__all__ = [
    "Candidate",
    "Chain",
    "chain",
    "copies_for",
    "error",
    "error_of_last",
    "error_of_one",
    "in_turns",
    "launches_for",
    "product",
]
