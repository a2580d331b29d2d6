"""The finished work of a long run, on disk, so that the same call resumes where it was stopped.

A `RunFolder` knows which run it belongs to and which files are its own. Each is a safetensors file
with tensors and a description of them, a hash over both and a hash over the description. It appears
whole or not at all, is never written again, and is not believed if it is damaged.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.core.disk.atomic import ANY, file_appearing_whole, write_whole
from secateur.core.disk.data_files import read_json
from secateur.core.disk.owned import Lock, Taken, remove_leftovers
from secateur.core.disk.tensor_files import read_metadata, read_tensors, save_file

PROGRESS = "progress.json"
VERSION = 1
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in an object's repr; it differs between processes
LAYERS = r"layers-\d{5,}\.safetensors"


def digest(tree: Any) -> str:
    """A hash of every tensor in the tree, bit by bit, and of everything else in it, as text."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            _update(found, leaf)
        elif isinstance(leaf, Mapping):  # a tokenizer's output, which pytree does not know
            found.update(digest(dict(leaf)).encode())
        else:
            found.update(ADDRESS.sub("", repr(leaf)).encode())
    return found.hexdigest()


def _update(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach().to_dense().cpu().contiguous().flatten()
    found.update(plain.view(torch.uint8).numpy())


class RunFolder:
    """A folder in which one run keeps its files, whose names match `own`, and `progress.json`.

    `fingerprint` is plain data that identifies the run; another run's folder is refused. With
    `writes`, the folder is locked until the block is left, and leftovers of a kill are removed.
    """

    def __init__(
        self, folder: str | Path, fingerprint: Mapping[str, Any], own: str, *, writes: bool = True
    ) -> None:
        self.folder = Path(folder)
        self._progress = self.folder / PROGRESS
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._run = hashlib.sha256(json.dumps(self._fingerprint).encode()).hexdigest()
        self._own = re.compile(own)
        self._verified: set[str] = set()
        self._lock: Lock | None = None
        if not writes:
            self._look()
            return
        self._is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = Lock(self.folder)
        except Taken:
            raise ValueError(
                f"the checkpoint in {self.folder} is in use by another process: wait until it is "
                "done, or choose another folder"
            ) from None
        try:
            self._look()
            remove_leftovers(self.folder, f".*{ANY}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder; remove it if it is new and still empty."""
        if self._lock is not None:
            if self._is_new and not any(self.folder.iterdir()):
                self.folder.rmdir()
            self._lock.release()

    def files(self) -> list[str]:
        """The names of the run's files so far."""
        if not self._progress.exists():
            return []
        return sorted(path.name for path in self.folder.iterdir() if self._own.fullmatch(path.name))

    def description(self, file: str) -> Any:
        """The description that was written with the tensors of a file.

        Raises:
            ValueError: if the file is damaged, or another run's.
        """
        metadata = self._metadata(file)
        if metadata.get("run") != self._run:
            raise self._damaged(file, "it is another run's")
        text = metadata.get("description", "")
        if metadata.get("description_sha256") != _hash({}, text):
            raise self._damaged(file, "its description of the tensors was changed")
        return json.loads(text)

    def tensors(self, file: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these names in a file, or all of them, after verifying the file's hash.

        Raises:
            ValueError: if the file is damaged.
        """
        if file in self._verified:
            return self._tensors(file, names)
        metadata, every = self._metadata(file), self._tensors(file)
        if metadata.get("sha256") != _hash(every, metadata.get("description", "")):
            raise self._damaged(file, "its hash differs")
        if names is not None and (lacking := [name for name in names if name not in every]):
            raise self._damaged(file, f"it lacks {lacking[0]!r}")
        self._verified.add(file)
        return every if names is None else {name: every[name] for name in names}

    def write(self, file: str, tensors: Mapping[str, Tensor], description: Any) -> None:
        """Write a file of the run; a kill leaves it whole or absent."""
        if not self._progress.exists():
            state = {"version": VERSION, "fingerprint": self._fingerprint}
            write_whole(self._progress, json.dumps(state))
        on_cpu = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        text = json.dumps(description)
        metadata = {"run": self._run, "description": text, "description_sha256": _hash({}, text)}
        metadata["sha256"] = _hash(on_cpu, text)
        with file_appearing_whole(self.folder / file) as partial:
            save_file(on_cpu, partial, metadata)

    def remove(self, file: str) -> None:
        """Remove a file of the run."""
        (self.folder / file).unlink(missing_ok=True)

    def _look(self) -> None:
        """Raise if the folder is another run's, or holds anything else."""
        if not self.folder.exists():
            return
        if self._progress.exists():
            self._require_same()
        elif others := [p.name for p in self.folder.iterdir() if not p.match(f".*{ANY}")]:
            raise ValueError(
                f"checkpoint needs an empty folder or its own, {self.folder} has {others[0]!r}"
            )

    def _require_same(self) -> None:
        try:
            state = read_json(self._progress)
            if set(state) != {"version", "fingerprint"} or state["version"] != VERSION:
                raise ValueError("it has another form or version")
            known = dict(state["fingerprint"])
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self._progress} is not a checkpoint: {error}: choose another folder"
            ) from None
        for key in {**self._fingerprint, **known}:
            if known.get(key) != self._fingerprint.get(key):
                raise ValueError(
                    f"the checkpoint in {self.folder} belongs to another run, its {key} differs: "
                    "choose an empty folder, or repeat the call that began it"
                )

    def _metadata(self, file: str) -> Mapping[str, str]:
        try:
            return read_metadata(self.folder / file)
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error

    def _tensors(self, file: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        try:
            return read_tensors(self.folder / file, names)
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error

    def _damaged(self, file: str, why: str) -> ValueError:
        return ValueError(
            f"{self.folder / file} of the checkpoint is damaged: {why}: remove this file, and the "
            "same call makes it again"
        )


def _hash(tensors: Mapping[str, Tensor], description: str) -> str:
    found = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        _update(found, tensors[name])
    return found.hexdigest()


# --- finished layers -----------------------------------------------------------------------------


def is_of_checkpoint(name: str) -> bool:
    """Whether this is the name of a checkpoint's file."""
    return name == PROGRESS or re.fullmatch(LAYERS, name) is not None


class Checkpoint:
    """Finished layers in a folder: their weights and report rows, one file a stage."""

    def __init__(
        self, folder: str | Path, fingerprint: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        self._folder = RunFolder(folder, fingerprint, LAYERS, writes=writes)
        self._rows: dict[str, dict[str, Any]] = {}
        self._file: dict[str, str] = {}
        self._count = 0
        try:
            for file in self._folder.files():
                self._keep(file, self._folder.description(file))
        except BaseException:
            self._folder.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.close()

    def finished(self) -> Mapping[str, Mapping[str, Any]]:
        """The report row of every finished layer."""
        return self._rows

    def weights(self, layers: Collection[str]) -> dict[str, Tensor]:
        """The weights of these layers, as far as they are finished."""
        by_file: dict[str, list[str]] = {}
        for name in layers:
            if name in self._file:
                by_file.setdefault(self._file[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, names in by_file.items():
            found |= self._folder.tensors(file, names)
        return found

    def add(self, weights: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Record finished layers atomically: a kill leaves the state before or after."""
        file = f"layers-{self._count:05}.safetensors"
        plain = {name: dict(row) for name, row in rows.items()}
        self._folder.write(file, weights, plain)
        self._keep(file, plain)

    def _keep(self, file: str, rows: dict[str, dict[str, Any]]) -> None:
        self._rows |= rows
        self._file |= dict.fromkeys(rows, file)
        number = int(file.removeprefix("layers-").removesuffix(".safetensors"))
        self._count = max(self._count, number + 1)
