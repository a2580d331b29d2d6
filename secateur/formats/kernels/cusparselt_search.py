"""The fastest right algorithm of cuSPARSELt for a product: searched and checked.

Which is fastest depends on shape, tokens, device and version. Some give wrong results, a few of
them only now and then, and some have ended the process: an illegal instruction takes the CUDA
context with it. So a search runs in a child process (`cusparselt_child`), each algorithm is
compared with an exact result before it is timed, and the fastest once more, with several inputs and
at every number of tokens that it will serve.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.formats.kernels.cusparselt import SearchCase, Setting, multiply
from secateur.formats.kernels.timing import chain, copies_on, in_turns

MOST_ALGORITHMS = 128  # more than any version has
MOST_REFUSALS = 4  # refused numbers in a row that end the search
SPLIT_BEST = 2  # algorithms that are tried with their sums split, too
SPLITS = tuple((count, mode) for count in (2, 4, 8) for mode in (1, 2))  # one kernel, or two
MOST_COPIES = 8  # of the weight, in rotation: a model's layers find theirs in no cache
FIRST_COPIES = 2  # that all are timed with; each costs two calls, of 0.2 s on some hosts
ROUNDS = 5
FINALISTS, FINAL_ROUNDS = 4, 15  # with all copies
CHECKS = 5  # inputs more that the fastest has to be right for, each of them REPEATS times
REPEATS = 2
REASONS = 3  # in a message; there can be as many as settings
ROWS_AT_ONCE = 1024  # compared, so that a difference needs little memory
NO_MEMORY = "ran out of memory"


@dataclass(frozen=True)
class SearchResult:
    """The fastest right setting, its microseconds, and why each that was dropped was dropped.

    `whole` is whether all settings were tried, or the time was up.
    """

    setting: Setting
    us: float
    dropped: dict[Setting, str]
    whole: bool = True


@dataclass
class Past:
    """What a search knows, from one before that was broken off or by itself; it writes here.

    What was `refused` was dropped, too. `together` is whether the fastest may be timed in turns.
    """

    us: dict[Setting, float] = field(default_factory=dict)
    dropped: dict[Setting, str] = field(default_factory=dict)
    refused: set[Setting] = field(default_factory=set)
    together: bool = True


@dataclass(frozen=True)
class Watch:
    """The calls before settings are tried, while they are, and when one has ended.

    `late` is whether the time for a search is up.
    """

    trying: Callable[[Sequence[Setting]], AbstractContextManager[None]] = lambda _: nullcontext()
    tell: Callable[[Setting], None] = lambda _: None
    alive: Callable[[], None] = lambda: None
    late: Callable[[], bool] = lambda: False


@torch.no_grad()
def search(
    case: SearchCase,
    blob: Shaped[Tensor, "..."],
    exact: Callable[[Tensor], Tensor],
    past: Past | None = None,
    watch: Watch | None = None,
) -> SearchResult:
    """The fastest setting whose results are right. Call it where a crash does no harm.

    `exact(x)` is `x @ W.T` for the weight of the blob, in float32, or in float64 for int32 results.
    Inputs, bias and alpha are random ones from fixed seeds; nothing of the user's is called.

    A result is right if, for every output feature, the largest error over the tokens is at most
    `allowed(case)` times the largest result. All algorithms are compared at the most and at the
    fewest tokens of the bucket, into memory that held NaN, then timed on the GPU with cold weights;
    the fastest two are tried with split sums, and the fastest few timed again, in turns: the GPU's
    clocks change while a search runs. The fastest of all has to be right for `CHECKS` more inputs,
    each twice, and at every number of tokens of the bucket, or the next one is taken: some are
    wrong only now and then. Once one is right and `watch.late`, no other is tried.

    Cost: seven calls of the library for each of some dozens of settings, 17 more for each of
        `FINALISTS`, and `exact` seven times or more. Memory for one and a half exact results, two
        results, and up to 8 copies of the blob.
    Raises: RuntimeError if no setting is right, or the GPU has failed; OutOfMemoryError if there is
        no room, or none is right but some had no room.
    """
    with torch.autocast(blob.device.type, enabled=False):  # it would round the exact results
        return _search(case, blob, exact, past or Past(), watch or Watch())


def allowed(case: SearchCase) -> float:
    """The relative error that a right result may have: an eps of its dtype; 0 for int32.

    Rounding once costs half of that at most. The other half is for the float32 sum, which needs
    next to nothing of it, and for parts of a split sum that are rounded.
    """
    return torch.finfo(case.out_dtype).eps if case.out_dtype.is_floating_point else 0.0


def _search(
    case: SearchCase, blob: Tensor, exact: Callable[[Tensor], Tensor], past: Past, watch: Watch
) -> SearchResult:
    trying = _Trying(case, _copies(blob), _screen(case, blob.device, exact), past, watch)
    whole = trying.all_whole() and trying.best_split()
    trying.settle()
    trying.trials.clear()  # they are large
    for setting in trying.fastest():
        with watch.trying([setting]):
            problem = _wrong_later(case, blob, setting, exact, watch.alive)
        if problem is None:
            return SearchResult(setting, past.us[setting], past.dropped, whole)
        trying.drop(setting, problem)
    reasons = "; ".join(list(dict.fromkeys(past.dropped.values()))[:REASONS])
    if any(NO_MEMORY in reason for reason in past.dropped.values()):
        raise torch.OutOfMemoryError(f"no algorithm for {case.product} had room: {reasons}")
    raise RuntimeError(
        f"cuSPARSELt needs a right algorithm for {case.product} at {case.tokens} tokens, got none "
        f"of {len(past.dropped)}: let the layer use another implementation ({reasons})"
    )


@dataclass(frozen=True)
class _Trial:
    """Random arguments of `multiply`, and what they have to give."""

    x: Tensor
    bias: Tensor | None
    alpha: Tensor | None
    wanted: Tensor


@dataclass(frozen=True)
class _Trying:
    """A search: what it measures with, and what it knows."""

    case: SearchCase
    blobs: Sequence[Tensor]
    trials: list[_Trial]
    past: Past
    watch: Watch

    def all_whole(self) -> bool:
        """Try all algorithms, their sums not split; False if the time was up before that."""
        refused = 0
        for algorithm in range(MOST_ALGORITHMS):
            if self.enough():
                return False
            refused = 0 if self.takes(Setting(algorithm)) else refused + 1
            if refused == MOST_REFUSALS:
                break
        return True

    def best_split(self) -> bool:
        """Try the fastest with their sums split; False if the time was up before that."""
        for setting in self.fastest()[:SPLIT_BEST]:
            for split in SPLITS:
                if self.enough():
                    return False
                self.takes(Setting(setting.algorithm, *split))
        return True

    def enough(self) -> bool:
        return bool(self.past.us) and self.watch.late()

    def takes(self, setting: Setting) -> bool:
        """Whether the library takes the setting, which is timed if it is right."""
        if setting in self.past.dropped or setting in self.past.us:
            return setting not in self.past.refused
        with self.watch.trying([setting]):
            try:
                for trial in self.trials:
                    problem = _wrong(self.case, self.blobs[0], setting, trial)
                    if problem is not None:
                        self.drop(setting, problem)
                        return True
                some = self.blobs[:FIRST_COPIES]
                self.past.us[setting] = self.timed([setting], some, ROUNDS)[setting]
            except torch.AcceleratorError:  # the GPU's own: nothing runs on it any more
                raise
            except torch.OutOfMemoryError as problem:  # sums in parts need room of their own
                self.drop(setting, f"{NO_MEMORY}: {first_line(problem)}")
                return True
            except RuntimeError as refusal:
                if self.blobs[0].is_cuda:  # raises if it was not refused, but failed the GPU
                    torch.cuda.synchronize(self.blobs[0].device)
                self.past.refused.add(setting)
                self.drop(setting, first_line(refusal))
                return False
        self.watch.tell(setting)
        return True

    def drop(self, setting: Setting, reason: str) -> None:
        """Take the setting out of the search."""
        self.past.us.pop(setting, None)
        self.past.dropped[setting] = reason
        self.watch.tell(setting)

    def timed(
        self, settings: Sequence[Setting], blobs: Sequence[Tensor], rounds: int
    ) -> dict[Setting, float]:
        """Microseconds of a launch of each, in chains that use every copy once and take turns."""
        chains = [[partial(self.run, setting, blob) for blob in blobs] for setting in settings]
        return dict(zip(settings, _us(chains, self.blobs[0].device, rounds), strict=True))

    def run(self, setting: Setting, blob: Tensor) -> Tensor:
        self.watch.alive()
        return _run(self.case, blob, setting, self.trials[0])

    def settle(self) -> None:
        """Time the fastest few again, and put all others behind them.

        Where that ended a process, each is timed alone, so that it is known which one does.
        """
        finalists, us = self.fastest()[:FINALISTS], self.past.us
        again = dict[Setting, float]()
        for turns in [finalists] if self.past.together else [[one] for one in finalists]:
            if turns:
                with self.watch.trying(turns):
                    again |= self.timed(turns, self.blobs, FINAL_ROUNDS)
                for setting in turns:
                    self.watch.tell(setting)
        slowest = max(again.values(), default=0.0)
        for setting, before in us.items():
            us[setting] = again.get(setting, max(before, slowest))

    def fastest(self) -> list[Setting]:
        return sorted(self.past.us, key=self.past.us.__getitem__)


def _screen(
    case: SearchCase, device: torch.device, exact: Callable[[Tensor], Tensor]
) -> list[_Trial]:
    fewest = case.counts[0]
    return [_trial(case, case.tokens, 0, device, exact), _trial(case, fewest, 1, device, exact)]


def _trial(
    case: SearchCase,
    tokens: int,
    seed: int,
    device: torch.device,
    exact: Callable[[Tensor], Tensor],
) -> _Trial:
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.rand, device=device, generator=generator)
    if case.dtype == torch.int8:
        x = (random(tokens, case.in_features) * 255 - 127).floor().to(torch.int8)
    else:
        x = torch.randn(
            tokens, case.in_features, device=device, generator=generator, dtype=torch.float32
        ).to(case.dtype)
    wanted, alpha, bias = exact(x), None, None
    size = float(wanted.abs().max()) or 1.0
    if case.alpha:  # so that sums of codes fit into float16
        alpha = (0.5 + random(case.out_features)) / size
        wanted, size = wanted * alpha, 1.0
    if case.bias is not None:
        bias = ((random(case.out_features) - 0.5) * size).to(case.bias)
        wanted = wanted + bias
    return _Trial(x, bias, alpha, wanted)


def _run(case: SearchCase, blob: Tensor, setting: Setting, trial: _Trial) -> Tensor:
    return multiply(
        *(blob, trial.x, case.out_features, setting, trial.bias, trial.alpha, case.out_dtype)
    )


def _wrong(case: SearchCase, blob: Tensor, setting: Setting, trial: _Trial) -> str | None:
    """By how much the result is wrong, or None if it is right."""
    poison = torch.empty(trial.wanted.shape, dtype=case.out_dtype, device=blob.device)
    poison.fill_(torch.nan if case.out_dtype.is_floating_point else -(2**31))
    del poison  # the allocator hands the same memory to the call
    error, most = _error(_run(case, blob, setting, trial), trial.wanted), allowed(case)
    if error <= most:  # False for nan
        return None
    return f"wrong by {error:.1e} where {most:.1e} is allowed"


def _error(result: Tensor, wanted: Tensor) -> float:
    """The largest, over output features, of the largest error over the largest result."""
    error = largest = torch.zeros(wanted.shape[1], dtype=wanted.dtype, device=wanted.device)
    for rows, right in zip(result.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True):
        error = error.maximum((rows.to(right.dtype) - right).abs().amax(0))
        largest = largest.maximum(right.abs().amax(0))
    # what is below the normal numbers is rounded to their spacing, not to its own
    floor = torch.finfo(result.dtype).smallest_normal if result.is_floating_point() else 1
    return float((error / (largest + floor)).max())


def _wrong_later(
    case: SearchCase,
    blob: Tensor,
    setting: Setting,
    exact: Callable[[Tensor], Tensor],
    alive: Callable[[], None],
) -> str | None:
    """How the setting is wrong for more inputs, a second time or at a number of tokens, or None."""
    for seed in range(CHECKS):
        trial = _trial(case, case.tokens, 2 + seed, blob.device, exact)
        for _ in range(REPEATS):
            problem = _wrong(case, blob, setting, trial)
            alive()
            if problem is not None:
                return f"{problem}, but not always"
    for count in case.counts[:-1]:
        fewer = replace(trial, x=trial.x[:count], wanted=trial.wanted[:count])
        problem = _wrong(case, blob, setting, fewer)
        alive()
        if problem is not None:
            return f"{problem} at {count} tokens"
    return None


def first_line(problem: BaseException) -> str:
    """What went wrong, without the trace that some messages carry."""
    return str(problem).partition("\n")[0]


def _copies(blob: Tensor) -> list[Tensor]:
    """The blob, and copies of it as far as there is room."""
    try:
        count = min(MOST_COPIES, copies_on(blob.device, blob.nbytes, blob.nbytes, 1))
    except MemoryError:
        count = 1
    return [blob, *(blob.clone() for _ in range(count - 1))]


def _us(
    chains: Sequence[Sequence[Callable[[], object]]], device: torch.device, rounds: int
) -> list[float]:
    """Microseconds of a launch of each chain, which makes each of its calls once, in turns."""
    made = {str(number): chain(calls, device, len(calls)) for number, calls in enumerate(chains)}
    return [timing.median_us for timing in in_turns(made, device, rounds).values()]
