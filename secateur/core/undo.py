"""The state of a model before a verb changed it, put back if the verb raises."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.core.disk.owned import Owned, temporary_folder
from secateur.core.disk.tensor_files import load_file, save_file
from secateur.core.interrupts import Signals

PREFIX = "secateur-undo-"

# Originals are copied to the CPU in pieces of this size, on their way to the disk.
PIECE_BYTES = 256 * 2**20


class Undo:
    """A log of calls that put a model back, run last first, and copies of its tensors on disk.

    A second model would not fit in memory. The copies are in unlinked files, mapped into memory:
    nobody can remove them, and the system does when the process ends.
    """

    def __init__(self) -> None:
        self._calls = contextlib.ExitStack()
        self._folder: Owned | None = None
        self._remembered: set[int] = set()  # by id: the log keeps the tensors

    def call(self, put_back: Callable[..., Any], *arguments: Any) -> None:
        """Add a call that undoes a change; add it before the change is made."""
        self._calls.callback(put_back, *arguments)

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these tensors, to be put back as they are now; call it before they are changed.

        Those that are remembered already are put back as they were then.
        """
        new = [tensor for tensor in tensors.values() if id(tensor) not in self._remembered]
        self._remembered |= set(map(id, new))
        for piece in _pieces(new):
            for tensor, original in zip(piece, self._originals(piece), strict=True):
                self._calls.callback(_copy, tensor, original)

    def restore(self) -> None:
        """Put everything back."""
        self._calls.close()
        self._remembered.clear()

    def forget_at_the_end_of(self, stack: contextlib.ExitStack) -> None:
        """Make the changes final when the stack is closed."""
        stack.callback(self._calls.pop_all)

    def tidy(self) -> None:
        """Remove the folder, which is empty by now; the copies can still be put back."""
        if self._folder is not None:
            self._folder.remove()

    def _originals(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of the tensors, mapped from an unlinked file."""
        if self._folder is None:
            self._folder = temporary_folder(PREFIX)
        path = self._folder.path / "originals.safetensors"
        copies = {str(i): _bytes(tensor) for i, tensor in enumerate(tensors)}
        save_file(copies, path)
        del copies
        mapped = load_file(path)
        with contextlib.suppress(PermissionError):  # Windows removes no file that is mapped
            path.unlink()
        return [
            mapped[str(i)].view(tensor.dtype).view(tensor.shape) for i, tensor in enumerate(tensors)
        ]


def _copy(tensor: Tensor, original: Tensor) -> None:
    tensor.data.copy_(original)  # `.data` is looked up now: it may have been replaced


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the CPU, as bytes: safetensors does not know every dtype."""
    return tensor.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of about `PIECE_BYTES`."""
    piece: list[Tensor] = []
    for tensor in tensors:
        piece.append(tensor)
        if sum(member.nbytes for member in piece) >= PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Undo everything if the block raises, KeyboardInterrupt included.

    A verb is `with all_or_nothing() as undo: return _verb(undo, ...)`. Its locals, which can take
    a while to free, are then gone when the block ends, and there is no line at which an interrupt
    leaves the model changed. A second interrupt waits until the first has been dealt with.
    """
    undo, signals, end = Undo(), Signals(), contextlib.ExitStack()
    try:
        signals.watch()
        yield undo
        undo.tidy()
        signals.hold()
        signals.deliver()  # the last ones that can still undo the verb
        signals.release_at_the_end_of(end)
        undo.forget_at_the_end_of(end)
        end.close()
    except BaseException:
        signals.hold()
        try:
            undo.restore()
        finally:
            undo.tidy()
            end.close()
            signals.release()
        raise
