"""What the figures of a Pareto front share: dots with their names, and a line along the front."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

Box = tuple[float, float, float, float]
Places = Mapping[str, tuple[float, float]]

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 560, 40, 330
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


def figure(title: str, parts: Sequence[str]) -> str:
    """The SVG with these parts."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title">'
    )
    head = [f'<title id="title">{escape(title)}</title>', f"<style>{STYLE}  </style>"]
    return "\n".join([opening, *head, *parts, "</svg>"]) + "\n"


def front_of(found: Places) -> list[str]:
    """The names that no other beats in both numbers, of which less is better, in order."""
    front: list[str] = []
    for name in sorted(found, key=lambda one: found[one]):
        if not front or found[name][1] < found[front[-1]][1]:
            front.append(name)
    return front


def dots(places: Places, front: Sequence[str], label_of: Callable[[str], str]) -> Iterator[str]:
    """A dot and a label at each place in pixels, and the line along the front."""
    corners = [places[name] for name in front]
    steps = "".join(f"H{x}V{y}" for x, y in corners[1:])
    yield f'<path d="M{corners[0][0]} {corners[0][1]}{steps}"/>'
    taken = [_box(x, y, 0, "") for x, y in places.values()]
    for name in [*front, *(one for one in places if one not in front)]:
        (x, y), label = places[name], label_of(name)
        side, box = _free_place(x, y, label, taken)
        taken.append(box)
        kind, anchor = ("front" if name in front else "behind"), ' class="end"' if side < 0 else ""
        at = f'x="{x + 9 * side:.1f}" y="{box[3] - 3:.1f}"'
        yield f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"/>'
        yield f"<text{anchor} {at}>{escape(label)}</text>"


def _free_place(x: float, y: float, label: str, taken: Sequence[Box]) -> tuple[int, Box]:
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
