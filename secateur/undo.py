"""Weights as they were, to be put back if a verb raises."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from secateur.tensor_files import load_file, save_file


class Undo:
    """Copies of parameters in a folder on disk: a second model would not fit in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._remembered: list[dict[str, nn.Parameter]] = []

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep these parameters as they are now; call it before they are changed."""
        # Copied even on a CPU: safetensors refuses parameters that are views of one storage.
        copies = {n: p.detach().to("cpu", copy=True).contiguous() for n, p in parameters.items()}
        save_file(copies, self._folder / f"{len(self._remembered)}.safetensors")
        self._remembered.append(dict(parameters))

    def restore(self) -> None:
        """Put everything back that was remembered."""
        for i, parameters in enumerate(self._remembered):
            kept = load_file(self._folder / f"{i}.safetensors")
            for name, parameter in parameters.items():
                parameter.data.copy_(kept[name])


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """What was remembered is put back if the block raises, KeyboardInterrupt included."""
    with tempfile.TemporaryDirectory(prefix="secateur-undo-") as folder:
        undo = Undo(Path(folder))
        try:
            yield undo
        except BaseException:
            undo.restore()
            raise
