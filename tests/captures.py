"""A stand-in for a GPU that captures: the same work on the same memory, launch by launch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from secateur.core import graphs


class Stream(NamedTuple):
    device: torch.device


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `Replayed` capture on a CPU; the captures, each with the times that it was replayed."""
    found: list[int] = []

    def captured(run: Callable[[], None], stream: object) -> Callable[[], None]:
        found.append(0)
        number = len(found) - 1
        run()

        def replay() -> None:
            found[number] += 1
            run()

        return replay

    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return found
