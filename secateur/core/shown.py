"""What a verb reports, as paragraphs: printed as text, shown by a notebook as HTML or Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from secateur.core.tables import numeric_columns, printable, text_table

# What Markdown, and the mathematics in it that notebooks set, would obey.
_MARKS = re.compile(r"([\\`*_{}\[\]<>|~$&#])")


@dataclass(frozen=True)
class Table:
    """A table within a report: its heads, and cells that are text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return text_table(self.columns, self.rows)

    def html(self) -> str:
        """A `<table>`, numbers to the right and text to the left."""
        sides = ["right" if n else "left" for n in numeric_columns(self.columns, self.rows)]

        def line(tag: str, cells: Sequence[str]) -> str:
            of_line = (
                f'<{tag} style="text-align:{side}">{escape(printable(cell))}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{''.join(of_line)}</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        head = line("th", self.columns)
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def markdown(self) -> str:
        """A table of GitHub's Markdown, numbers to the right."""
        rules = ["---:" if n else "---" for n in numeric_columns(self.columns, self.rows)]
        lines = [[_unmarked(cell) for cell in line] for line in (self.columns, *self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:]))


class Shown(Protocol):
    """What a verb reports: sentences and tables, one under the other.

    Where a report is the last expression of a notebook's cell, its tables are the notebook's.
    """

    @property
    def paragraphs(self) -> Sequence[str | Table]: ...

    def __str__(self) -> str:
        return "\n".join(map(str, self.paragraphs))

    def _repr_html_(self) -> str:
        return "\n".join(
            f'<p style="white-space:pre-wrap">{escape(printable(one, keep=chr(10)))}</p>'
            if isinstance(one, str)
            else one.html()
            for one in self.paragraphs
        )

    def _repr_markdown_(self) -> str:
        return "\n\n".join(
            "  \n".join(map(_line, one.split("\n"))) if isinstance(one, str) else one.markdown()
            for one in self.paragraphs
        )


def _line(text: str) -> str:
    """A line of a sentence; spaces before it, which set it in, are kept."""
    inner = text.lstrip(" ")
    return "&emsp;" * ((len(text) - len(inner)) // 2) + _unmarked(inner)


def _unmarked(text: str) -> str:
    return _MARKS.sub(r"\\\1", printable(text))
