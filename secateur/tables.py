"""Plain text tables, for everything that a report prints."""

from collections.abc import Sequence


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table; columns of numbers are set right, the others left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        set_cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(set_cells).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    digits = cell.strip().rstrip("%x").replace(",", "")
    return (
        digits in ("", "-") or digits.lstrip("+-").replace(".", "", 1).replace("e-", "").isdigit()
    )
