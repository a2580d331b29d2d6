"""The bench: what a row holds, what a table says, and that a quieter measurement is preferred."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import cold, decode, linear, peers, tables, timing
from bench.accuracy_tables import latest
from bench.shapes import SHAPES
from secateur.formats import parse_format
from secateur.formats.kernels.cusparselt import Setting
from secateur.formats.kernels.cusparselt_search import Found
from secateur.formats.kernels.timing import Calls, Timing
from tests.formats.kernels.fake_cusparselt import Fake, forget, install

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
    lines = tables.linear_cpu_all(tmp_path).splitlines()
    assert lines[0] == "| layer | dtype | runs | zeros | bytes | 1 token | 16 tokens |"
    assert lines[2] == "| 8 x 4 | float32 | b cpu | 80% | 0.21 | **2.00 / 1.50** | 3.00 / 0.50 |"
    assert lines[3] == "| 8 x 4 | float32 | c | 80% | 0.21 | 0.50 / 0.40 | **2.00** |"
    assert "a chip, 2 threads, torch 2.13, 2026-11-22, commit abc, `python -m bench" in lines[5]
    assert "at most 3% of the machine" in lines[5] and len(lines) == 6


def test_the_table_of_cpus_has_all_layers_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "linear_2026-11-22_x_abc.csv"
    rows_file(tmp_path, path.name, {("b cpu", 1): ("2.0", "1.5")})
    text = path.read_text()
    others = [text.replace(",q,8,", ",r,9,"), text.replace("float32", "bfloat16")]
    path.write_text(text + "".join(other.split("\n", 1)[1] for other in others))
    whole = tables.linear_cpu_all(tmp_path)
    assert [line.split(" | ")[:2] for line in whole.splitlines() if "b cpu" in line] == [
        ["| 8 x 4", "float32"],
        ["| 9 x 4", "float32"],
        ["| 8 x 4", "bfloat16"],
    ]


ACCURACY = """\
date,device,torch,commit,model,pattern,calibration_rows,first_row,validation_rows,method,nll,top1,r_s,kl
2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,dense,1.0,,1.0,
2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,"sparsegpt, algorithm 1 in float64",1.6,0.8,0.0,0.4
2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,wanda,2.0,0.676,-0.5,0.5
2026-11-22,a chip,2.13,abc,m,2:4,128,99,64,"sparsegpt, algorithm 1 in float64",1.6,0.8,0.0,0.2
2026-11-22,a chip,2.13,abc,m,2:4,128,99,64,wanda,2.2,0.624,-0.7,0.3
2026-11-22,a chip,2.13,abc,m,4:8,128,0,64,wanda,1.5,0.7,,0.7
2026-11-22,a chip,2.13,abc,m,2:4,32,0,64,wanda,9.0,0.1,,3.0
"""
PAPER = "| sparsegpt, algorithm 1 in float64 | 4.95 (80%; 0.00, 0.00 to 0.00; 0.00, 0.00 to 0.00) "
WANDA = "| wanda | 8.17 (65%; -0.60, -0.70 to -0.50; -0.37, -0.50 to -0.25) "


def test_the_accuracy_table_has_a_column_for_each_pattern(tmp_path: Path) -> None:
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text(ACCURACY)
    whole = tables.TABLES["accuracy-all"](tmp_path)
    small, large = whole.split("| perplexity (top-1 as dense; R_S; R_KL) ")[1:]
    assert "m, 32 calibration and 64" in small
    lines = large.splitlines()
    assert lines[0] == "| 2:4 | 4:8 |"
    assert lines[2:5] == ["| dense | 2.72 | - |", WANDA + "| 4.48 (70%) |", PAPER + "| - |"]
    assert lines[6].startswith(
        "m, 128 calibration (mean of 2 sets) and 64 validation rows, the former following one "
        "another in the file; a chip, torch 2.13, 2026"
    )
    assert len(lines) == 7


def test_each_case_of_the_accuracy_table_is_of_its_last_run(tmp_path: Path) -> None:
    """One pattern was measured again, and nothing else; one library could not be."""
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text(ACCURACY)
    head = ACCURACY.splitlines()[0].replace("r_s", "r_s,library,note")
    again = ["2026-11-23,a chip,2.13,def,m,4:8,128,0,64,wanda,1.0,0.8,,,,"]
    again += ["2026-11-23,a chip,2.13,def,m,4:8,128,0,64,other,,,,lib 1.2,it has no 4:8,"]
    again += ["2026-11-23,a chip,2.13,def,m,2:4,128,0,64,alps,1.5,0.7,,,,0.1"]
    (tmp_path / "accuracy_2026-11-23_x_def.csv").write_text("\n".join([head, *again]) + "\n")
    whole = tables.TABLES["accuracy-all"](tmp_path)
    lines = whole[whole.index("m, 32 calibration") :].splitlines()
    wanda = WANDA + "| 2.72 (80%) |"
    order = [line for line in lines if line.startswith(("| dense", "| alps", "| wanda"))]
    assert order == ["| dense | 2.72 | - |", wanda, "| alps | 4.48 (70%) | - |"]  # the worst first
    assert "2026-11-22, commit abc; 2026-11-23, commit def, `python -m bench.accuracy`." in whole
    assert "Other libraries: lib 1.2.\nNotes: other, 4:8: it has no 4:8." in whole


def test_rows_of_many_documents_are_a_case_of_their_own(tmp_path: Path) -> None:
    """Beside those that follow one another, and before them in the short table."""
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text(ACCURACY)
    head = ACCURACY.splitlines()[0].replace("first_row", "seed,documents")
    rows = [
        f"2026-11-22,a chip,2.13,def,m,2:4,128,{seed},58,64,{method},{nll},0.8,{r_s},{kl}"
        for seed, (method, nll, r_s, kl) in [
            (0, ('"sparsegpt, algorithm 1 in float64"', 1.5, 0.0, 0.4)),
            (0, ("thorough", 1.4, 0.2, 0.3)),
            (1, ('"sparsegpt, algorithm 1 in float64"', 1.5, 0.0, 0.2)),
            (1, ("thorough", 1.4, 0.2, 0.18)),
            (1, ("alps", 1.3, 0.3, 0.1)),
        ]
    ]
    (tmp_path / "accuracy_2026-11-22_x_def.csv").write_text("\n".join([head, *rows]) + "\n")
    short = tables.TABLES["accuracy-short"](tmp_path)
    assert "| thorough | 4.06 (80%; 0.20, 0.20 to 0.20; 0.18, 0.10 to 0.25) |" in short
    assert "alps" not in short  # the README has a few methods
    assert "(mean of 2 sets) and 64 validation rows, the former of 58 documents; a c" in short
    assert WANDA not in short and WANDA in tables.TABLES["accuracy-all"](tmp_path)
    assert tables.TABLES["accuracy-all"](tmp_path).count("| perplexity") == 3


FEW = """\
date,device,driver,torch,commit,layer,out,in,tokens,candidate,vs_cublas
2026-11-22,a chip,1,2.13,abc,Llama-3-8B gate_up,8,4,1,semi24_int4,4.5
2026-11-22,a chip,1,2.13,abc,Llama-3-8B gate_up,8,4,64,semi24_int4,
2026-11-22,a chip,1,2.13,abc,Llama-3-8B gate_up,8,4,1,cusparselt alg 0,0.25
2026-11-22,a chip,1,2.13,abc,Llama-3-8B qkv,8,4,1,semi24,9.0
"""
MANY = """\
date,device,commit,layer,tokens,candidate,vs_cublas
2026-11-22,a chip,abc,Llama-3-8B gate_up,4096,cusparselt alg 0,0.94
2026-11-22,a chip,abc,Llama-3-8B gate_up,4096,accelerate_,1.46
2026-11-22,a chip,abc,Llama-3-8B gate_up,1024,accelerate_,9.0
"""


def test_the_readmes_speeds_are_of_one_layer_and_losses_stay(tmp_path: Path) -> None:
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(FEW)
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(MANY)
    lines = tables.TABLES["speed-short"](tmp_path).splitlines()
    assert lines[0] == "| times dense bf16 | 1 token | 16 tokens | 64 tokens | 4,096 tokens |"
    assert "| 2:4 | - | - | - | **1.46** |" in lines
    assert "| 2:4, int4 weights | **4.50** | - | - | - |" in lines
    assert "| 2:4, cuSPARSELt as torch calls it | 0.25 | - | - | 0.94 |" in lines
    assert lines[-1].startswith("Llama-3-8B gate_up, 8 x 4; ratio to dense cuBLAS")


def test_the_readme_stays_short() -> None:
    """Someone reads it in two minutes; all figures are in the docs."""
    lines = (tables.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    heads = sum(line.startswith("| ---") for line in lines)
    assert len(lines) <= 120 and len(rows) - heads <= 12


def test_r_s_flatters_in_all_rows_that_there_are() -> None:
    """What README and the guide say of the two shares, held to the rows themselves."""
    avoided = [
        (float(row["r_s"]), float(row["r_kl"]))
        for rows in latest(tables.RESULTS).values()
        for row in rows
        if row["r_s"] and row["r_kl"] and row["method"] != "dense"
    ]
    assert len(avoided) > 50
    assert all(r_kl < r_s for r_s, r_kl in avoided if r_s > 0.01)


VISION = """\
date,device,torch,commit,pattern,seed,left_out,hidden,layers,method,top1,note,kl
2026-11-22,a chip,2.13,abc,2:4,0,597,32,4,dense,0.95,,0
2026-11-22,a chip,2.13,abc,2:4,1,597,32,4,dense,0.97,,0
2026-11-22,a chip,2.13,abc,4:8,0,597,32,4,theirs,,it takes no images,
2026-11-22,a chip,2.13,abc,4:8,0,597,32,4,alps,0.9,,0.25
"""


def test_the_vision_table_has_the_mean_and_range_of_its_seeds(tmp_path: Path) -> None:
    (tmp_path / "vision-accuracy_2026-11-22_x_abc.csv").write_text(VISION)
    lines = tables.TABLES["vision-accuracy"](tmp_path).splitlines()
    assert lines[0] == "| top-1; KL to dense | 2:4 | 4:8 |"
    assert lines[2:4] == [
        "| dense | 96.0% (95.0% to 97.0%); 0.000 | - |",
        "| alps | - | 90.0%; 0.250 |",
    ]
    assert lines[5] == "Without a figure: theirs: it takes no images."
    assert lines[7].startswith("Mean and range of 2 seeds, on 597 digits left out; a vision")


def test_the_encoder_table_has_a_cosine(tmp_path: Path) -> None:
    head = "date,device,torch,commit,pattern,calibration_sentences,test_sentences,method,cosine"
    head += ",library"
    row = "2026-11-22,a chip,2.13,abc,2:4,256,200,alps,0.8765,lib 1.2"
    (tmp_path / "encoder-accuracy_2026-11-22_x_abc.csv").write_text(f"{head}\n{row}\n")
    lines = tables.TABLES["encoder-accuracy"](tmp_path).splitlines()
    assert lines[0] == "| mean cosine to dense | 2:4 |" and lines[2] == "| alps | 0.876 |"
    assert lines[4].startswith("all-MiniLM-L6-v2, 256 calibration and 200 other sentences; a chip")
    assert lines[4].endswith("`python -m bench.encoder_accuracy`. Other libraries: lib 1.2.")


def test_the_allocation_table_has_a_row_a_method_and_a_column_a_sparsity(tmp_path: Path) -> None:
    head = "date,device,torch,commit,model,pattern,method,dense_nll,calibration_rows,search_rows,"
    head += "validation_rows,shared_seconds,nll,r_s,choice_seconds,kl"
    rows = [
        f"2026-11-23,a chip,2.13,abc,m,{pattern},{method},1.0,128,32,64,75.2,{nll},{r_s},{rest}"
        for pattern, method, nll, r_s, rest in (
            ("u:0.6", "uniform", 2.0, 0.0, "0,1"), ("u:0.7", "uniform", 3.0, 0.0, "0,0.5"),
            ("u:0.7", "evolved", 2.5, 0.25, "158.4,0.4"),
        )
    ]  # fmt: skip
    (tmp_path / "allocation_2026-11-23_x_abc.csv").write_text("\n".join([head, *rows]) + "\n")
    lines = tables.TABLES["allocation"](tmp_path).splitlines()
    assert lines[0] == "| perplexity (R_S; R_KL to uniform) | u:0.6 | u:0.7 |"
    assert lines[2] == "| uniform | 7.39 (0.00; 0.00) | 20.09 (0.00; 0.00) |"
    assert lines[3] == "| evolved | - | 12.18 (0.25; 0.20) |"
    assert lines[5].startswith("m, dense 2.72, 128 calibration rows, 32 others to search by, 64 to")
    assert "took 75 s, each evolution at most 158 s; a chip, torch 2.13" in lines[5]


def test_the_budget_table_says_how_far_off_each_was(tmp_path: Path) -> None:
    head = "date,device,torch,commit,model,layers,dtype,tokens,budget_ms,sum_ms,measured_ms,"
    head += "dense_ms,over"
    row = "2026-11-23,a chip,2.13,abc,m,12,bfloat16,16,0.2,0.19,0.206,0.4,0.03"
    (tmp_path / "budget_2026-11-23_x_abc.csv").write_text(f"{head}\n{row}\n")
    lines = tables.TABLES["budget"](tmp_path).splitlines()
    assert lines[2] == "| 16 | 0.200 | 0.206 | +3.0% | 0.190 | 0.400 |"
    assert lines[4].startswith("12 linear layers of m with random weights in bfloat16, one after")


def test_files_of_one_day_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    for commit, time in (("a", "13:05"), ("c", "09:30")):
        text = f"date,time,commit\n2026-11-23,{time},{commit}\n"
        (tmp_path / f"cost_2026-11-23_x_{commit}.csv").write_text(text)
    (tmp_path / "cost_2026-11-23_x_b.csv").write_text("date,commit\n2026-11-23,b\n")
    assert [rows[0]["commit"] for rows in tables.every(tmp_path, "cost")] == ["b", "c", "a"]


COST = "date,device,torch,commit,threads,model,blocks,rows,length,streamed,method,seconds,peak_gib"


def test_what_was_announced_stands_beside_what_was_taken(tmp_path: Path) -> None:
    rows = [
        f"2026-11-{day},a chip,2.13,{day},2,tiny,2,128,64,False,best,{taken},,{said}"
        for day, taken, said in ((22, 9.0, 1.0), (23, 3.0, 2.0))
    ]
    rows.append("2026-11-23,a chip,2.13,23,2,tiny,2,128,64,False,alps,1.0,,")
    head = COST + ",announced"
    (tmp_path / "cost_2026-11-23_x.csv").write_text("\n".join([head, *rows]) + "\n")
    lines = tables.TABLES["announced"](tmp_path).splitlines()
    assert lines[2] == "| tiny, 2 blocks, 128 x 64 tokens | best | 2.0 s | 3.0 s | 1.50 |"
    assert lines[4].endswith("2026-11-23, commit 23, 2 threads, `python -m bench.cost`.")
    assert len(lines) == 5


def test_the_seconds_of_methods_are_in_times_of_sparsegpts(tmp_path: Path) -> None:
    """The fastest of several sets; at 2:4; where there is something to compare."""
    head = ACCURACY.splitlines()[0] + ",seconds"
    rows = [
        f"2026-11-22,a chip,2.13,abc,m,{pattern},{count},{first},64,{method},1.0,0.8,,,{seconds}"
        for pattern, count, first, method, seconds in (
            ("2:4", 128, 0, "sparsegpt", 4), ("2:4", 128, 99, "sparsegpt", 2),
            ("2:4", 128, 0, "alps", 5), ("4:8", 128, 0, "alps", 1), ("2:4", 32, 0, "alps", 1),
        )
    ]  # fmt: skip
    (tmp_path / "accuracy_2026-11-22_x.csv").write_text("\n".join([head, *rows]) + "\n")
    encoder = (
        "date,device,pattern,calibration_sentences,method,seconds\n2026-11-22,chip,2:4,9,alps,3"
    )
    (tmp_path / "encoder-accuracy_2026-11-22_x.csv").write_text(encoder + "\n")
    gpu = [
        f"2026-11-22,gpu,2.13,abc,2,big,32,128,2048,{streamed},{method},{seconds},20.0"
        for streamed, method, seconds in (
            (False, "sparsegpt", 10), (False, "alps", 44), (True, "sparsegpt", 1),
        )
    ]  # fmt: skip
    (tmp_path / "cost_2026-11-22_x.csv").write_text("\n".join([COST, *gpu]) + "\n")
    lines = tables.TABLES["seconds"](tmp_path).splitlines()
    assert lines[2] == "| m, 128 rows | a chip | 2 s, 1.0 | - | 5 s, 2.5 | - | - |"
    told = "| big, 32 blocks, 128 rows of 2,048 tokens | gpu | 10 s, 1.0 | - | 44 s, 4.4 | - | - |"
    assert lines[3] == told and lines[4] == ""


def test_the_cost_table_has_the_last_row_of_each_case(tmp_path: Path) -> None:
    head = "date,device,torch,commit,model,blocks,rows,length,streamed,method,seconds,peak_gib"
    for day, rows in ((22, "8,128,64,False,alps,99,2.5"), (23, "8,128,64,False,alps,70.25,3")):
        row = f"2026-11-{day},a chip,2.13,abc{day},m,{rows}"
        streamed = f"2026-11-{day},a chip,2.13,abc{day},m,8,128,64,True,alps,80,1"
        (tmp_path / f"cost_2026-11-{day}_x.csv").write_text(f"{head}\n{row}\n{streamed}\n")
    lines = tables.TABLES["cost"](tmp_path).splitlines()
    assert lines[2:4] == [
        "| m | 8 | alps | 70.2 | 3.0 |",
        "| m | 8 | alps, streamed | 80.0 | 1.0 |",
    ]
    assert "on 128 x 64 random tokens" in lines[5] and "abc22" not in lines[5]


def test_the_latest_rows_are_used(tmp_path: Path) -> None:
    rows_file(tmp_path, "linear_2026-11-23_x_abc.csv", {("new", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("old", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "front_2026-11-24_x_abc.csv", {("other", 1): ("2.0", "2.0")})
    rows_file(tmp_path, "linear_2026-11-23_y_abc.csv", {("other chip", 1): ("2.0", "2.0")})
    found = [{row["candidate"] for row in rows} for rows in tables.newest(tmp_path, "linear")]
    denses = {"dense", "dense prepacked"}
    assert found == [denses | {"new"}, denses | {"other chip"}]
    assert tables.linear_cpu_all(tmp_path).count("| layer |") == 2
    with pytest.raises(ValueError, match="tables need rows of train, got none"):
        tables.newest(tmp_path, "train")


def test_a_stale_file_is_found_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(tmp_path, "linear_2026-11-22_x_abc.csv", {("b cpu", 1): ("2.0", "1.5")})
    page, plain = tmp_path / "page.md", tmp_path / "plain.md"
    page.write_text("before\n<!-- bench:linear-cpu-all -->\nold\n<!-- /bench -->\nafter\n")
    plain.write_text("no table here\n")
    arguments = ["--results", str(tmp_path), str(page), str(plain)]
    assert tables.main(["--check", *arguments]) == 1
    assert capsys.readouterr().out == f"{page}: stale, run python -m bench.tables\n"
    assert "\nold\n" in page.read_text()
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert (
        text.startswith("before\n<!-- bench:linear-cpu-all -->\n\n| layer |")
        and "\nold\n" not in text
    )
    assert text.endswith("\n<!-- /bench -->\nafter\n") and "**2.00 / 1.50**" in text
    assert tables.main(["--check", *arguments]) == 0


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table is named 'no-such': tables are accuracy-all"):
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


def test_decode_takes_models_and_single_layers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = decode.parsed(["--shapes", "llama-3-8b", "Qwen2.5-7B o", "--tokens", "1", "16"])
    short = ("qkv", "o", "gate_up", "down")
    assert arguments.layers == [*(f"Llama-3-8B {name}" for name in short), "Qwen2.5-7B o"]
    assert arguments.tokens == [1, 16] and arguments.device == "cuda" and not arguments.plain
    assert SHAPES["Llama-3-8B gate_up"] == (28672, 4096)
    assert len(decode.parsed(["--shapes", "llama-3-70b", "qwen2.5-7b"]).layers) == 8
    with pytest.raises(SystemExit):
        decode.parsed(["--shapes", "llama-4"])
    assert (
        "shapes are llama-3-8b, llama-3-70b, qwen2.5-7b, sam-vit-h or the"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("nbytes", "memory", "copies", "launches"),
    [
        (6_553_600, 10**12, 199, 199),  # o in int4: many small copies
        (45_875_200, 10**12, 29, 232),
        (234_881_024, 10**12, 6, 54),  # dense gate_up: 3 ms
        (939_524_096, 10**12, 2, 14),
        (939_524_096, 10**9, 1, 14),  # there is room for no other
        (939_524_096, 0, 1, 14),
        (25_600, 10**12, 260, 260),
    ],
)
def test_copies_are_cold_and_launches_whole_rotations(
    nbytes: int, memory: int, copies: int, launches: int
) -> None:
    assert cold.copies_for(nbytes, memory) == copies
    assert cold.launches_for(nbytes, 1, copies) == launches and launches % copies == 0


def test_chains_of_many_tokens_are_one_rotation() -> None:
    gate_up = 2 * 28672 * 4096
    assert cold.launches_for(gate_up, 16 * gate_up, 6) == 54
    assert cold.launches_for(gate_up, 1024 * gate_up, 6) == 12
    assert cold.launches_for(gate_up, 16384 * gate_up, 6) == 6


def test_chains_take_turns_and_rotate_over_their_copies() -> None:
    called: list[str] = []

    def run_of(name: str) -> cold.Run:
        return lambda x: (called.append(name), x)[1]

    x = torch.ones(1)
    chains = {
        "a": cold.chain([run_of("a0"), run_of("a1")], x, 4),
        "b": cold.chain([run_of("b")], x, 1),
    }
    called.clear()
    timings = cold.in_turns(chains, torch.device("cpu"), rounds=3)
    warm_up = 2
    words = " ".join(called).replace("a0 a1 a0 a1", "a").split()
    rounds = [words[at : at + 2] for at in range(0, len(words), 2)]
    assert len(rounds) == warm_up + 3 and all(sorted(turns) == ["a", "b"] for turns in rounds)
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert cold.in_turns({}, torch.device("cpu")) == {}


def test_random_weights_keep_two_of_four() -> None:
    dense, sparse = cold.random_weights((32, 64), torch.device("cpu"))
    kept = sparse != 0
    assert (dense != 0).all() and torch.equal(sparse, dense * kept)
    assert not sparse[~kept].signbit().any()  # a compressor may take -0.0 for a number
    assert (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
    patterns = {tuple(group) for group in kept.view(-1, 4).tolist()}
    assert len(patterns) == 6 and dense.dtype == torch.bfloat16


def test_the_int4_peer_is_packed_as_torch_does() -> None:
    weight = cold.random_weights((16, 256), torch.device("cpu"))[0]
    codes, scales = peers.quantised(weight)
    assert codes.dtype == torch.uint8 and (codes >= 1).all() and (codes <= 15).all()
    assert scales.shape == (16, 2) and scales.dtype == torch.bfloat16
    exact = peers.dequantised(codes, scales)
    assert cold.error(exact, weight.double()) < 0.15
    assert torch.equal(exact[3, 128:], (codes[3, 128:].float() - 8) * scales[3, 1].float())
    bytes_ = peers.joined(codes)
    assert bytes_.shape == (16, 128) and bytes_.dtype == torch.uint8
    assert int(bytes_[2, 5]) == 16 * int(codes[2, 10]) + int(codes[2, 11])
    table = peers.scales_and_zeros(scales)
    assert table.shape == (2, 16, 2) and table.is_contiguous()
    assert torch.equal(table[1, :, 0], scales[:, 1]) and (table[..., 1] == 0).all()


def test_a_search_is_described_in_a_row() -> None:
    dropped = {Setting(1): "wrong by 1.0e-01 where 7.8e-03 is allowed", Setting(7): "CUDA error"}
    found = Found(Setting(5, 8, 1), 1.0, dropped)
    assert peers.described(found) == "algorithm 5 split_k 8 mode 1; 1 setting wrong, 1 refused"
    plain = Found(Setting(2), 1.0, {})
    assert peers.described(plain) == "algorithm 2; 0 settings wrong, 0 refused"


def test_sparse_marlin_says_what_it_lacks(tmp_path: Path) -> None:
    weight, x = torch.ones(4, 4), torch.ones(1, 4)
    with pytest.raises(ValueError, match="Sparse-Marlin needs a GPU"):
        peers.sparse_marlin(weight, x, tmp_path / "lib.so")
    with pytest.raises(ValueError, match=r"packer.py is no Python file: it has to lie beside"):
        peers._module(tmp_path / "packer.py")


def test_plain_launches_are_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[str | None] = []
    launches = SimpleNamespace(cache_clear=lambda: cleared.append(os.environ.get("X")))
    monkeypatch.setattr(decode, "DEPENDENT", "X")
    monkeypatch.setitem(sys.modules, decode.LAUNCHES, SimpleNamespace(_launch=launches))
    monkeypatch.delenv("X", raising=False)
    with decode.plainly():
        assert os.environ["X"] == "0"
    assert cleared == ["0", None]
    monkeypatch.setenv("X", "1")
    with decode.plainly():
        assert os.environ["X"] == "0"
    assert os.environ["X"] == "1" and cleared == ["0", None, "0", "1"]


def test_decode_writes_a_row_for_everyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)
    words = "--device cpu --shapes Tiny --tokens 1 3 --formats semi24 semi25 --plain --rounds 2"
    where = ["--output", str(tmp_path), "--peers", str(tmp_path / "lib.so")]
    assert decode.main([*words.split(), *where]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path.name.startswith("decode_")
    rows = tables._read(path)
    measured = [row for row in rows if row["us"]]
    names = ["cublas bf16", "cublas fp16", "semi24 reference", "semi24 reference plain"]
    assert [(r["candidate"], r["tokens"]) for r in measured] == [
        (name, tokens) for tokens in "13" for name in names
    ]
    for row in measured:
        dense = next(d for d in measured if d["tokens"] == row["tokens"])
        assert float(row["error"]) < 3e-3 and row["copies"] == row["launches"] == "4"
        assert row["dtype"] == ("float16" if "fp16" in row["candidate"] else "bfloat16")
        if row["baseline"] == "cublas bf16":
            assert float(row["vs_cublas"]) == pytest.approx(
                float(dense["us"]) / float(row["us"]), abs=0.002
            )
    notes = {row["candidate"]: row["note"] for row in rows if not row["us"]}
    assert notes["semi25"].startswith("unknown format 'semi25': did you mean 'semi24'?")
    assert notes["sparse-marlin int4"] == "Sparse-Marlin needs a GPU"
    assert {"cusparselt searched", "tinygemm int4"} < set(notes)
    assert len(rows) == 2 * (4 + 4)


def test_decode_stops_at_its_time_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)
    clock = iter([0.0, 1.0, 2.0, 9.0])  # the start, before a case, after it, before the next
    monkeypatch.setattr(cold, "monotonic", lambda: next(clock))
    words = "--device cpu --shapes Tiny --tokens 1 3 --formats --rounds 2 --time-budget 5"
    assert decode.main([*words.split(), "--output", str(tmp_path)]) == 1
    *_, left, path = capsys.readouterr().out.splitlines()
    assert left == "out of time, left out: Tiny o, 3 tokens"
    assert {row["tokens"] for row in tables._read(Path(path))} == {"1"}


def test_wrong_results_are_rows_without_a_time() -> None:
    x = torch.ones(16, 2)
    calls: list[int] = []

    def later_wrong(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.clone() if len(calls) == 1 else x * torch.nan

    def candidate(name: str, run: cold.Run) -> cold.Candidate:
        return cold.Candidate(name, 10**9, lambda: run, x, Tensor.double, "right", rows=8, most=16)

    everyone = {"right": torch.clone, "wrong": torch.zeros_like, "later": later_wrong}
    ready = [(candidate(name, run), [run]) for name, run in everyone.items()]
    layer = cold.Layer("a layer", (2, 2), ready, {"absent": "not here"})
    rows = {
        str(row["candidate"]): row for row in cold.case(layer, 3, torch.device("cpu"), rounds=2)
    }
    assert rows["right"]["us"] and rows["right"]["note"] == "8 rows" and set(calls) == {8}
    notes = {name: row["note"] for name, row in rows.items() if not row["us"]}
    assert notes == {
        "wrong": "wrong result: relative error 1.0e+00",
        "later": "wrong result in a chain of launches: relative error nan",
        "absent": "not here",
    }
    assert len({tuple(row) for row in rows.values()}) == 1  # the same columns
    too_many = list(cold.case(layer, 17, torch.device("cpu"), rounds=2))
    assert [row["note"] for row in too_many[1:]] == ["takes at most 16 tokens"] * 3


DECODE = """\
date,device,driver,torch,commit,layer,tokens,candidate,us,low_us,high_us,tb_s,baseline,vs_cublas,note
2026-11-22,a chip,580,2.11,abc,q,1,cublas bf16,15.52,15.4,15.6,3.2,cublas bf16,1.000,
2026-11-22,a chip,580,2.11,abc,q,1,cublas fp16,15.0,15,15,3.2,cublas fp16,1.000,
2026-11-22,a chip,580,2.11,abc,q,1,semi24,6.8,6.7,7.1,4.16,cublas bf16,2.412,
2026-11-22,a chip,580,2.11,abc,q,1,sparse-marlin int4,,,,,,,no library
2026-11-22,a chip,580,2.11,abc,q,64,cublas bf16,17,17,17,2.9,cublas bf16,1.000,
2026-11-22,a chip,580,2.11,abc,q,64,semi24,34,34,34,0.8,cublas bf16,0.500,
2026-11-22,a chip,580,2.11,abc,q,64,sparse-marlin int4,,,,,,,no library
2026-11-22,a chip,580,2.11,abc,q,64,cusparselt searched,20,20,20,1,cublas bf16,0.850,
2026-11-22,a chip,580,2.11,abc,q,64,cusparselt alg 0,68,68,68,1,cublas bf16,0.250,
2026-11-22,a chip,580,2.11,abc,q,64,semi24 plain,40,40,40,0.7,cublas bf16,0.425,
2026-11-22,a chip,580,2.11,abc,o,1,cublas bf16,12,12,12,2.7,cublas bf16,1.000,
2026-11-22,a chip,580,2.11,abc,o,1,semi24_int4,3,3,3,2.2,cublas bf16,4.000,
"""


def test_the_decode_table_shows_losers_and_gaps(tmp_path: Path) -> None:
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(DECODE)
    lines = tables.decode(tmp_path).splitlines()
    assert lines[0] == (
        "| layer | tokens | cublas bf16 | semi24 | sparse-marlin int4 | cusparselt searched "
        "| cusparselt alg 0 | semi24 plain | semi24_int4 |"
    )
    assert lines[2] == "| q | 1 | 15.5, 3.2 | 6.8, **2.41**, 4.2 | - | - | - | - | - |"
    assert lines[3] == (
        "| q | 64 | 17.0, 2.9 | 34.0, 0.50, 0.8 | - | 20.0, 0.85, 1.0 | 68.0, 0.25, 1.0 "
        "| 40.0, 0.42, 0.7 | - |"
    )
    assert lines[4] == "| o | 1 | 12.0, 2.7 | - | - | - | - | - | 3.0, **4.00**, 2.2 |"
    assert "a chip, driver 580, torch 2.11, 2026-11-22, commit abc" in lines[6]
    assert lines[6].endswith("quartiles at most 6% of the median apart.")
    assert lines[7] == "Without a figure: sparse-marlin int4: no library."


def test_the_short_decode_table_has_a_row_for_each_format(tmp_path: Path) -> None:
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(DECODE)
    lines = tables.decode_short(tmp_path).splitlines()
    assert lines[0] == "| layer | format | 1 token | 64 tokens |"
    assert lines[2:7] == [
        "| q | semi24 | **2.41** | 0.50 |",
        "| q | best other kernel | - | 0.85 |",
        "| o | semi24_int4 | **4.00** | - |",
        "| o | best other kernel | - | - |",
        "",
    ]
    assert {"decode", "decode-short"} < set(tables.TABLES)


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("print('1980, 45, 512.3')", ["1980", "45", "512.3"]),
        ("print('no device')", ["", "", ""]),
        ("import time; time.sleep(60)", ["", "", ""]),
    ],
)
def test_clocks_are_read_if_they_come_soon(
    code: str, values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "PATIENCE", 0.1 if "sleep" in code else 60)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert list(cold.clocks_answered(process).values()) == values
    assert list(cold.clocks_answered(None)) == ["sm_mhz", "celsius", "watts"]


@pytest.mark.parametrize("biased", [False, True])
def test_both_cusparselt_candidates_share_copies_and_a_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, biased: bool
) -> None:
    us = {Setting(0): 3.0, Setting(1): 1.0, Setting(2): 2.0}
    fake = install(monkeypatch, tmp_path, Fake(us, wrong={Setting(1)}))
    _, sparse = cold.random_weights((16, 32), torch.device("cpu"))
    bias = torch.ones(16).bfloat16() if biased else None
    shipped, searched = peers.cusparselt(sparse, torch.randn(32, 32).bfloat16(), bias)
    assert shipped.make is searched.make and searched.rows == 16
    runs = [searched.make()]
    first = cold.prepared(searched, runs, 3)
    # refused: four algorithms that are not there, and each of two with its sums split in six ways
    assert first.note == "16 rows; algorithm 2; 1 setting wrong, 16 refused" and first.error < 0.01
    assert (fake.biases[-1] is not None) == biased and fake.seen[-1] == Setting(2)
    count = len(fake.seen)
    cold.prepared(searched, runs, 8)  # again 16 rows: nothing is searched
    assert fake.seen[count:] == [Setting(2)] * 2  # the check alone and the chain's first
    cold.prepared(shipped, runs, 3)
    assert set(fake.seen[count + 2 :]) == {Setting(0)}
    assert not list(tmp_path.iterdir())  # a peer leaves nothing behind
    forget()


CUT_ROWS = """\
date,device,driver,torch,kernel_sha256,ptx_sha256,call,layer,shape,format,tokens,cut,us,\
dense_tokens,dense_cublas_bf16_us
2026-11-22,GPU,1,2.11,abc,def,tune,a,16x64,semi24,1,"1,1",4.0,2,8.0
2026-11-22,GPU,1,2.11,abc,def,tune,a,16x64,semi24,1,"2,1",5.0,2,8.0
2026-11-22,GPU,1,2.11,abc,def,tune,a,16x64,semi24,64,"1,1",20.0,64,10.0
2026-11-22,GPU,1,2.11,abc,def,tune,a,16x64,semi24_fp8,64,"1,1",5.0,64,10.0
"""


def test_a_table_of_cuts_shows_the_fastest_and_the_losing_ones_too(tmp_path: Path) -> None:
    (tmp_path / "cuts_2026-11-22_gpu_abc.csv").write_text(CUT_ROWS)
    lines = tables.cuts(tmp_path).splitlines()
    assert lines[2] == "| a | semi24 | 4.0, **2.00** | 20.0, 0.50 |"
    assert lines[3] == "| a | semi24_fp8 | - | 5.0, **2.00** |"
    assert "kernel.cu abc" in lines[-1]
    assert "semi24_fp8" not in tables.cuts_short(tmp_path)


def test_the_cost_models_fit_finds_the_coefficients_it_was_made_with() -> None:
    from bench.cuts import excess, fit
    from secateur.formats.kernels.decode24 import Kind
    from secateur.formats.kernels.decode24.config import Case
    from secateur.formats.kernels.decode24.cuts import cuts
    from secateur.formats.kernels.decode24.rule import COSTS, quantities

    made = []
    for columns in (2048, 4096):
        case = Case(Kind.INT4, True, torch.bfloat16, 4096, columns, 16)
        for cut in cuts(case, {1: 132, 2: 66, 4: 30, 8: 15}, True):
            us = sum(c * q for c, q in zip(COSTS[16], quantities(case, cut), strict=True))
            made.append((case, cut, us))
    found = fit(made)
    assert max(excess(made, found)) == pytest.approx(1, abs=1e-3)
    for case, cut, us in made[::50]:
        again = sum(c * q for c, q in zip(found, quantities(case, cut), strict=True))
        assert again == pytest.approx(us, rel=0.02)


def test_grids_lose_less_with_searched_scales(tmp_path: Path) -> None:
    from bench import grids

    grids.main(["--output", str(tmp_path)])
    (path,) = tmp_path.glob("grids_*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["weights"], r["grid"], r["scales"]): float(r["error"]) for r in rows}
    assert len(found) == 16
    for (name, grid, way), lost in found.items():
        if way == "searched":
            assert lost <= found[name, grid, "largest"]
    assert 0.08 < found["normal", "Int4()", "searched"] < 0.083
    assert "| `Int8()` | 0.0066 | 0.0066 |" in tables.grids(tmp_path)
