"""Files and folders that appear whole or not at all, whatever happens while they are written.

They are written under a temporary name beside their own, synced to disk, and renamed. What a kill
leaves under such a name is removed by the next call that writes there.
"""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.core.disk.owned import Owned, in_use, remove_leftovers

ANY = ".????????.partial"  # the end of a temporary name, as a glob


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a kill leaves either the old or the new one. Text is UTF-8.

    Raises: OSError if it cannot be written; the old file is then unchanged.
    """
    with file_appearing_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def file_appearing_whole(path: Path) -> Iterator[Path]:
    """The path to write a file to; it takes its place at the end or is removed if the block raises.

    The path is in a folder of its own, so that libraries' temporary files beside it go with it.
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
    """Remove what a killed write of this file or folder left; the next write would do so too."""
    remove_leftovers(path.parent, _partials(path))


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def appearing_whole(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end; removed if the block raises.

    Files of the old folder whose names are `replaced` are dropped; all others are copied over.
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
    """Put the old folder back if a killed save left it under its temporary name.

    Raises:
        ValueError: if it cannot be renamed; the message names both.
    """
    folder = folder.resolve()
    aside = _aside(folder)
    if not aside.exists() or folder.exists() or in_use(folder.parent, _partials(folder)):
        return
    try:
        aside.rename(folder)
    except OSError as error:
        raise ValueError(
            f"a save of {folder} was killed and left its old content in {aside}, which cannot be "
            f"renamed: {error.strerror}: rename it back"
        ) from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _partials(path: Path) -> str:
    """A glob for all names that `_partial` makes."""
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
    """Put `partial` in the place of `folder`; put the old folder back if that fails."""
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
