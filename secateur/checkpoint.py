"""Finished layers of a long run, on disk, so that the same call goes on where it was stopped."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.tensor_files import read_tensors, save_file

PROGRESS = "progress.json"


class Checkpoint:
    """A folder of finished layers: their weights in safetensors files, `progress.json` beside them.

    `fingerprint` is plain data that says which run this is; another run's folder is refused.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._progress = self.folder / PROGRESS
        fingerprint = json.loads(json.dumps(fingerprint))
        self._state: dict[str, Any] = {"fingerprint": fingerprint, "files": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._progress.exists():
            try:
                self._state = json.loads(self._progress.read_text())
                known = self._state["fingerprint"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{self._progress} is not a checkpoint: {error!r}") from None
            different = [key for key in fingerprint if known.get(key) != fingerprint[key]]
            if different:
                raise ValueError(
                    f"the checkpoint in {self.folder} belongs to another run, its {different[0]} "
                    "differs: choose an empty folder, or repeat the call that began it"
                )
        elif any(self.folder.iterdir()):
            raise ValueError(
                f"checkpoint needs an empty folder or its own, {self.folder} has other files"
            )

    def finished(self) -> dict[str, dict[str, Any]]:
        """The report row of every finished layer."""
        return {name: row for rows in self._state["files"].values() for name, row in rows.items()}

    def weights(self, layers: Collection[str]) -> dict[str, Tensor]:
        """The weights of those of the layers that are finished."""
        found: dict[str, Tensor] = {}
        for file, rows in self._state["files"].items():
            if names := [name for name in rows if name in layers]:
                found |= read_tensors(self.folder / file, names)
        return found

    def add(self, weights: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Record finished layers; atomic, so that a kill leaves the state before or after."""
        file = f"layers-{len(self._state['files']):05}.safetensors"
        partial = self.folder / (file + ".partial")
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial)
        partial.replace(self.folder / file)
        self._state["files"][file] = dict(rows)
        partial = self._progress.with_suffix(".partial")
        partial.write_text(json.dumps(self._state))
        partial.replace(self._progress)
