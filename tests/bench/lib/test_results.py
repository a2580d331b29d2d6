"""Rows are read back in the order in which they were measured; the index names all of them."""

import importlib.util
import re
from pathlib import Path

import pytest

from bench.lib import results
from bench.tables.pages import TABLES
from tests.bench.rows import rows_file


def test_files_of_one_day_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    for commit, time in (("a", "13:05"), ("c", "09:30")):
        text = f"date,time,commit\n2026-11-23,{time},{commit}\n"
        (tmp_path / f"cost_2026-11-23_x_{commit}.csv").write_text(text)
    (tmp_path / "cost_2026-11-23_x_b.csv").write_text("date,commit\n2026-11-23,b\n")
    assert [rows[0]["commit"] for rows in results.every(tmp_path, "cost")] == ["b", "c", "a"]


def test_the_latest_rows_are_used(tmp_path: Path) -> None:
    rows_file(tmp_path, "linear_2026-11-23_x_abc.csv", {("new", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("old", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "front_2026-11-24_x_abc.csv", {("other", 1): ("2.0", "2.0")})
    other = {("other chip", 1): ("2.0", "2.0")}
    rows_file(tmp_path, "linear_2026-11-23_y_abc.csv", other, "another chip")
    found = [{row["candidate"] for row in rows} for rows in results.newest(tmp_path, "linear")]
    denses = {"dense", "dense prepacked"}
    assert found == [denses | {"new"}, denses | {"other chip"}]
    assert TABLES["linear-cpu-all"](tmp_path).count("| layer |") == 2
    with pytest.raises(ValueError, match="tables need rows of train, got none"):
        results.newest(tmp_path, "train")


INDEX = (results.RESULTS / "README.md").read_text(encoding="utf-8")
ACTIVE, ARCHIVED = INDEX.split("Files in `archive/`")
LIVE, _, WAITING = ACTIVE.partition("Waiting for a first run")
LINE = re.compile(r"^\| `([\w-]+)_` \|", re.MULTILINE)


@pytest.mark.parametrize(("folder", "text"), [("", LIVE), ("archive", ARCHIVED)])
def test_every_prefix_of_files_has_a_line_in_the_index(folder: str, text: str) -> None:
    files = [path.name for path in (results.RESULTS / folder).iterdir() if path.suffix != ".md"]
    prefixes = {name.partition("_")[0] for name in files if "_" in name}
    assert prefixes and sorted(LINE.findall(text)) == sorted(prefixes)


def test_what_waits_has_no_files() -> None:
    names = [path.name for path in results.RESULTS.iterdir()]
    assert not [
        name for name in names for one in LINE.findall(WAITING) if name.startswith(f"{one}_")
    ]


def test_the_index_names_every_table_and_commands_that_there_are() -> None:
    lines = [line.split("|") for line in (LIVE + WAITING).splitlines() if LINE.match(line)]
    named = {name for *_, tables, _ in lines for name in re.findall(r"`([\w-]+)`", tables)}
    assert named == set(TABLES) - {"support"}  # which is made of tests, not of rows
    modules = re.findall(r"python -m ([\w.]+)", LIVE + WAITING)
    assert len(modules) > 10 and all(map(importlib.util.find_spec, modules))
