"""The bench: what a row holds, what a table says, and that a quieter measurement is preferred."""

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench import linear, tables, timing
from bench.shapes import SHAPES
from secateur.formats import parse_format
from secateur.kernels.timing import Calls, Timing

COLUMNS = (
    *("date", "device", "threads", "torch", "commit", "command", "layer", "out", "in", "dtype"),
    *("tokens", "candidate", "sparsity", "weight_bytes", "vs_eager", "vs_prepacked", "others"),
)


def rows_file(folder: Path, name: str, ratios: Mapping[tuple[str, int], tuple[str, str]]) -> None:
    """A file of rows with these (candidate, tokens) -> (vs eager, vs prepacked)."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        whole = {("dense", 1): ("1.0", "0.9"), ("dense prepacked", 1): ("1.1", "1.0"), **ratios}
        for (candidate, tokens), (eager, prepacked) in whole.items():
            size = 400 if candidate.startswith("dense") else 84
            measured = [tokens, candidate, "0.8", size, eager, prepacked, "0.03"]
            place = ["2026-11-22", "a chip", 2, "2.13", "abc", "python -m x", "q", 8, 4, "float32"]
            writer.writerow(dict(zip(COLUMNS, [*place, *measured], strict=True)))


def test_the_table_shows_both_baselines_and_bold_where_both_are_beaten(tmp_path: Path) -> None:
    ratios = {("b cpu", 1): ("2.0", "1.5"), ("b cpu", 16): ("3.0", "0.5"), ("c", 1): ("0.5", "0.4")}
    ratios[("c", 16)] = ("2.0", "")  # no prepacked dense in this dtype
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", ratios)
    lines = tables.linear_cpu(tmp_path).splitlines()
    assert lines[0] == "| layer | dtype | runs | zeros | bytes | 1 tokens | 16 tokens |"
    assert lines[2] == "| 8 x 4 | float32 | b cpu | 80% | 0.21 | **2.00 / 1.50** | 3.00 / 0.50 |"
    assert lines[3] == "| 8 x 4 | float32 | c | 80% | 0.21 | 0.50 / 0.40 | **2.00** |"
    assert "a chip, 2 threads, torch 2.13, 2026-11-22, commit abc, `python -m bench" in lines[5]
    assert "at most 3% of the machine" in lines[5] and len(lines) == 6


def test_the_short_table_is_the_first_layer_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "linear_2026-11-22_x_abc.csv"
    rows_file(tmp_path, path.name, {("b cpu", 1): ("2.0", "1.5")})
    text = path.read_text()
    others = [text.replace(",q,8,", ",r,9,"), text.replace("float32", "bfloat16")]
    path.write_text(text + "".join(other.split("\n", 1)[1] for other in others))
    short, whole = tables.linear_cpu(tmp_path), tables.linear_cpu_all(tmp_path)
    assert short.count("b cpu") == 1 and "| 8 x 4 | float32 |" in short
    assert [line.split(" | ")[:2] for line in whole.splitlines() if "b cpu" in line] == [
        ["| 8 x 4", "float32"],
        ["| 9 x 4", "float32"],
        ["| 8 x 4", "bfloat16"],
    ]


ACCURACY = """\
date,device,torch,commit,model,pattern,calibration_rows,first_row,validation_rows,method,nll,top1
2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,dense,1.0,
2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,wanda,2.0,0.676
2026-11-22,a chip,2.13,abc,m,4:8,128,0,64,wanda,1.5,0.7
2026-11-22,a chip,2.13,abc,m,2:4,128,99,64,wanda,9.0,0.1
2026-11-22,a chip,2.13,abc,m,2:4,32,0,64,wanda,9.0,0.1
"""


def test_the_accuracy_table_has_a_column_for_each_pattern(tmp_path: Path) -> None:
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text(ACCURACY)
    lines = tables.accuracy(tmp_path).splitlines()
    assert lines[0] == "| perplexity (top-1 as dense) | 2:4 | 4:8 |"
    assert lines[2] == "| dense | 2.72 | - |"
    assert lines[3] == "| wanda | 7.39 (68%) | 4.48 (70%) |"
    assert lines[5].startswith(
        "m, 128 calibration and 64 validation rows; a chip, torch 2.13, 2026"
    )


def test_the_latest_rows_are_used(tmp_path: Path) -> None:
    rows_file(tmp_path, "linear_2026-11-23_x_abc.csv", {("new", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("old", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "front_2026-11-24_x_abc.csv", {("other", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "linear_2026-11-23_y_abc.csv", {("other chip", 1): ("2.0", "2.0")})
    found = [{row["candidate"] for row in rows} for rows in tables.newest(tmp_path, "linear")]
    denses = {"dense", "dense prepacked"}
    assert found == [denses | {"new"}, denses | {"other chip"}]
    assert tables.linear_cpu(tmp_path).count("| layer |") == 2
    with pytest.raises(ValueError, match="tables need rows of train, got none"):
        tables.newest(tmp_path, "train")


def test_a_stale_file_is_found_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("b cpu", 1): ("2.0", "1.5")})
    page, plain = tmp_path / "page.md", tmp_path / "plain.md"
    page.write_text("before\n<!-- bench:linear-cpu -->\nold\n<!-- /bench -->\nafter\n")
    plain.write_text("no table here\n")
    arguments = ["--results", str(tmp_path), str(page), str(plain)]
    assert tables.main(["--check", *arguments]) == 1
    assert capsys.readouterr().out == f"{page}: stale, run python -m bench.tables\n"
    assert "\nold\n" in page.read_text()
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert (
        text.startswith("before\n<!-- bench:linear-cpu -->\n\n| layer |") and "\nold\n" not in text
    )
    assert text.endswith("\n<!-- /bench -->\nafter\n") and "**2.00 / 1.50**" in text
    assert tables.main(["--check", *arguments]) == 0


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table is named 'no-such': tables are accuracy, lin"):
        tables.render("<!-- bench:no-such -->\n<!-- /bench -->", tmp_path)


@pytest.mark.parametrize("format", ["semi24", "block:4x8", "csr", "bitmap"])
def test_weights_have_zeros_that_the_format_stores(format: str) -> None:
    chosen = parse_format(format)
    weight = linear.sparse_weight((64, 128), chosen, 0.8)
    assert chosen.why_not(weight) is None
    wanted = 0.5 if format == "semi24" else 0.8
    assert float((weight == 0).float().mean()) == pytest.approx(wanted, abs=0.06)
    assert torch.equal(weight, linear.sparse_weight((64, 128), chosen, 0.8))


def test_a_run_appends_rows_with_their_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "BERT-base attention", (64, 128))
    words = "--threads 1 --tokens 1 3 --formats block:4x8 semi24 --sparsities 0.5 0.9"
    layers = ["--layers", "BERT-base attention", "--output", str(tmp_path)]
    linear.main([*words.split(), *layers])
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path and path.name.startswith("linear_")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {
        (r["candidate"], r["sparsity"], r["tokens"]) for r in rows if "dense" not in r["candidate"]
    }
    assert cases == {
        *(("block:4x8 cpu", sparsity, tokens) for sparsity in ("0.5", "0.9") for tokens in "13"),
        *(("semi24 reference", "0.5", tokens) for tokens in "13"),
    }
    dense = [row for row in rows if row["candidate"] == "dense"]
    assert len(dense) == 6 and all(float(row["vs_eager"]) == 1 for row in dense)
    for row in rows:
        eager = next(d for d in dense if comparable(d) == comparable(row))
        assert float(row["vs_eager"]) == pytest.approx(float(eager["us"]) / float(row["us"]), 0.05)
        assert row["commit"] and row["command"] and row["torch"] == torch.__version__
        assert row["threads"] == "1" and row["out"] == "64"


def comparable(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["format"], row["sparsity"], row["tokens"]


def test_a_wrong_implementation_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "BERT-base attention", (64, 128))
    monkeypatch.setattr(linear, "admitted", lambda *_: ([], ["it is wrong by 1"]))
    with pytest.raises(RuntimeError, match="it is wrong by 1"):
        list(linear.case("BERT-base attention", parse_format("csr"), 0.9, 1, torch.float32))


@pytest.mark.parametrize(
    ("shares", "kept", "calls"),
    [([0.01, 0.5], 0.01, 1), ([0.5, 0.02, 0.9], 0.02, 2), ([0.5, 0.4, 0.6], 0.4, 3)],
)
def test_the_quietest_measurement_is_kept(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], kept: float, calls: int
) -> None:
    remaining, made = list(shares), []

    def compare(
        variants: Mapping[str, Calls], device: torch.device, rounds: int
    ) -> dict[str, Timing]:
        made.append(rounds)
        return {"a": Timing(float(len(made)), 0.0, 0.0, rounds)}

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "_share_of_others", lambda *_: remaining.pop(0))
    measured = timing.timed({"a": []}, torch.device("cpu"), rounds=7, tries=3)
    assert measured.others == kept and made == [7] * calls
    assert measured.timings["a"].median_us == 1 + shares.index(kept)


def test_the_share_of_others_leaves_this_process_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    assert timing._share_of_others((0.0, 0.0, 0.0), (10.0, 12.0, 20.0)) == pytest.approx(0.2)
    assert timing._share_of_others((0.0, 0.0, 0.0), (10.0, 12.0, 11.9)) == 0.0


def test_machine_time_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 99 99\ncpu0 1 2 3\n")
    monkeypatch.setattr(timing, "STAT", stat)
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 10)
    assert timing._cpu_seconds()[2] == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / 10)
    monkeypatch.setattr(timing, "STAT", tmp_path / "missing")
    assert timing._cpu_seconds()[2] == 0.0
