"""Safetensors files and the indexes of several, the only files that weights are read from.

Errors of safetensors and the system become one of two, both with the file's name: ValueError if it
is not a safetensors file, OSError if it cannot be read or written. Importing `safetensors.torch`
costs 0.1 s, so it waits for the first file.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.core.disk.data_files import read_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors in the file, by name, on the CPU.

    Raises:
        ValueError: if it is no safetensors file.
        OSError: if it cannot be read.
    """
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def load_files(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors in all of the files, by name, on the CPU.

    Raises:
        ValueError, OSError: as `load_file`, and if two files have a tensor of the same name.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        tensors = load_file(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(
                f"{path} has the tensor {twice[0]!r}, which another file of its folder has too: "
                "copy the folder again from where it comes"
            )
        found |= tensors
    return found


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names in the file, on the CPU; all of them without `names`.

    Raises:
        ValueError: if it is no safetensors file, or lacks one of them.
        OSError: if it cannot be read.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def read_metadata(path: Path) -> Mapping[str, str]:
    """The file's metadata; no tensor is read.

    Raises: ValueError or OSError as `read_tensors`.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def shapes_in(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the dtype of every tensor in the file, by name; no tensor is read whole.

    Raises:
        ValueError: if it is no safetensors file.
        OSError: if it cannot be read.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        # An empty slice is the only way to get the dtype as a torch.dtype.
        return {name: (tuple(s.get_shape()), _dtype(s)) for name, s in slices.items()}


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once: safetensors files in the index's folder.

    Raises:
        ValueError: if it is no such index, names any other file, or one is missing.
        OSError: if it cannot be read.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is no index of safetensors: it needs a weight_map")
    names = dict.fromkeys(map(str, listed.values()))
    for name in names:
        if not is_plain_name(name) or not name.endswith(SUFFIX):
            raise ValueError(
                f"{index} names the file {name!r}: weights are read from {SUFFIX} files of the "
                "index's own folder only"
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent} lacks its weight file {name}: copy it again")
    return [index.parent / name for name in names]


def is_plain_name(name: str) -> bool:
    """Whether this is a file's name alone, with no path to another folder in it."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def save_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors under their names; they must be contiguous and share no storage.

    The file gets the permissions of any new file; safetensors alone gives them to its owner only.

    Raises:
        OSError: if it cannot be written, with its name and the reason.
    """
    from safetensors.torch import save_file

    new = not path.exists()
    try:
        with writing(path):
            path.touch()
            mode = path.stat().st_mode
            save_file(dict(tensors), path, None if metadata is None else dict(metadata))
            path.chmod(mode)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a safetensors error in the block into an OSError that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise _os_error(error, path) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    except OSError as error:
        raise _os_error(error, path) from error


def _os_error(error: Exception, path: Path) -> OSError:
    """The system's error with its number, which safetensors has in its text only, and the name."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and not isinstance(error, FileNotFoundError):
        return OSError(f"{path}: {error}")
    code = errno.ENOENT if number is None else int(number[1])
    return OSError(code, os.strerror(code), str(path))


def _dtype(part: Any) -> torch.dtype:
    empty: Tensor = part[:0] if part.get_shape() else part[...]
    return empty.dtype
