"""The table of layers on a CPU."""

from pathlib import Path

from bench.tables.pages import TABLES
from tests.bench.rows import rows_file


def test_the_table_shows_both_baselines_and_bold_where_both_are_beaten(tmp_path: Path) -> None:
    ratios = {("b cpu", 1): ("2.0", "1.5"), ("b cpu", 16): ("3.0", "0.5"), ("c", 1): ("0.5", "0.4")}
    ratios[("c", 16)] = ("2.0", "")  # no prepacked dense in this dtype
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", ratios)
    lines = TABLES["linear-cpu-all"](tmp_path).splitlines()
    assert lines[0] == "| layer | dtype | runs | zeros | bytes | 1 token | 16 tokens |"
    assert lines[2] == "| 8 x 4 | float32 | b cpu | 80% | 0.21 | **2.00 / 1.50** | 3.00 / 0.50 |"
    assert lines[3] == "| 8 x 4 | float32 | c | 80% | 0.21 | 0.50 / 0.40 | **2.00** |"
    assert "a chip, 2 threads, torch 2.13, 2026-11-22, commit abc, `python -m bench" in lines[5]
    assert "at most 3% of the machine" in lines[5] and len(lines) == 6


def test_the_table_shows_dense_int8_as_a_third_baseline_where_it_was_measured(
    tmp_path: Path,
) -> None:
    path = tmp_path / "linear_2026-11-22_x_abc.csv"
    rows_file(tmp_path, path.name, {("b cpu", 1): ("2.0", "1.5"), ("c", 1): ("3.0", "2.5")})
    head, *rows = path.read_text().splitlines()
    ratios = {"b cpu": "0.9", "c": ""}
    more = [row + "," + next((r for name, r in ratios.items() if name in row), "") for row in rows]
    path.write_text("\n".join([head + ",vs_int8", *more]) + "\n")
    lines = TABLES["linear-cpu-all"](tmp_path).splitlines()
    assert lines[2].endswith("| 2.00 / 1.50 / 0.90 |") and lines[3].endswith("| **3.00 / 2.50** |")
    assert "over torch's dense int8, where inputs are rounded, bold where it beats all" in lines[5]


def test_the_table_of_cpus_has_all_layers_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "linear_2026-11-22_x_abc.csv"
    rows_file(tmp_path, path.name, {("b cpu", 1): ("2.0", "1.5")})
    text = path.read_text()
    others = [text.replace(",q,8,", ",r,9,"), text.replace("float32", "bfloat16")]
    path.write_text(text + "".join(other.split("\n", 1)[1] for other in others))
    whole = TABLES["linear-cpu-all"](tmp_path)
    assert [line.split(" | ")[:2] for line in whole.splitlines() if "b cpu" in line] == [
        ["| 8 x 4", "float32"],
        ["| 9 x 4", "float32"],
        ["| 8 x 4", "bfloat16"],
    ]


def test_every_processor_keeps_its_own_table(tmp_path: Path) -> None:
    """What is measured on another one replaces nothing, and a later commit on one replaces all."""
    for name, ratio in (("22_x_abc", "2.0"), ("23_x_def", "3.0"), ("24_y_def", "4.0")):
        path = tmp_path / f"linear_2026-11-{name}.csv"
        rows_file(tmp_path, path.name, {("b cpu", 1): (ratio, "1.5")})
        if "_y_" in name:
            path.write_text(path.read_text().replace("a chip", "another chip"))
    lines = TABLES["linear-cpu-all"](tmp_path).splitlines()
    shown = [line.split(" | ")[-1] for line in lines if "b cpu" in line]
    assert shown == ["**3.00 / 1.50** |", "**4.00 / 1.50** |"]
    assert [line.split("; ")[1].split(",")[0] for line in lines if "Speed-up" in line] == [
        "a chip",
        "another chip",
    ]
