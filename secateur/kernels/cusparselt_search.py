"""The fastest right algorithm of cuSPARSELt for a product: searched, checked and remembered.

Which is fastest depends on shape, tokens, device and version, and some give wrong results, a few of
them only now and then. So each is compared with an exact result before it is timed, the fastest
once more with several inputs, and what was found is kept on disk beside the compiled kernels.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.kernels.cusparselt import STEPS, Case, Setting, multiply
from secateur.kernels.measured import Entries, add, chip, own_file, read
from secateur.kernels.timing import chain, copies_on, in_turns

FILE = "cusparselt.json"
MOST_ALGORITHMS = 128  # more than any version has
MOST_REFUSALS = 4  # refused numbers in a row that end the search
SPLIT_BEST = 2  # algorithms that are tried with their sums split, too
SPLITS = tuple((count, mode) for count in (2, 4, 8) for mode in (1, 2))  # one kernel, or two
MOST_COPIES = 16  # of the weight, in rotation: a model's layers find theirs in no cache
ROUNDS = 5
FINALISTS, FINAL_ROUNDS = 8, 15
CHECKS = 5  # inputs more that the fastest has to be right for, each of them REPEATS times
REPEATS = 2
REASONS = 3  # in a message; there can be as many as settings
ROWS_AT_ONCE = 1024  # compared, so that a difference needs little memory

Place = tuple[str, str, str]


@dataclass(frozen=True)
class Found:
    """The fastest right setting, its microseconds, and why each that was dropped was dropped."""

    setting: Setting
    us: float
    dropped: dict[Setting, str]


ENTRIES = Entries("cuSPARSELt settings", Setting.parse, "delete it, it is measured again")


def setting_for(
    case: Case, blob: Shaped[Tensor, "..."], exact: Callable[[Tensor], Tensor]
) -> Setting:
    """The remembered setting, else that of a search, which is remembered then.

    Cost: microseconds where it is remembered; else see `search`.
    Raises: RuntimeError if none is remembered and the stream is being captured into a CUDA graph,
        or where `search` raises it; ValueError if the file of settings is broken.
    """
    found = chosen(case, blob.device)
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"no cuSPARSELt algorithm is chosen yet for {case.product} at up to {case.tokens} "
            "tokens, and searching inside a CUDA graph capture is not possible: call warmup(model, "
            "tokens=...) with the number to be captured, or run the model once, before the capture"
        )
    found = search(case, blob, exact).setting
    remember(case, blob.device, found)
    return found


def chosen(case: Case, device: torch.device) -> Setting | None:
    """The remembered setting, or None. The file is read once in a process.

    Raises: ValueError if the file is no table of settings; it names the file.
    """
    return _known().get(_place(case, device))


def remember(case: Case, device: torch.device, setting: Setting) -> None:
    """Nothing; from now on `chosen` gives this setting, in this process and in later ones.

    It holds for this chip and this version of the library. Where nothing can be written a warning
    says so once.
    """
    place = _place(case, device)
    _known()[place] = setting
    try:
        add(own_file(FILE), ENTRIES, place, str(setting))
    except OSError as error:
        _warn(error.strerror or str(error))
    except RuntimeError as error:  # a user without a home
        _warn(str(error))


@torch.no_grad()
def search(case: Case, blob: Shaped[Tensor, "..."], exact: Callable[[Tensor], Tensor]) -> Found:
    """The fastest setting whose results are right.

    `exact(x)` is `x @ W.T` for the weight of the blob, in float32, or in float64 for int32 results.
    Inputs, bias and alpha are random ones from fixed seeds; nothing of the user's is called.

    Right is, for every output feature, a largest error over the tokens of at most `allowed(case)`
    of its largest result. All algorithms are compared at the most and at the fewest tokens of the
    bucket, into memory that held NaN, then timed on the GPU with cold weights; the fastest two are
    tried with split sums, and the fastest few timed again, in turns: the GPU's clocks change while
    a search runs. The fastest of all has to be right for `CHECKS` more inputs, each twice, or the
    next one is taken: some are wrong only now and then.

    Cost: some dozens of launches for each of some dozens of settings, and `exact` seven times or
        more. Memory for one and a half exact results, two results, and up to 16 copies of the blob.
    Raises: RuntimeError if no setting is right, or the GPU has failed.
    """
    with torch.autocast(blob.device.type, enabled=False):  # it would round the exact results
        return _search(case, blob, exact)


def allowed(case: Case) -> float:
    """The relative error that a right result may have: an eps of its dtype; 0 for int32.

    Rounding once costs half of that at most. The other half is for the float32 sum, which needs
    next to nothing of it, and for parts of a split sum that are rounded.
    """
    return torch.finfo(case.out_dtype).eps if case.out_dtype.is_floating_point else 0.0


def _search(case: Case, blob: Tensor, exact: Callable[[Tensor], Tensor]) -> Found:
    trying = _Trying(case, _copies(blob), _screen(case, blob.device, exact), {}, {})
    refused = 0
    for algorithm in range(MOST_ALGORITHMS):
        refused = 0 if trying.takes(Setting(algorithm)) else refused + 1
        if refused == MOST_REFUSALS:
            break
    for setting in trying.fastest()[:SPLIT_BEST]:
        for split in SPLITS:
            trying.takes(Setting(setting.algorithm, *split))
    trying.settle()
    trying.trials.clear()  # they are large
    for setting in trying.fastest():
        problem = _wrong_later(case, blob, setting, exact)
        if problem is None:
            return Found(setting, trying.us[setting], trying.dropped)
        trying.dropped[setting] = problem
    reasons = "; ".join(list(dict.fromkeys(trying.dropped.values()))[:REASONS])
    raise RuntimeError(
        f"cuSPARSELt needs a right algorithm for {case.product} at {case.tokens} tokens, got none "
        f"of {len(trying.dropped)}: let the layer use another implementation ({reasons})"
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
    """A search: what was measured so far, and what was dropped."""

    case: Case
    blobs: Sequence[Tensor]
    trials: list[_Trial]
    us: dict[Setting, float]
    dropped: dict[Setting, str]

    def takes(self, setting: Setting) -> bool:
        """Whether the library takes the setting, which is timed if it is right."""
        try:
            for trial in self.trials:
                problem = _wrong(self.case, self.blobs[0], setting, trial)
                if problem is not None:
                    self.dropped[setting] = problem
                    return True
            self.us[setting] = self.timed([setting], ROUNDS)[setting]
        except torch.AcceleratorError:  # the GPU's own: nothing runs on it any more
            raise
        except RuntimeError as refusal:
            self.dropped[setting] = str(refusal).partition("\n")[0]
            return False
        return True

    def timed(self, settings: Sequence[Setting], rounds: int) -> dict[Setting, float]:
        """Microseconds of a launch of each, in chains that use every copy once and take turns."""
        chains = [
            [partial(_run, self.case, blob, setting, self.trials[0]) for blob in self.blobs]
            for setting in settings
        ]
        return dict(zip(settings, _us(chains, self.blobs[0].device, rounds), strict=True))

    def settle(self) -> None:
        """Nothing; the fastest few are timed again, and all others come behind them."""
        finalists = self.fastest()[:FINALISTS]
        again = self.timed(finalists, FINAL_ROUNDS)
        slowest = max(again.values(), default=0.0)
        for setting, us in self.us.items():
            self.us[setting] = again.get(setting, max(us, slowest))

    def fastest(self) -> list[Setting]:
        return sorted(self.us, key=self.us.__getitem__)


def _screen(case: Case, device: torch.device, exact: Callable[[Tensor], Tensor]) -> list[_Trial]:
    fewest = min(case.tokens, case.tokens // 2 + STEPS[case.dtype])  # once padded
    return [_trial(case, case.tokens, 0, device, exact), _trial(case, fewest, 1, device, exact)]


def _trial(
    case: Case, tokens: int, seed: int, device: torch.device, exact: Callable[[Tensor], Tensor]
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


def _run(case: Case, blob: Tensor, setting: Setting, trial: _Trial) -> Tensor:
    return multiply(
        *(blob, trial.x, case.out_features, setting, trial.bias, trial.alpha, case.out_dtype)
    )


def _wrong(case: Case, blob: Tensor, setting: Setting, trial: _Trial) -> str | None:
    """None if the result is right, else by how much it is wrong."""
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
    case: Case, blob: Tensor, setting: Setting, exact: Callable[[Tensor], Tensor]
) -> str | None:
    """None if the setting is right for more inputs and again, else how it was wrong."""
    for seed in range(CHECKS):
        trial = _trial(case, case.tokens, 2 + seed, blob.device, exact)
        for _ in range(REPEATS):
            problem = _wrong(case, blob, setting, trial)
            if problem is not None:
                return f"{problem}, but not always"
    return None


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


@cache
def _known() -> dict[Place, Setting]:
    """All that is remembered here: what the file had, and what was added since."""
    try:
        table = read(own_file(FILE), ENTRIES)
    except RuntimeError:  # a user without a home
        return {}
    return {
        (library, product, tokens): Setting.parse(text)
        for library, products in table.items()
        for product, buckets in products.items()
        for tokens, text in buckets.items()
    }


@lru_cache(maxsize=4096)  # a model has some dozens
def _place(case: Case, device: torch.device) -> Place:
    library = f"{chip(device)}, cuSPARSELt {torch.backends.cusparselt.version()}"
    return library, case.product, str(case.tokens)


@cache
def _warn(reason: str) -> None:
    """The warning, once in a process for each reason."""
    warnings.warn(
        f"cuSPARSELt settings cannot be kept ({reason}), so every process searches them again: "
        "set SECATEUR_CACHE to a folder that can be written",
        RuntimeWarning,
        stacklevel=3,
    )
