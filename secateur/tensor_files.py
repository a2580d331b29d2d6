"""Safetensors files. Importing `safetensors.torch` costs 0.1 s, so it waits for the first file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors in the file, by name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


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
