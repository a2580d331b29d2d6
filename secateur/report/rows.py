"""Rows of tables, folded and aligned, for the HTML report and the command line."""

import re
from collections.abc import Callable, Sequence

Row = tuple[str, ...]

# A number as reports print it: sign, thousands, a unit or a percent sign behind it.
_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?\s*(%|x|ms|us|[kMG]?B)?|-|")


def numeric_columns(columns: Sequence[str], rows: Sequence[Row]) -> list[bool]:
    """Whether each column holds only numbers, at least one, and so is aligned right."""
    cells = [[row[i].strip() for row in rows] for i in range(len(columns))]
    return [
        any(cell not in ("", "-") for cell in column)
        and all(_NUMBER.fullmatch(cell) for cell in column)
        for column in cells
    ]


def without_empty(columns: Sequence[str], rows: Sequence[Row]) -> tuple[tuple[str, ...], list[Row]]:
    """The table without the columns that are empty, or a dash, in every row."""
    told = [i for i in range(len(columns)) if any(row[i] not in ("", "-") for row in rows)]
    return tuple(columns[i] for i in told), [tuple(row[i] for i in told) for row in rows]


def fold(rows: Sequence[Row]) -> list[Row]:
    """The rows, merged where they differ only in one number in the layer's name.

    `layers.0.mlp.up` ... `layers.7.mlp.up`, otherwise equal, become `layers.0-7.mlp.up`. The name
    is the first cell; a merged row is in the place of its first member.
    """
    experts = _fold_at(rows, lambda places: places[-1])
    return _fold_at(experts, lambda places: places[0])


def _fold_at(rows: Sequence[Row], choose: Callable[[list[int]], int]) -> list[Row]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        parts = row[0].split(".")
        places = [i for i, part in enumerate(parts) if part.isdecimal()]
        place = choose(places) if places else -1
        rest = tuple(part for i, part in enumerate(parts) if i != place)
        groups.setdefault((place, rest, row[1:]), []).append(row)
    return [_merged(place, members) for (place, *_), members in groups.items()]


def _merged(place: object, members: list[Row]) -> Row:
    if len(members) == 1 or not isinstance(place, int) or place < 0:
        return members[0]
    parts = members[0][0].split(".")
    parts[place] = _ranges(sorted(int(row[0].split(".")[place]) for row in members))
    return (".".join(parts), *members[0][1:])


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
