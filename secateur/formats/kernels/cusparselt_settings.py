"""Products by the setting of cuSPARSELt that a search found, which is remembered on disk.

`cusparselt.json` has what was found, `cusparselt-crashed.json` what ended the process that tried
it, both beside the compiled kernels, for one chip and one version of the library. What crashed in
one product is never tried again in any of the same dtypes.
"""

import json
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.formats.kernels.cubins import warn_unkept
from secateur.formats.kernels.cusparselt import (
    LARGEST_BUCKET,
    SearchCase,
    Setting,
    case_of,
    multiply,
)
from secateur.formats.kernels.cusparselt_child import (
    BETWEEN,
    SEARCH_SECONDS,
    NoSearch,
    Search,
    in_one_child,
    one_thread,
    searched,
)
from secateur.formats.kernels.cusparselt_search import Past, SearchResult
from secateur.formats.kernels.isolated import left_over
from secateur.formats.kernels.measured import Entries, add, chip, own_file, read

FILE, CRASHED_FILE, JOURNALS = "cusparselt.json", "cusparselt-crashed.json", "cusparselt-trying"
DEFAULT = Setting(0)  # what torch's own 2:4 tensors always call
LEFT_OVER = "the process and its parent ended, or the machine did"

Place = tuple[str, str, str]


def _crash_setting(text: str) -> Setting:
    return Setting.parse(text.partition(":")[0])


ENTRIES = Entries("cuSPARSELt settings", Setting.parse, "delete it, it is measured again")
CRASHED_ENTRIES = Entries(
    "cuSPARSELt settings that crashed",
    _crash_setting,
    "delete it, what crashes is found again, in a process of its own",
)


def product(
    blob: Shaped[Tensor, "..."],
    x: Shaped[Tensor, "tokens in"],
    out_features: int,
    bias: Float[Tensor, " out"] | None = None,
    alpha: Float[Tensor, " out"] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Shaped[Tensor, "tokens out"]:
    """`cusparselt.multiply` by the setting for this case, which is searched if none is known.

    More tokens than the largest bucket are multiplied in equal parts: a setting was shown to be
    right at the numbers of tokens of its bucket, and at no others.

    Cost: see `setting_for`.
    Raises: what `setting_for` raises.
    """
    parts = -(-len(x) // LARGEST_BUCKET)
    if parts > 1:
        some = x.tensor_split(parts)
        return torch.cat([product(blob, x, out_features, bias, alpha, out_dtype) for x in some])
    setting = setting_for(case_of(x, out_features, bias, alpha, out_dtype), x.device)
    return multiply(blob, x, out_features, setting, bias, alpha, out_dtype)


def setting_for(case: SearchCase, device: torch.device) -> Setting:
    """The remembered setting, or what a search in a child process finds and remembers.

    Where no search can be made it is torch's own algorithm, until this process ends, and a warning
    says why; within `one_child`, where the layer can be left alone, that is an error.

    Cost: microseconds where it is remembered; else see `cusparselt_child.searched`. A search that
        the time ended is remembered like any other, and a warning says so.
    Raises: RuntimeError if none is remembered and the stream is being captured into a CUDA graph,
        or no setting is right; NoSearch within `one_child`, or if torch's own algorithm crashed;
        ValueError if a file of settings is broken.
    """
    found = chosen(case, device)
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"no cuSPARSELt algorithm is chosen yet for {case.product} at up to {case.tokens} "
            "tokens, and searching inside a CUDA graph capture is not possible: call warmup(model, "
            "tokens=...) with the number to be captured, or run the model once, before the capture"
        )
    place = _place(case, device)
    try:
        if place in _unsearched() and not in_one_child():
            raise NoSearch(_unsearched()[place])
        with one_thread():
            found = chosen(case, device)  # by a thread that was first
            if found is not None:
                return found
            result = search_isolated(case, device)
            remember(case, device, result.setting)
            if not result.whole:
                _warn_cut_short(case)
            return result.setting
    except NoSearch as problem:
        _unsearched()[place] = str(problem)
        if in_one_child() or DEFAULT in crashed(case, device):
            raise
        _warn_unsearched(str(problem))
        return DEFAULT


def search_isolated(case: SearchCase, device: torch.device) -> SearchResult:
    """The result of a search in a child process, of which only crashes are remembered.

    Raises: what `cusparselt_child.searched` raises; ValueError if the file of what crashed is
        broken.
    """
    library, dtypes = _kind(case, device)
    try:
        journals = own_file(JOURNALS)
    except RuntimeError:  # a user without a home
        journals = Path(tempfile.gettempdir()) / JOURNALS
    _see_left_over(journals)
    for kind, settings in _crashed_on_disk().items():  # what other processes found meanwhile
        _crashed().setdefault(kind, {}).update(settings)

    def crash(setting: Setting, how: str) -> None:
        _remember_crash(library, dtypes, setting, how)

    wanted = Search(
        *(case, device, torch.backends.cusparselt.version()),
        *(json.dumps([library, dtypes]), journals),
    )
    return searched(wanted, Past(dropped=dict(crashed(case, device))), crash)


def chosen(case: SearchCase, device: torch.device) -> Setting | None:
    """The remembered setting unless it crashed since, or None. A process reads the files once.

    Raises: ValueError if a file is no table of settings; it names the file.
    """
    found = _known().get(_place(case, device))
    return None if found in _crashed().get(_kind(case, device), ()) else found


def remember(case: SearchCase, device: torch.device, setting: Setting) -> None:
    """Have `chosen` give this setting from now on, in this process and in later ones.

    It holds for this chip and this version of the library. Where nothing can be written a warning
    says so once.
    """
    place = _place(case, device)
    _known()[place] = setting
    _keep(FILE, ENTRIES, place, str(setting))


def crashed(case: SearchCase, device: torch.device) -> dict[Setting, str]:
    """The settings that ended a process in products of these dtypes, and how.

    Raises: ValueError if the file is no table of them; it names the file.
    """
    library, dtypes = _kind(case, device)
    return {
        setting: f"ended the process that tried it: {how}"
        for setting, how in _crashed().get((library, dtypes), {}).items()
    }


def _remember_crash(library: str, dtypes: str, setting: Setting, how: str) -> None:
    _crashed().setdefault((library, dtypes), {})[setting] = how
    _keep(CRASHED_FILE, CRASHED_ENTRIES, (library, dtypes, str(setting)), f"{setting}: {how}")


def _see_left_over(journals: Path) -> None:
    """Remember as crashed what ended a process together with its parent."""
    for title, attempt in left_over(journals):
        settings = attempt.split(BETWEEN)
        try:
            library, dtypes = json.loads(title)
            setting = Setting.parse(settings[0])
        except ValueError:  # of another version of this library
            continue
        if len(settings) == 1:  # of several nobody knows which
            _remember_crash(str(library), str(dtypes), setting, LEFT_OVER)


def _keep(file: str, entries: Entries, place: Place, text: str) -> None:
    try:
        add(own_file(file), entries, place, text)
    except OSError as error:
        warn_unkept("cuSPARSELt settings", error.strerror or str(error), "searches them")
    except RuntimeError as error:  # a user without a home
        warn_unkept("cuSPARSELt settings", str(error), "searches them")


@cache
def _known() -> dict[Place, Setting]:
    """All that is remembered here: what the file had, and what was added since."""
    return {
        (library, product, tokens): Setting.parse(text)
        for library, products in _table(FILE, ENTRIES).items()
        for product, buckets in products.items()
        for tokens, text in buckets.items()
    }


@cache
def _crashed() -> dict[tuple[str, str], dict[Setting, str]]:
    """All that crashed: what the file had, and what was added since."""
    return _crashed_on_disk()


def _crashed_on_disk() -> dict[tuple[str, str], dict[Setting, str]]:
    return {
        (library, dtypes): {
            _crash_setting(text): text.partition(": ")[2] for text in settings.values()
        }
        for library, kinds in _table(CRASHED_FILE, CRASHED_ENTRIES).items()
        for dtypes, settings in kinds.items()
    }


def _table(file: str, entries: Entries) -> dict[str, dict[str, dict[str, str]]]:
    try:
        return read(own_file(file), entries)
    except RuntimeError:  # a user without a home
        return {}


@cache
def _unsearched() -> dict[Place, str]:
    """The cases for which no search could be made in this process, and why."""
    return {}


@lru_cache(maxsize=4096)  # a model has some dozens
def _place(case: SearchCase, device: torch.device) -> Place:
    return _kind(case, device)[0], case.product, str(case.tokens)


@lru_cache(maxsize=4096)
def _kind(case: SearchCase, device: torch.device) -> tuple[str, str]:
    return f"{chip(device)}, cuSPARSELt {torch.backends.cusparselt.version()}", case.dtypes


def _warn_cut_short(case: SearchCase) -> None:
    warnings.warn(
        f"a search for {case.product} at up to {case.tokens} tokens took {SEARCH_SECONDS:g} s and "
        "was ended, the fastest of the cuSPARSELt algorithms that it had tried is remembered: "
        f"delete {FILE} in secateur's cache to search again where the machine is idle",
        RuntimeWarning,
        stacklevel=3,
    )


@cache
def _warn_unsearched(reason: str) -> None:
    warnings.warn(
        f"cuSPARSELt runs torch's own algorithm {DEFAULT.algorithm}, which may not be the fastest: "
        f"{reason}: call accelerate_ or warmup on this machine where that is possible, what it "
        "finds is remembered",
        RuntimeWarning,
        stacklevel=3,
    )
