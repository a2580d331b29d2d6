"""The library's timer, and how much of the machine others took meanwhile.

A timing taken while others work is no figure. `timed` repeats until the others took less than
`QUIET` of the machine, or keeps the quietest of `TRIES`; either way the share is in the row.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.formats.kernels.timing import ROUNDS, Calls, Timing, compare

QUIET = 0.05  # share of all cores' time; above it medians of two-thread code start to move
TRIES = 5
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Measurement:
    """The timings of one interleaved comparison, and the share of the machine that others took."""

    timings: Mapping[str, Timing]
    others: float


def timed(
    variants: Mapping[str, Calls], device: torch.device, rounds: int = ROUNDS, tries: int = TRIES
) -> Measurement:
    """The quietest of up to `tries` comparisons; the first below `QUIET` ends the search."""
    best: Measurement | None = None
    for _ in range(tries):
        before = _cpu_seconds()
        timings = compare(variants, device, rounds)
        measured = Measurement(timings, _share_of_others(before, _cpu_seconds()))
        if best is None or measured.others < best.others:
            best = measured
        if best.others < QUIET:
            break
    assert best is not None, "tries is at least 1"
    return best


def _cpu_seconds() -> tuple[float, float, float]:
    """(wall, this process, whole machine): seconds, the last one 0 where /proc/stat is missing."""
    machine = 0.0
    if STAT.exists():
        fields = STAT.read_text().split("\n", 1)[0].split()[1:]
        idle = int(fields[3]) + int(fields[4])  # idle and waiting for input or output
        machine = (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), machine


def _share_of_others(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> float:
    wall, own, machine = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))
