"""The pieces that the tables share: lines of Markdown, ratios in bold, and where a row is from."""

from collections.abc import Sequence

from bench.lib.results import Row


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def page(heads: Sequence[str], lines: Sequence[Sequence[str]], *below: str) -> str:
    """A Markdown table with sentences below it, one a line; empty ones are left out."""
    return "\n".join([table(heads, lines), "", *filter(None, below)]) + "\n"


def bold(ratio: float) -> str:
    """`**1.25**` where it is faster, `0.94` where it is not."""
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"


def vs_cublas(row: Row) -> str:
    """How many times faster than dense, bold above 1; a dash where there is no figure."""
    return bold(float(row["vs_cublas"])) if row["vs_cublas"] else "-"


def tokens(count: int) -> str:
    """`1 token`, `16 tokens`."""
    return f"{count} token" + "s" * (count != 1)


def without_figure(reasons: Sequence[str]) -> str:
    """The sentence on the rows that have no figure; empty where all have one."""
    return f"Without a figure: {'; '.join(dict.fromkeys(reasons))}." if reasons else ""


def run(row: Row) -> str:
    """On what, with which torch, when and from which commit the row was measured."""
    return f"{row['device']}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def runs(rows: Sequence[Row]) -> str:
    """When and from which commits the rows were measured."""
    return "; ".join(dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows))


def libraries(rows: Sequence[Row]) -> str:
    """Which versions of other libraries there are rows of."""
    named = ", ".join(filter(None, dict.fromkeys(row.get("library", "") for row in rows)))
    return f"Other libraries: {named}." if named else ""
