"""Pages whose tables are stale are found and written."""

from pathlib import Path

import pytest

from bench.tables.__main__ import main
from bench.tables.pages import render
from tests.bench.rows import rows_file


def test_a_stale_file_is_found_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("b cpu", 1): ("2.0", "1.5")})
    page, plain = tmp_path / "page.md", tmp_path / "plain.md"
    page.write_text("before\n<!-- bench:linear-cpu-all -->\nold\n<!-- /bench -->\nafter\n")
    plain.write_text("no table here\n")
    arguments = ["--results", str(tmp_path), str(page), str(plain)]
    assert main(["--check", *arguments]) == 1
    assert capsys.readouterr().out == f"{page}: stale, run python -m bench.tables\n"
    assert "\nold\n" in page.read_text()
    assert main(arguments) == 0
    text = page.read_text()
    assert (
        text.startswith("before\n<!-- bench:linear-cpu-all -->\n\n| layer |")
        and "\nold\n" not in text
    )
    assert text.endswith("\n<!-- /bench -->\nafter\n") and "**2.00 / 1.50**" in text
    assert main(["--check", *arguments]) == 0


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table is named 'no-such': tables are accuracy-all"):
        render("<!-- bench:no-such -->\n<!-- /bench -->", tmp_path)
