"""The figure of the guide to reconstruction: seconds that a method takes, perplexity it leaves."""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

from bench.tables.accuracy import latest

Box = tuple[float, float, float, float]

PATTERN = "2:4"
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 560, 40, 330
SECONDS, PERPLEXITY = (0.1, 1000.0), (5.5, 8.5)  # what the axes show
LETTER = 6.4  # pixels, about
BELOW = (0, 15, -13, 29)  # where a label may stand, in pixels below its dot
STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #6b7280 }
    .middle { text-anchor: middle }
    .end { text-anchor: end }
    .front { fill: #2563eb }
    .behind { fill: #94a3b8 }
    path { fill: none; stroke: #2563eb; stroke-opacity: 0.5 }
    .grid { stroke: #94a3b8; stroke-opacity: 0.3 }
"""


def pareto(results: Path) -> str:
    """An SVG: a dot a method, seconds against perplexity, and a line along the Pareto front."""
    found, device, rows = _methods(results)
    front = _front(found)
    title = (
        f"Perplexity at {PATTERN} against the seconds that a method took, {rows} calibration rows; "
        f"on the front: {', '.join(front)}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        f"<style>{STYLE}  </style>",
        *_axes(device, rows),
        *_dots(found, front),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


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


def _front(found: dict[str, tuple[float, float]]) -> list[str]:
    """The methods that no other beats in both, the quickest first."""
    front: list[str] = []
    for name in sorted(found, key=lambda one: found[one]):
        if not front or found[name][1] < found[front[-1]][1]:
            front.append(name)
    return front


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


def _dots(found: dict[str, tuple[float, float]], front: list[str]) -> Iterator[str]:
    corners = [(_x(found[name][0]), _y(found[name][1])) for name in front]
    steps = "".join(f"H{x}V{y}" for x, y in corners[1:])
    yield f'<path d="M{corners[0][0]} {corners[0][1]}{steps}"/>'
    dots = {name: (_x(seconds), _y(value)) for name, (seconds, value) in found.items()}
    taken = [_box(x, y, 0, "") for x, y in dots.values()]
    for name in [*front, *(one for one in found if one not in front)]:
        (x, y), value = dots[name], found[name][1]
        label = name if value <= PERPLEXITY[1] else f"{name} ({value:.1f})"
        side, box = _free_place(x, y, label, taken)
        taken.append(box)
        kind, anchor = ("front" if name in front else "behind"), ' class="end"' if side < 0 else ""
        at = f'x="{x + 9 * side:.1f}" y="{box[3] - 3:.1f}"'
        yield f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"/>'
        yield f"<text{anchor} {at}>{escape(label)}</text>"


def _free_place(x: float, y: float, label: str, taken: list[Box]) -> tuple[int, Box]:
    """The side of the dot, 1 for the right, and the box where its label covers no other."""
    places = [(side, _box(x, y + below, side, label)) for below in BELOW for side in (1, -1)]
    return next((one for one in places if not any(_overlap(one[1], b) for b in taken)), places[0])


def _box(x: float, y: float, side: int, label: str) -> Box:
    """The dot's box, or the box of a label on one side of it: left, top, right, bottom."""
    if not label:
        return x - 5, y - 5, x + 5, y + 5
    near, far = x + 9 * side, x + side * (9 + LETTER * len(label))
    return min(near, far), y - 8, max(near, far), y + 7


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _x(seconds: float) -> float:
    low, high = map(math.log10, SECONDS)
    return round(LEFT + (RIGHT - LEFT) * (math.log10(seconds) - low) / (high - low), 1)


def _y(perplexity: float) -> float:
    """The height of this perplexity; what is above the axis stands at its top."""
    low, high = PERPLEXITY
    return round(BOTTOM - (BOTTOM - TOP) * (min(perplexity, high) - low) / (high - low), 1)
