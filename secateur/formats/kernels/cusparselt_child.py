"""A search over cuSPARSELt's algorithms in a child process: both ends of it.

The child makes a random 2:4 weight and random inputs of its own, since a search depends on shapes
and dtypes alone, and has a CUDA context of its own on the same GPU. A setting that ends it is out
of the search, and the next child goes on with the rest. Children serve one search after another and
end when they are idle, with this process, or with `one_child`.
"""

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.formats.kernels.cusparselt import SearchCase, Setting, compress
from secateur.formats.kernels.cusparselt_search import Past, SearchResult, Watch, first_line, search
from secateur.formats.kernels.isolated import (
    Child,
    ChildEnded,
    Journal,
    Lost,
    NoChild,
    Row,
    Say,
    serve,
)

MODULE = "secateur.formats.kernels.cusparselt_child"
ATTEMPT_SECONDS = (
    30.0  # without a word about a setting; a call takes milliseconds, or a third of one
)
# After which no other setting is tried once one is right; some 10 are enough where calls are quick.
SEARCH_SECONDS = 60.0
MOST_ENDED = 16  # children that one search may cost
BETWEEN = ";"  # settings that are timed in turns
NO_ROOM = "out of memory"  # what CUDA says, in torch's allocator and outside of it
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # places of a group that can be kept

Crashed = Callable[[Setting, str], None]
Tried = Callable[[str, float], None]


class NoSearch(RuntimeError):
    """No search could be made, for a reason that says nothing about the library's algorithms."""


@dataclass(frozen=True)
class Search:
    """One search: for what, on which GPU, by which version of the library; and its journals."""

    case: SearchCase
    device: torch.device
    version: int | None
    title: str
    journals: Path


# ---- the parent's side ---------------------------------------------------------------------------


def searched(
    wanted: Search, past: Past, crashed: Crashed, tried: Tried = lambda settings, seconds: None
) -> SearchResult:
    """The result of `cusparselt_search.search` in a child; nothing is tried in this process.

    `past` is what is known already, and is added to. `crashed` is called with each setting that
    ended a child or took longer than `ATTEMPT_SECONDS`, and how; `tried` with each attempt that
    ended well, the settings of one that times several in turns with `;` in between, and its
    seconds.

    Cost: some seconds for the first child, which imports torch and makes a CUDA context, with some
        500 MB of the GPU's memory while it lives. After `SEARCH_SECONDS` no other setting is tried
        if one is right; what remains is to time the fastest again and to check the one chosen.
    Raises: NoSearch if no child can be started, it was ended from outside, or the GPU has no room
        for it beside this process, even after torch's allocator has given back what it holds in
        reserve here; RuntimeError if no setting is right.
    """
    with _kept.lock:
        late_at = monotonic() + SEARCH_SECONDS
        for _ in range(MOST_ENDED):
            child, fresh = _child(wanted)
            try:
                return _asked(child, wanted, past, late_at, tried)
            except ChildEnded as end:
                settings = [Setting.parse(text) for text in end.trying.split(BETWEEN) if text]
                if len(settings) > 1 and end.blamed:
                    past.together = False
                elif settings and end.blamed:
                    past.us.pop(settings[0], None)
                    past.dropped[settings[0]] = f"ended the process that tried it: {end.how}"
                    crashed(settings[0], end.how)
                elif fresh or settings:  # else it ended while it was idle
                    raise NoSearch(f"the process that searched was ended: {end.how}") from None
    raise NoSearch(f"{MOST_ENDED} processes ended while they searched: the rest is tried later")


@contextmanager
def one_child() -> Iterator[None]:
    """Searches within it share a child, which ends with it.

    `cusparselt_settings` then has no default for a search that cannot be made: it raises.
    """
    _kept.depth += 1
    try:
        yield
    finally:
        _kept.depth -= 1
        if not _kept.depth:
            end_child()


def in_one_child() -> bool:
    """Whether this is within `one_child`."""
    return _kept.depth > 0


def one_thread() -> AbstractContextManager[bool]:
    """The lock that a thread holds while it asks a child; it may hold it already."""
    return _kept.lock


def end_child() -> None:
    """End this process's child; the next search may try to start one again."""
    with _kept.lock:
        if _kept.child is not None:
            _kept.child.end()
        _kept.child = None
        _kept.impossible.clear()


@dataclass
class _Kept:
    """The child that is kept for the next search, and where none can be started, why."""

    child: Child | None = None
    key: tuple[str, str] = ("", "")
    impossible: dict[tuple[str, str], str] = field(default_factory=dict)
    depth: int = 0
    lock: AbstractContextManager[bool] = field(default_factory=threading.RLock)

    def forked(self) -> None:
        """Forget the child in a forked process, and take a lock of its own."""
        self.child, self.depth, self.lock = None, 0, threading.RLock()


_kept = _Kept()
atexit.register(end_child)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.forked)


def _child(wanted: Search) -> tuple[Child, bool]:
    """The child on this GPU, and whether it was started just now. Raises: NoSearch."""
    uuid, environment = _gpu(wanted.device)
    key = (MODULE, uuid)
    if _kept.child is not None and _kept.child.alive and _kept.key == key:
        return _kept.child, False
    if _kept.child is not None:
        _kept.child.end()
        _kept.child = None
    if key in _kept.impossible:
        raise NoSearch(_kept.impossible[key])
    for _ in range(2):
        try:
            _kept.child, _kept.key = _started(wanted, uuid, environment), key
            return _kept.child, True
        except NoChild as problem:
            reason = f"cuSPARSELt's algorithms are searched in a process of its own, but {problem}"
            if NO_ROOM not in str(problem):
                _kept.impossible[key] = reason
                break
            torch.cuda.empty_cache()
    raise NoSearch(reason)


def _started(wanted: Search, uuid: str, environment: Mapping[str, str]) -> Child:
    child = Child(MODULE, [uuid], environment)
    if child.ready != {"version": wanted.version}:
        child.end()
        raise NoChild(
            f"it found version {child.ready.get('version')} of cuSPARSELt, not {wanted.version}"
        )
    return child


def _gpu(device: torch.device) -> tuple[str, Mapping[str, str]]:
    """The UUID of the device, and the environment in which a child sees that one alone."""
    if device.type != "cuda":
        return "", {}
    properties = torch.cuda.get_device_properties(device)
    uuid = str(properties.uuid)
    if "MIG" in properties.name:  # a part of a GPU: the child looks for it among what it inherits
        return uuid, {}
    return uuid, {"CUDA_VISIBLE_DEVICES": f"GPU-{uuid}"}


def _asked(child: Child, wanted: Search, past: Past, late_at: float, tried: Tried) -> SearchResult:
    """The child's result; without room it is asked again once this process holds none in reserve.

    Raises: ChildEnded, NoSearch, and RuntimeError if nothing is right.
    """
    if wanted.device.type == "cuda":  # what still runs here would be in the child's times
        torch.cuda.synchronize(wanted.device)
    for _ in range(2):
        request = {
            "case": wanted.case.written(),
            "us": {str(setting): us for setting, us in past.us.items()},
            "dropped": {str(setting): why for setting, why in past.dropped.items()},
            "refused": [str(setting) for setting in past.refused],
            "together": past.together,
            "left": late_at - monotonic(),
        }
        last: Row = {}
        for row in child.ask(request, wanted.title, wanted.journals, ATTEMPT_SECONDS):
            if "setting" in row:
                _note(row, past)
            elif "tried" in row:
                tried(row["tried"], row["seconds"])
            elif "alive" not in row:
                last = row
        if "found" in last:
            setting, us = Setting.parse(last["found"]), float(last["us"])
            return SearchResult(setting, us, past.dropped, last["whole"])
        if "none" in last:
            raise RuntimeError(last["none"])
        if wanted.device.type == "cuda":
            torch.cuda.empty_cache()
    raise NoSearch(last["no_room"])


def _note(row: Row, past: Past) -> None:
    """Add to `past` what the child said of a setting."""
    setting = Setting.parse(row["setting"])
    if "us" in row:
        past.us[setting] = float(row["us"])
        return
    past.us.pop(setting, None)
    past.dropped[setting] = row["dropped"]
    if row["refused"]:
        past.refused.add(setting)


# ---- the child's side ----------------------------------------------------------------------------


def main(uuid: str) -> None:
    """Answer the parent's searches on the GPU of this UUID, or on the CPU without one."""
    devices = list[torch.device]()

    def prepare() -> Row:
        devices.append(_device(uuid))
        torch.zeros(1, device=devices[0], dtype=torch.float32)
        return {"version": torch.backends.cusparselt.version()}

    def answer(request: Row, say: Say, journal: Journal) -> None:
        _answer(devices[0], request, say, journal)
        if devices[0].type == "cuda":
            torch.cuda.empty_cache()

    serve(prepare, answer)


def _device(uuid: str) -> torch.device:
    if not uuid:
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            torch.cuda.set_device(index)
            return torch.device("cuda", index)
    raise RuntimeError(f"it does not see the GPU {uuid}")


def _answer(device: torch.device, request: Row, say: Say, journal: Journal) -> None:
    case = SearchCase.read(request["case"])
    end: float = monotonic() + request["left"]
    past = Past(
        {Setting.parse(text): us for text, us in request["us"].items()},
        {Setting.parse(text): reason for text, reason in request["dropped"].items()},
        {Setting.parse(text) for text in request["refused"]},
        request["together"],
    )

    def tell(setting: Setting) -> None:
        row: Row = {"setting": str(setting)}
        if setting in past.dropped:
            refused = setting in past.refused
            say({**row, "dropped": past.dropped[setting], "refused": refused})
        else:
            say({**row, "us": past.us[setting]})

    def alive() -> None:
        journal.alive()
        say({"alive": True})

    def late() -> bool:
        return monotonic() > end

    watch = Watch(partial(_trying, journal, say), tell, alive, late)
    try:
        weight = random_weight(case, device)
        wide = torch.float64 if case.out_dtype == torch.int32 else torch.float32
        exact = partial(_exact, weight=weight, wide=wide)
        found = search(case, compress(weight), exact, past, watch)
        say({"found": str(found.setting), "us": found.us, "whole": found.whole})
    except RuntimeError as problem:
        if isinstance(problem, torch.OutOfMemoryError) or _is_no_room(problem):
            say({"no_room": f"a search for {case.product} needs room on the GPU: {_free(device)}"})
        elif isinstance(problem, torch.AcceleratorError):
            raise Lost(first_line(problem)) from problem
        else:
            say({"none": str(problem)})


@contextmanager
def _trying(journal: Journal, say: Say, settings: Sequence[Setting]) -> Iterator[None]:
    attempt, began = BETWEEN.join(map(str, settings)), monotonic()
    with journal.trying(attempt):
        try:
            yield
        except torch.AcceleratorError as error:
            if _is_no_room(error):
                raise torch.OutOfMemoryError(first_line(error)) from error
            raise Lost(first_line(error)) from error
    say({"tried": attempt, "seconds": round(monotonic() - began, 3)})


def _is_no_room(problem: BaseException) -> bool:
    """Whether it is the GPU's out of memory, of the library's own, not of torch's allocator."""
    return isinstance(problem, torch.AcceleratorError) and NO_ROOM in str(problem)


def random_weight(case: SearchCase, device: torch.device) -> Shaped[Tensor, "out in"]:
    """A 2:4 weight of the case, from a fixed seed: two of every four are kept, none of them 0."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.out_features, case.in_features)
    kept = torch.zeros(len(PAIRS), 4, dtype=torch.bool, device=device)
    for row, pair in enumerate(PAIRS):
        kept[row, list(pair)] = True
    draw = partial(torch.randint, device=device, generator=generator)
    places = kept[draw(len(PAIRS), (shape[0], shape[1] // 4))].flatten(1)
    if case.dtype == torch.int8:
        signs = 2 * draw(2, shape, dtype=torch.int8) - 1
        values = draw(1, 128, shape, dtype=torch.int8) * signs
    else:
        values = (
            torch.randn(shape, device=device, generator=generator, dtype=torch.float32)
            / shape[1] ** 0.5
        )
    return values.to(case.dtype) * places


def _exact(x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    result: Tensor = x.to(wide) @ weight.to(wide).t()
    return result


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return "none is left"
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free beside what this process holds"
