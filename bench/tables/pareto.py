"""The figure of the guide to reconstruction: seconds that a method takes, perplexity it leaves."""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

from bench.tables.accuracy import latest
from bench.tables.scatter import BOTTOM, LEFT, RIGHT, TOP, dots, figure, front_of

PATTERN = "2:4"
SECONDS, PERPLEXITY = (0.1, 1000.0), (5.5, 8.5)  # what the axes show


def pareto(results: Path) -> str:
    """An SVG: a dot a method, seconds against perplexity, and a line along the Pareto front."""
    found, device, rows = _methods(results)
    front = front_of(found)
    title = (
        f"Perplexity at {PATTERN} against the seconds that a method took, {rows} calibration rows; "
        f"on the front: {', '.join(front)}"
    )

    def label(name: str) -> str:
        value = found[name][1]
        return name if value <= PERPLEXITY[1] else f"{name} ({value:.1f})"

    places = {name: (_x(seconds), _y(value)) for name, (seconds, value) in found.items()}
    return figure(title, [*_axes(device, rows), *dots(places, front, label)])


def _methods(results: Path) -> tuple[dict[str, tuple[float, float]], str, int]:
    """Each method's seconds and perplexity, in the case with most calibration data; its device."""
    cases = latest(results)
    case = max(cases, key=lambda one: one[1:3])
    taken: dict[str, list[tuple[float, float]]] = {}
    for row in cases[case]:
        if row["pattern"] == PATTERN and row["nll"] and row["seconds"]:
            taken.setdefault(row["method"], []).append((float(row["seconds"]), float(row["nll"])))
    return {
        name: (fmean(s for s, _ in values), math.exp(fmean(nll for _, nll in values)))
        for name, values in taken.items()
    }, *case[:2]


def _axes(device: str, rows: int) -> Iterator[str]:
    yield (
        f'<text x="{LEFT}" y="18">perplexity of a Llama of 28M at {PATTERN} (less is better), '
        f"against seconds on {escape(device)}, {rows} calibration rows</text>"
    )
    for seconds in (0.1, 1, 10, 100, 1000):
        yield f'<line class="grid" x1="{_x(seconds)}" y1="{TOP}" x2="{_x(seconds)}" y2="{BOTTOM}"/>'
        yield f'<text class="middle" x="{_x(seconds)}" y="{BOTTOM + 18}">{seconds:g} s</text>'
    for value in range(6, 9):
        yield f'<line class="grid" x1="{LEFT}" y1="{_y(value)}" x2="{RIGHT}" y2="{_y(value)}"/>'
        yield f'<text class="end" x="{LEFT - 8}" y="{_y(value) + 4:.1f}">{value}</text>'


def _x(seconds: float) -> float:
    low, high = map(math.log10, SECONDS)
    return round(LEFT + (RIGHT - LEFT) * (math.log10(seconds) - low) / (high - low), 1)


def _y(perplexity: float) -> float:
    """The height of this perplexity; what is above the axis stands at its top."""
    low, high = PERPLEXITY
    return round(BOTTOM - (BOTTOM - TOP) * (min(perplexity, high) - low) / (high - low), 1)
