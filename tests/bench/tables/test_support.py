"""The table of tools: its rows have tests that exist, and say where they run."""

from pathlib import Path

import pytest

from bench.lib.results import RESULTS
from bench.tables.pages import ROOT, render
from bench.tables.support import ROWS, Row, how, support

TESTS = """
import pytest

def test_plain(): ...

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a GPU")
def test_gpu(): ...

@pytest.mark.slow
def test_slow(): ...

def test_optional():
    pytest.importorskip("lm_eval", reason="")

def test_pinned():
    pytest.importorskip("peft", reason="")

def check_one(): ...

def test_checks(name): ...
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(TESTS)
    (tmp_path / "constraints.txt").write_text("# pinned\npeft==1.0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("test_plain", "CI"),
        ("test_gpu", "`make test-gpu`"),
        ("test_slow", "`make test-slow`"),
        ("test_optional", "by hand: CI has no lm-eval"),
        ("test_pinned", "CI"),
        ("test_checks[one]", "CI"),
    ],
)
def test_where_a_test_runs_is_read_from_its_marks(test: str, said: str, root: Path) -> None:
    assert how(Row("tool", "works", f"tests/test_a.py::{test}"), root) == said


def test_what_has_not_run_says_so(root: Path) -> None:
    assert how(Row("tool", "works", untested="no GPU"), root) == "**not run**: no GPU"
    waits = Row("tool", "works", "tests/test_a.py::test_gpu", unrun="no GPU here")
    assert how(waits, root) == "`make test-gpu`, **not run yet**: no GPU here"


@pytest.mark.parametrize(
    "test",
    [
        "tests/test_a.py::test_none",
        "tests/test_b.py::test_plain",
        "tests/test_a.py::test_checks[x]",
    ],
)
def test_a_test_that_does_not_exist_is_refused(test: str, root: Path) -> None:
    with pytest.raises(ValueError, match="there is no test tests/"):
        support(RESULTS, (Row("tool", "works", test),), root)


def test_a_row_has_a_test_or_says_why_not(root: Path) -> None:
    for row in (Row("tool", "works"), Row("tool", "works", "tests/test_a.py::test_plain", "no")):
        with pytest.raises(ValueError, match="tool, works: needs a test, or why there is none"):
            support(RESULTS, (row,), root)


def test_the_page_is_made_of_the_rows() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert render(page, RESULTS) == page, "stale: make tables"
    (own,) = page.split("<!-- bench:support -->")[1:]
    assert own.split("<!-- /bench -->")[0].count("\n| ") == len(ROWS) + 2
