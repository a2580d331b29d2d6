"""A folder that appears whole or not at all, whatever happens while it is written."""

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing_whole(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, or is gone if the block raises.

    Of the old folder, the files whose names are `replaced` go; all others are copied over.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            _keep_others(folder, partial, replaced)
            _exchange(folder, partial)
        else:
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_not_interrupted(folder: Path) -> None:
    """Nothing, unless a kill between the two renames of an exchange left the old folder aside.

    Raises:
        ValueError: then, with the name it has.
    """
    aside = _aside(folder.resolve())
    if aside.exists() and not folder.exists():
        raise ValueError(f"a save of {folder} was killed: rename {aside} back to it")


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
