"""Files and folders owned by a living process, and the removal of those whose process is gone.

The owner holds a lock (flock) on its file or folder, which the system releases when the process
ends, however it ends. So anything with such a name and no lock is a leftover.
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing can be locked, so nothing is taken for a leftover
    fcntl = None  # type: ignore[assignment]

# flock's errors when somebody else has the lock; any other means a file system without locks.
TAKEN = (errno.EACCES, errno.EAGAIN)


class Taken(OSError):
    """Another process, or another object of this one, has the lock."""


class Lock:
    """The lock on a file or folder, until it is released or the process ends.

    `is_certain` says whether there is a lock at all: some network file systems have none.

    Raises: Taken if somebody else has it.
    """

    def __init__(self, path: Path) -> None:
        self.is_certain = False
        self._descriptor: int | None = None
        if fcntl is None:
            return
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_certain = True
        except OSError as error:
            if error.errno in TAKEN:
                self.release()
                raise Taken(error.errno, "in use by another process", str(path)) from None

    def is_of(self, path: Path) -> bool:
        """Whether the path still names the locked file; another process may have removed it."""
        if self._descriptor is None:
            return path.exists()
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock, if it is still held."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class Owned:
    """A new file or folder that this process owns until `remove` or `release`.

    `make` creates it under a new name and returns the path.
    """

    def __init__(self, make: Callable[[], Path]) -> None:
        while True:
            self.path = make()
            try:
                self._lock = Lock(self.path)
            except (Taken, FileNotFoundError):  # removed as a leftover before it was locked
                continue
            if self._lock.is_of(self.path):
                return
            self._lock.release()

    def remove(self) -> None:
        """Remove it, a folder with its content, if it is still there."""
        with contextlib.suppress(OSError):
            _remove(self.path)
        self._lock.release()

    def release(self) -> None:
        """Give up ownership; the file or folder stays, under whatever name it has now."""
        self._lock.release()


def temporary_folder(prefix: str, parent: Path | None = None) -> Owned:
    """A new folder in `parent`, or the system's; leftovers with the same prefix are removed."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_leftovers(parent, f"{glob.escape(prefix)}*")
    return Owned(lambda: Path(tempfile.mkdtemp(prefix=prefix, dir=parent)))


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove the files and folders that match and that no living process owns."""
    for path in parent.glob(pattern):
        with contextlib.suppress(OSError):  # in use, gone meanwhile, or somebody else's
            lock = Lock(path)
            try:
                if lock.is_certain:
                    _remove(path)
            finally:
                lock.release()


def in_use(parent: Path, pattern: str) -> bool:
    """Whether a living process owns a file or folder that matches."""
    for path in parent.glob(pattern):
        try:
            Lock(path).release()
        except Taken:
            return True
        except OSError:
            continue
    return False


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock on a file or folder during the block.

    Raises: ValueError with the message `taken` if another process has it.
    """
    try:
        lock = Lock(path)
    except Taken:
        raise ValueError(taken) from None
    try:
        yield
    finally:
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
