"""Safetensors files. Importing `safetensors.torch` costs 0.1 s, so it waits for the first file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors in the file, by name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names in the file, on the CPU, and no other; without names, all."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def read_metadata(path: Path) -> Mapping[str, str]:
    """What the file says beside its tensors; no tensor is read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def shapes_in(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the dtype of every tensor in the file, by name; no tensor is read whole."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        # An empty slice is the one way to ask for a dtype as torch knows it.
        return {name: (tuple(s.get_shape()), _dtype(s)) for name, s in slices.items()}


def _dtype(part: Any) -> torch.dtype:
    empty: Tensor = part[:0] if part.get_shape() else part[...]
    return empty.dtype


def save_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors under their names; they must be contiguous and share no storage.

    The file can be read by whom other new files can; safetensors alone leaves it to its owner.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)
