"""Ctrl-C while changes are being undone: the first one is handled, later ones wait."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], Any]

LATE = 0.05  # seconds; time enough for a function to return


class Signals:
    """The signals with Python handlers, Ctrl-C among them, while a model is being changed.

    A handler may raise at any point, even while the model is being put back because of an earlier
    signal. So once a handler has raised, or after `hold`, signals wait until `release`, which
    hands them to their handlers. Only the main thread receives signals: in any other thread this
    does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._handed_back = contextlib.ExitStack()
        self._waiting: list[int] = []
        self._holding = False

    def watch(self) -> None:
        """Let every signal arrive here before it reaches its handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._arrived:
                self._handlers[number] = handler
                self._handed_back.callback(signal.signal, number, handler)
                signal.signal(number, self._arrived)

    def hold(self) -> None:
        """Make signals wait until `release`."""
        self._holding = True
        self.watch()

    def release(self) -> None:
        """Give every signal its handler back, and call the handlers of the signals that waited."""
        self._handed_back.close()
        self.deliver()

    def deliver(self) -> None:
        """Call the handlers for the signals that waited."""
        waiting, self._waiting = self._waiting, []
        for number in dict.fromkeys(waiting):
            self._handlers[number](number, None)

    def release_at_the_end_of(self, stack: contextlib.ExitStack) -> None:
        """Give every signal its handler back when the stack is closed.

        A signal that is still waiting then came too late: the caller gets it a moment later.
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
    """Raise the signal in the thread that receives signals, to interrupt whatever it waits for."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, number)
    else:  # Windows
        signal.raise_signal(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Make signals wait until the block is done."""
    signals = Signals()
    try:
        try:
            signals.hold()
            yield
        finally:
            signals.release()
    finally:
        signals.release()  # does something only if the first release was interrupted


@contextlib.contextmanager
def putting_back() -> Iterator[contextlib.ExitStack]:
    """A stack of undo calls that all run at the end, whatever is raised and however often.

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
        stack.close()  # does something only if the first close was interrupted
