"""Reports as text, HTML and Markdown: one content, and nothing in it that a reader obeys."""

import ast
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbclient import NotebookClient

from secateur.core.shown import Shown, Table
from secateur.core.tables import printable

SOURCES = Path(__file__).parents[2] / "secateur"
CELLS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ROWS = st.lists(st.tuples(CELLS, CELLS), max_size=4)


@dataclass(frozen=True)
class Small(Shown):
    """A table between two sentences."""

    table: Table
    above: str = "2 layers, *.q_proj <b> $5$"
    below: str = "left alone:\n  head: it is_tied"

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return self.above, self.table, self.below


SMALL = Small(Table(("layer", "zeros"), [("layers.0.q_proj", "50.0%"), ("a|b & <i>", "7.5%")]))


class Texts(HTMLParser):
    """The text of each element, and which elements there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("th", "td", "p"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and data.strip("\n"):
            self.cells[-1] += data


def test_the_text_is_the_paragraphs_one_under_the_other() -> None:
    assert str(SMALL) == (
        "2 layers, *.q_proj <b> $5$\n"
        "layer            zeros\n---------------  -----\n"
        "layers.0.q_proj  50.0%\na|b & <i>         7.5%\n"
        "left alone:\n  head: it is_tied"
    )


def test_the_html_is_a_table_between_two_sentences() -> None:
    html = SMALL._repr_html_()
    found = Texts(html)
    assert found.cells == [
        SMALL.above, "layer", "zeros", "layers.0.q_proj", "50.0%", "a|b & <i>", "7.5%", SMALL.below,
    ]  # fmt: skip
    assert found.tags == {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert '<td style="text-align:right">50.0%</td>' in html
    assert '<td style="text-align:left">layers.0.q_proj</td>' in html


def test_the_markdown_is_a_table_between_two_sentences() -> None:
    assert SMALL._repr_markdown_() == (
        "2 layers, \\*.q\\_proj \\<b\\> \\$5\\$\n\n"
        "| layer | zeros |\n| --- | ---: |\n"
        "| layers.0.q\\_proj | 50.0% |\n| a\\|b \\& \\<i\\> | 7.5% |\n\n"
        "left alone:  \n&emsp;head: it is\\_tied"
    )


@given(ROWS)
def test_html_has_the_cells_as_they_are_printed(rows: list[tuple[str, str]]) -> None:
    html = Table(("a", "b"), rows).html()
    texts = Texts(html)
    assert texts.cells == ["a", "b", *(printable(cell) for row in rows for cell in row)]
    assert texts.tags <= {"table", "thead", "tbody", "tr", "th", "td"}


@given(ROWS)
def test_markdown_has_the_cells_as_they_are_printed(rows: list[tuple[str, str]]) -> None:
    """By a parser of GitHub's tables, which takes no cell for anything but text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(Table(("a", "b"), rows).markdown())
    inline = [token.children or [] for token in tokens if token.type == "inline"]
    assert {child.type for children in inline for child in children} <= {"text", "text_special"}
    cells = ["".join(child.content for child in children) for children in inline]
    assert cells == ["a", "b", *(printable(cell).strip() for row in rows for cell in row)]


def test_whatever_reports_in_a_table_is_shown_in_notebooks() -> None:
    tables, shown = set(), set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                if {"columns", "rows"} <= names:
                    tables.add(node.name)
                if "Shown" in {base.id for base in node.bases if isinstance(base, ast.Name)}:
                    shown.add(node.name)
    assert len(tables) >= 9 and tables <= shown, tables - shown
    assert {"PackReport", "Evolved", "Estimate", "Perplexity", "Agreement", "Cosine"} <= shown


def test_in_a_notebook_a_report_is_a_table_and_progress_a_bar() -> None:
    cell = (
        "import torch, secateur as sc\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "sc.prune_(model, '2:4')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    (result,) = [one.data for one in outputs if one.output_type == "execute_result"]
    assert "<table>" in result["text/html"] and "| layer |" in result["text/markdown"]
    assert result["text/plain"].startswith("PruneReport(")
    printed = "".join(one.text for one in outputs if one.output_type == "stream")
    assert "magnitude: 100%" in printed
