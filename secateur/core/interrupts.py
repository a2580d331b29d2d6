"""Ctrl-C while something is put back: the first one is heard, those after it wait."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], Any]

LATE = 0.05  # seconds; time enough for a function to return


class Signals:
    """The signals that Python functions handle, Ctrl-C among them, while a model is changed.

    A handler may raise wherever Python is, also where the model is being put back because of an
    earlier one. So once a handler has raised, or from `hold` on, signals wait until `release`,
    which hands them to their handlers. Only the main thread has signals: in any other nothing
    happens.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._handed_back = contextlib.ExitStack()
        self._waiting: list[int] = []
        self._holding = False

    def watch(self) -> None:
        """From now on, signals come here first."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._arrived:
                self._handlers[number] = handler
                self._handed_back.callback(signal.signal, number, handler)
                signal.signal(number, self._arrived)

    def hold(self) -> None:
        """From now on, signals wait."""
        self._holding = True
        self.watch()

    def release(self) -> None:
        """Every signal has its handler again, which is called for those that waited."""
        self._handed_back.close()
        self.deliver()

    def deliver(self) -> None:
        """Call the handlers for the signals that waited."""
        waiting, self._waiting = self._waiting, []
        for number in dict.fromkeys(waiting):
            self._handlers[number](number, None)

    def release_at_the_end_of(self, stack: contextlib.ExitStack) -> None:
        """When the stack is closed, every signal has its handler again.

        What waits then came too late: it is heard a moment later, by whoever called.
        """
        stack.push(self._handed_back.pop_all())
        stack.callback(list, map(_hear_later, self._waiting))  # first, as starting a thread waits

    def _arrived(self, number: int, frame: Any) -> None:
        if self._holding:
            self._waiting.append(number)
            return
        try:
            self._handlers[number](number, frame)
        except BaseException:
            self._holding = True
            raise


def _hear_later(number: int) -> None:
    threading.Timer(LATE, _hear, [threading.get_ident(), number]).start()


def _hear(thread: int, number: int) -> None:
    """In the thread that has signals, so that what it waits for meanwhile is interrupted."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, number)
    else:  # Windows
        signal.raise_signal(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait until the block is done."""
    signals = Signals()
    try:
        try:
            signals.hold()
            yield
        finally:
            signals.release()
    finally:
        signals.release()  # what is left if the line before was interrupted; else nothing


@contextlib.contextmanager
def putting_back() -> Iterator[contextlib.ExitStack]:
    """A stack of calls that put things back at the end, whatever is raised and however often.

    Push a call before the change that it undoes: an interrupt may come between any two lines.
    """
    stack = contextlib.ExitStack()
    try:
        try:
            yield stack
        finally:
            with held():
                stack.close()
    finally:
        stack.close()  # what is left if the lines before were interrupted; else nothing
