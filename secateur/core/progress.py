"""How far a loop is: a bar in terminals and notebooks, a line now and then in a log."""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from secateur.core.tables import printable

EVERY = 30.0  # seconds between two lines of a log: a night of it is still read in a minute

T = TypeVar("T")


@runtime_checkable
class Bar(Protocol):
    """What shows how far a loop is, within `with`."""

    def update(self, n: int = 1) -> object:
        """Go on by this many steps."""

    def set_postfix_str(self, s: str) -> object:
        """What is told behind the figures from now on."""

    def __enter__(self) -> Any: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


def bar(
    what: str, total: int | None, *, unit: str = "it", done: int = 0, within: bool = False
) -> Bar:
    """A bar of `total` steps, to be entered; `within` another one it leaves nothing behind.

    On stderr; as a widget in notebooks that have ipywidgets. Where stderr is no terminal, nothing
    is shown for the first 30 s and a line every 30 s after that. TQDM_DISABLE=1 turns all off.
    """
    shows = sys.stderr is not None and (sys.stderr.isatty() or _is_notebook())
    if os.environ.get("TQDM_DISABLE") or not shows:
        return _Lines(printable(what), total, unit, done)
    with warnings.catch_warnings():  # without ipywidgets a bar is of text, which is no news
        warnings.simplefilter("ignore")
        # looks at what it is imported in, so not before it is asked
        from tqdm.auto import tqdm as auto

    shown: Bar = auto(desc=printable(what), total=total, unit=unit, initial=done, leave=not within)
    return shown


def progress(
    over: Iterable[T],
    what: str,
    *,
    total: int | None = None,
    unit: str = "it",
    within: bool = False,
) -> Iterator[T]:
    """The items, and a `bar` that goes on with each; `total` is asked of `over` where it knows."""
    if total is None and isinstance(over, Sized):
        total = len(over)
    with bar(what, total, unit=unit, within=within) as shown:
        for item in over:
            yield item
            shown.update()


def say(line: str) -> None:
    """Write a line to stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)


def _is_notebook() -> bool:
    """Whether stderr is that of a notebook's kernel, which is no terminal but shows bars."""
    return type(sys.stderr).__module__.startswith("ipykernel")


class _Lines:
    """A bar for a log: a line whenever 30 s have passed since the last, and one for the end."""

    def __init__(self, what: str, total: int | None, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.begun_at = what, total, unit, done
        self.done, self.told, self.postfix = done, done, ""
        self.begin = self.last = time.monotonic()
        self.silent = sys.stderr is None or bool(os.environ.get("TQDM_DISABLE"))

    def update(self, n: int = 1) -> None:
        self.done += n
        if time.monotonic() - self.last >= EVERY:
            self._tell()

    def set_postfix_str(self, s: str) -> None:
        self.postfix = s

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if self.begun_at < self.told < self.done:
            self._tell()

    def _tell(self) -> None:
        self.last, self.told = time.monotonic(), self.done
        meter = tqdm.format_meter(
            self.done,
            self.total or 0,  # 0: not known
            self.last - self.begin,
            ncols=0,  # figures alone
            prefix=self.what,
            unit=self.unit,
            postfix=self.postfix,
            initial=self.begun_at,
        )
        if not self.silent:
            print(meter, file=sys.stderr, flush=True)
