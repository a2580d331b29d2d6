"""Files and folders that appear whole or not at all, whatever happens while they are written.

They are written under a name of their own beside the one they take, brought to the disk, and
renamed. What a kill leaves under such a name is removed by the next call that writes there.
"""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.core.disk.owned import Owned, in_use, remove_leftovers

ANY = ".????????.partial"  # how the names end that files and folders have while they are written


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a kill leaves the old one or the new one. Text is UTF-8.

    Raises: OSError where it cannot be written; then the old file is as it was.
    """
    with file_appearing_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def file_appearing_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place at the end, or is gone if the block raises.

    That is a folder of its own: what libraries write beside their files for a while goes with it.
    """
    clear(path)
    owned = Owned(lambda: _made(_partial(path)))
    try:
        partial = owned.path / path.name
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        owned.remove()


def clear(path: Path) -> None:
    """Remove what a kill left of writing this file or folder; the next write would, too."""
    remove_leftovers(path.parent, _partials(path))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def appearing_whole(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, or is gone if the block raises.

    Of the old folder, the files whose names are `replaced` go; all others are copied over.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear(folder)
    owned = Owned(lambda: _made(_partial(folder)))
    partial = owned.path
    try:
        yield partial
        if folder.exists():
            _keep_others(folder, partial, replaced)
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(partial)
        if folder.exists():
            _exchange(folder, partial)
        else:
            partial.rename(folder)
        sync(folder.parent)
        owned.release()
    except BaseException:
        owned.remove()
        raise


def settle(folder: Path) -> None:
    """Put the old folder back if a kill left it aside, between the two renames of an exchange.

    Raises:
        ValueError: if it cannot be renamed; the name that it has is in the message.
    """
    folder = folder.resolve()
    aside = _aside(folder)
    if not aside.exists() or folder.exists() or in_use(folder.parent, _partials(folder)):
        return
    try:
        aside.rename(folder)
    except OSError as error:
        raise ValueError(
            f"a save of {folder} was killed, its old content is {aside}, which cannot be renamed: "
            f"{error.strerror}: rename it back"
        ) from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _partials(path: Path) -> str:
    """The pattern of all names that `_partial` makes."""
    return f".{glob.escape(path.name)}{ANY}"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _keep_others(folder: Path, partial: Path, replaced: Callable[[str], bool]) -> None:
    for path in folder.iterdir():
        target = partial / path.name
        if replaced(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)


def _exchange(folder: Path, partial: Path) -> None:
    """Put `partial` in the folder's place; the old one is put back if that fails."""
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)
        partial.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
