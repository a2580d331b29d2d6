"""Plain text and plain-text tables, for everything that a report prints."""

import unicodedata
from collections.abc import Sequence

# Unicode categories that a terminal obeys or a reader cannot see: controls, direction marks, line
# separators, lone surrogates. Names in files from elsewhere may contain them.
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters, except `keep`, written as Python escapes.

    A name with escape sequences then cannot clear a screen, set a title or forge a line.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in OBEYED and c not in keep
        else c
        for c in text
    )


def as_bytes(count: int) -> str:
    """`55.6 MB`: bytes in powers of a thousand."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned columns, numbers to the right and text to the left."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    numeric = numeric_columns(columns, rows)

    def line(cells: Sequence[str]) -> str:
        set_cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(set_cells).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each column has numbers alone, or dashes in their place, and so is set right."""
    return [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]


def _is_number(cell: str) -> bool:
    digits = cell.strip().rstrip("%x").replace(",", "")
    return (
        digits in ("", "-") or digits.lstrip("+-").replace(".", "", 1).replace("e-", "").isdigit()
    )
