"""Small pictures of masks: a cell for each weight, dark where it is kept."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from secateur.patterns import Pattern

# A picture is this many weights high and wide, or so many tiles if a pattern has tiles.
ROWS, COLUMNS = 32, 64
TILES_DOWN, TILES_ACROSS = 4, 8
# The lines between groups and tiles are this fraction of the picture.
LINE = 500


@dataclass(frozen=True)
class Picture:
    """A corner of a layer's mask as an `<svg>` element, with the rows and columns that it shows."""

    layer: str
    pattern: str
    svg: str
    rows: int
    columns: int
    shape: tuple[int, int]
    zeros: float


def picture(layer: str, pattern: Pattern | None, mask: Bool[Tensor, "out in"]) -> Picture:
    """The top left corner of the mask, large enough to show the pattern's groups or tiles."""
    rows, columns = ROWS, COLUMNS
    if pattern is not None and pattern.tile != (1, 1):
        rows = max(rows, TILES_DOWN * pattern.tile[0])
        columns = max(columns, TILES_ACROSS * pattern.tile[1])
    corner = mask[:rows, :columns].cpu()
    return Picture(
        layer,
        str(pattern or ""),
        _svg(corner, _lines(pattern, mask.shape[1])),
        corner.shape[0],
        corner.shape[1],
        (mask.shape[0], mask.shape[1]),
        float((~mask).float().mean()),
    )


def _svg(corner: Bool[Tensor, "rows columns"], lines: tuple[int, int]) -> str:
    """One path of runs of kept weights, and lines every so many rows and columns (0 for none)."""
    rows, columns = corner.shape
    runs = []
    for y, row in enumerate(corner.int().tolist()):
        edges = [x for x in range(columns + 1) if (row[x - 1] if x else 0) != (*row, 0)[x]]
        runs += [
            f"M{a} {y}h{b - a}v1h{a - b}z" for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
    down, across = lines
    grid = [f"M0 {y}H{columns}" for y in range(down, rows, down)] if down else []
    grid += [f"M{x} 0V{rows}" for x in range(across, columns, across)] if across else []
    stroke = max(rows, columns) / LINE
    return (
        f'<svg class="mask" viewBox="0 0 {columns} {rows}" role="img" aria-label="mask picture" '
        f'shape-rendering="crispEdges"><path class="kept" d="{"".join(runs)}"/>'
        f'<path class="grid" d="{"".join(grid)}" stroke-width="{stroke:g}"/></svg>'
    )


def _lines(pattern: Pattern | None, columns: int) -> tuple[int, int]:
    """The height and width of the tiles, or the width of the groups where they are all alike."""
    if pattern is None or pattern.tile != (1, 1):
        return pattern.tile if pattern else (0, 0)
    widths = {stop - start for start, stop in pattern.groups(columns)}
    return 0, widths.pop() if len(widths) == 1 else 0
