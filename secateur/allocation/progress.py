"""Measured increases of a loss, on disk, so that the same call continues where it was stopped."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core.disk.atomic import clear, write_whole
from secateur.core.disk.data_files import parse_json

# Share by which a checkpoint's dense loss may differ from the current one: kernels need not be
# deterministic.
SAME_LOSS = 1e-4


class Progress:
    """The increases measured so far, by layer and pattern; kept in a file if it gets a path.

    The file starts with a line of JSON that identifies the call, then has a line for each number,
    added as it is measured, each with its own hash. A line that a kill cut short is measured again.
    """

    def __init__(self, path: str | Path | None, fingerprint: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._loss: float | None = None
        self._increase: dict[tuple[str, str], float] = {}
        if self._path is None:
            return
        clear(self._path)
        if self._path.exists():
            self._read(self._path, fingerprint)
        else:
            write_whole(self._path, _line({"call": fingerprint}))

    def _read(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        try:
            whole, _, cut_off = path.read_bytes().rpartition(b"\n")
            first, *lines = [_entry(line) for line in whole.split(b"\n")]
            known = dict(first["call"])
            for line in lines:
                if "loss" in line:
                    self._loss = float(line["loss"])
                else:
                    self._increase[str(line["layer"]), str(line["pattern"])] = float(
                        line["increase"]
                    )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no checkpoint of sensitivity: {error}: choose another file"
            ) from None
        if different := [key for key in fingerprint if known.get(key) != fingerprint[key]]:
            raise ValueError(
                f"the checkpoint {path} belongs to another call, its {different[0]} differs: "
                "choose another file, or repeat the call that began it"
            )
        if cut_off:
            write_whole(path, whole + b"\n")

    def dense_loss(self, measured: float) -> float:
        """The dense loss to which all increases refer: the stored one, else the one measured."""
        if self._loss is None:
            self._loss = measured
            self._append({"loss": measured})
        elif abs(self._loss - measured) > SAME_LOSS * max(abs(self._loss), abs(measured)):
            raise ValueError(
                f"the checkpoint {self._path} has a dense loss of {self._loss:.6g}, now it is "
                f"{measured:.6g}: the data or the loss has changed: choose another file"
            )
        return self._loss

    def has(self, layer: str, pattern: str) -> bool:
        """Whether the layer has been measured in this pattern."""
        return (layer, pattern) in self._increase

    def get(self, layer: str, pattern: str) -> float | None:
        """The increase, or None if it has not been measured."""
        return self._increase.get((layer, pattern))

    def add(self, layer: str, pattern: str, increase: float) -> None:
        """Store a measured increase."""
        self._increase[layer, pattern] = increase
        self._append({"layer": layer, "pattern": pattern, "increase": increase})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(entry).encode())
                file.flush()
                os.fsync(file.fileno())


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({**entry, "sha256": _hash(entry)}, allow_nan=False) + "\n"


def _entry(line: bytes) -> dict[str, Any]:
    """What `_line` wrote, if its hash holds: a number changed since looks like any other."""
    entry = parse_json(line, "a line")
    if entry.pop("sha256", None) != _hash(entry):
        raise ValueError("a line was changed after it was written")
    return entry


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write the data as JSON, atomically: a kill leaves the old file or the new one."""
    write_whole(path, json.dumps(data, indent=2, allow_nan=False))
