"""Measured increases of a loss, on disk, so that the same call goes on where it was stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A checkpoint's dense loss and today's may differ by what non-deterministic kernels do.
SAME_LOSS = 1e-4


class Kept:
    """Increases by layer and pattern, in a JSON file where there is one."""

    def __init__(self, path: str | Path | None, fingerprint: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._state: dict[str, Any] = {"fingerprint": fingerprint, "loss": None, "increase": {}}
        if self._path is None or not self._path.exists():
            return
        state = read_json(self._path, "checkpoint of sense")
        if (
            not isinstance(state, dict)
            or state.keys() != self._state.keys()
            or not isinstance(state["fingerprint"], dict)
        ):
            raise ValueError(f"{self._path} is no checkpoint of sense: choose another file")
        different = [
            key for key in fingerprint if state["fingerprint"].get(key) != fingerprint[key]
        ]
        if different:
            raise ValueError(
                f"the checkpoint {self._path} belongs to another call, its {different[0]} differs: "
                "choose another file, or repeat the call that began it"
            )
        self._state = state

    def dense_loss(self, measured: float) -> float:
        """The dense loss that all increases refer to."""
        before: float | None = self._state["loss"]
        if before is None:
            self._state["loss"] = before = measured
        elif abs(before - measured) > SAME_LOSS * max(abs(before), abs(measured)):
            raise ValueError(
                f"the checkpoint {self._path} has a dense loss of {before:.6g}, now it is "
                f"{measured:.6g}: the data or the loss is another one: choose another file"
            )
        return before

    def has(self, layer: str, pattern: str) -> bool:
        """Whether it has been measured."""
        return self.get(layer, pattern) is not None

    def get(self, layer: str, pattern: str) -> float | None:
        """The increase, or None."""
        found: float | None = self._state["increase"].get(layer, {}).get(pattern)
        return found

    def add(self, layer: str, pattern: str, increase: float) -> None:
        """Keep a measured increase."""
        self._state["increase"].setdefault(layer, {})[pattern] = increase
        if self._path is not None:
            write_json(self._path, self._state)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Atomic, so that a kill leaves the state before or after."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, allow_nan=False), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it cannot be read; `what` says what it should have been.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of {what}: {error}") from None
