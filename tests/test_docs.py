"""The pages keep their word: links resolve, nothing public is undocumented, and the code runs."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

import secateur as sc
from secateur.patterns import parse

ROOT = Path(__file__).parent.parent
MADE = {"_build", "generated", "jupyter_execute"}
FOLDERS = [ROOT / "docs", ROOT / "examples", ROOT / "bench", ROOT / "tests"]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))]
    if not MADE & set(page.parts)
)
EXECUTED = [page for page in PAGES if "```{code-cell}" in page.read_text(encoding="utf-8")]

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The width of code, in characters, that the theme shows without a scroll bar.
FRONT_WIDTH = 72
FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(?::[^\n]*\n)*(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DRAWING = re.compile(r"^\*\*`([^`]+)`\*\*.*?```text\n(.*?)```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The page's headings as GitHub and myst name them."""
    headings = re.findall(
        r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def run(code: str, folder: Path) -> None:
    """Run the code in a process of its own, with warnings as errors."""
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        assert linked.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: no heading of that name"


def contents(page: Path) -> list[str]:
    """The entries of the page's tables of contents, from docs/ on."""
    tables = TOCTREE.findall(page.read_text(encoding="utf-8"))
    lines = [line for table in tables for line in table.split("\n") if re.match(r"[\w/*-]+$", line)]
    return [(page.parent.relative_to(ROOT / "docs") / line).as_posix() for line in lines]


def test_every_guide_and_page_is_in_the_table_of_contents() -> None:
    pages = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
    entries = [entry for page in pages for entry in contents(page)]
    for page in pages:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert name.name == "index" == str(name) or any(name.match(e) for e in entries), name


def test_the_front_page_is_not_cut_and_lists_no_log_of_experiments() -> None:
    page = ROOT / "docs" / "index.md"
    text = page.read_text(encoding="utf-8")
    code = [line for block in FENCE.finditer(text) for line in block[0].split("\n")]
    assert max(map(len, code)) <= FRONT_WIDTH
    assert all(":hidden:" in table for table in TOCTREE.findall(text)), "the sidebar has them"
    entries = contents(page)
    assert [entry for entry in entries if entry.startswith("log")] == ["log/index"] == entries[-1:]
    assert "](measured.svg)" in text and text.count("grid-item-card") == 3


def test_the_contract_is_drawn_as_it_is() -> None:
    assert "](contract.svg)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    drawing = ElementTree.parse(ROOT / "docs" / "contract.svg").getroot()
    width, height = map(float, drawing.attrib["viewBox"].split()[2:])
    cells: dict[float, dict[float, str]] = {}
    for cell in drawing.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = float(cell.attrib["x"]), float(cell.attrib["y"])
        assert x + float(cell.attrib["width"]) <= width
        assert y + float(cell.attrib["height"]) <= height
        if cell.attrib["class"] != "frame":
            cells.setdefault(y, {})[x] = cell.attrib["class"]
    assert len(cells) == 4
    for row in cells.values():
        kinds = [row[x] for x in sorted(row)]
        assert kinds[:8] == ["dense"] * 8 and kinds[16:] == ["packed"] * 4
        mask = torch.tensor([kind == "kept" for kind in kinds[8:16]])[None]
        assert set(kinds[8:16]) == {"kept", "zero"} and parse("2:4").violation(mask) is None
        assert int(mask.sum()) == 4


@pytest.mark.parametrize("name", sc.__all__)
def test_a_public_name_has_a_docstring_and_a_reference_page(name: str) -> None:
    assert (inspect.getdoc(vars(sc)[name]) or "").strip()
    homes = [page.room for page in extension("reference").pages() if name in page.public]
    assert len(homes) == 1


def test_reference_pages_show_public_names_in_full(tmp_path: Path) -> None:
    extension("reference").write(tmp_path)
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md"))
    for name in sc.__all__:
        kind = "class" if inspect.isclass(vars(sc)[name]) else "function"
        shown = f".. auto{kind}:: secateur::{name}\n"
        if not callable(vars(sc)[name]):
            shown = f".. py:data:: secateur.{name}\n\n   `"  # and its description
        assert shown in text
    assert "- `sc.best`: `sc.blockwise(sc.alps)` under a short name" in text


def test_docstring_sections_become_fields() -> None:
    to_rst = extension("docstrings").to_rst
    prose = ["|W_ij| of `x`s.", "", "Cost: one *mask*,", "    twice."]
    raised = ["Raises:", "    ValueError: if not."]
    assert to_rst([*prose, *raised]) == [
        "\\|W\\_ij\\| of \\ ``x``\\ s.",
        "",
        "",
        ":Cost: one *mask*, twice.",
        ":Raises: ValueError: if not.",
    ]


def test_a_table_in_a_docstring_stays_one() -> None:
    lines = extension("docstrings").to_rst(["| a | b |", "|---|---|", "| `c` | d |"])
    assert [line.strip() for line in lines if line] == [
        ".. list-table::",
        ":header-rows: 1",
        "* - a",
        "- b",
        "* - \\ ``c``\\",
        "- d",
    ]


def test_drawn_patterns_are_what_they_are_called() -> None:
    drawings = DRAWING.findall((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    assert [name for name, _ in drawings] == [
        "unstructured:0.5",
        "2:4",
        "block:2x4@0.5",
        "channels:0.5",
    ]
    for name, drawing in drawings:
        rows = [[mark == "#" for mark in line.split()] for line in drawing.split("\n") if line]
        mask = torch.tensor(rows)
        assert mask.shape == (4, 8)
        assert parse(name).violation(mask) is None
        assert int(mask.sum()) == 16, "half of it"


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_the_pages_runs(page: Path, tmp_path: Path) -> None:
    cells = CELL.findall(page.read_text(encoding="utf-8"))
    assert cells
    run("\n".join(cells), tmp_path)


def test_code_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "the README shows how it is used"
    run("\n".join(blocks), tmp_path)


def test_the_words_of_other_libraries_stay_out() -> None:
    allowed = {ROOT / "docs" / "glossary.md", ROOT / "CHANGELOG.md", ROOT / "DESIGN.md"}
    allowed.add(ROOT / "docs" / "migrate.md")  # it says what they were called
    forbidden = re.compile(
        r"\b(importance|sparsity_level|prune_mask|fake sparsity|obcq)\b", re.IGNORECASE
    )
    for page in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]:
        if page not in allowed and "log" not in page.parts:
            assert not forbidden.search(page.read_text(encoding="utf-8")), page


def extension(name: str) -> ModuleType:
    """A file of docs/_extensions, which Sphinx imports from its own path."""
    path = ROOT / "docs" / "_extensions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
