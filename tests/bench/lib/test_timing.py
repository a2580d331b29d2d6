"""A quieter measurement is preferred."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench.lib import timing
from secateur.formats.kernels.timing import Calls, Timing


@pytest.mark.parametrize(
    ("shares", "kept", "calls"),
    [([0.01, 0.5], 0.01, 1), ([0.5, 0.02, 0.9], 0.02, 2), ([0.5, 0.4, 0.6], 0.4, 3)],
)
def test_the_quietest_measurement_is_kept(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], kept: float, calls: int
) -> None:
    remaining, made = list(shares), []

    def compare(
        variants: Mapping[str, Calls], device: torch.device, rounds: int
    ) -> dict[str, Timing]:
        made.append(rounds)
        return {"a": Timing(float(len(made)), 0.0, 0.0, rounds)}

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "_share_of_others", lambda *_: remaining.pop(0))
    measured = timing.timed({"a": []}, torch.device("cpu"), rounds=7, tries=3)
    assert measured.others == kept and made == [7] * calls
    assert measured.timings["a"].median_us == 1 + shares.index(kept)


def test_the_share_of_others_leaves_this_process_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    assert timing._share_of_others((0.0, 0.0, 0.0), (10.0, 12.0, 20.0)) == pytest.approx(0.2)
    assert timing._share_of_others((0.0, 0.0, 0.0), (10.0, 12.0, 11.9)) == 0.0


def test_machine_time_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 99 99\ncpu0 1 2 3\n")
    monkeypatch.setattr(timing, "STAT", stat)
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 10)
    assert timing._cpu_seconds()[2] == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / 10)
    monkeypatch.setattr(timing, "STAT", tmp_path / "missing")
    assert timing._cpu_seconds()[2] == 0.0
