"""The tables of blocks and of zeros anywhere: a line a candidate, a column a sparsity, gaps too."""

from pathlib import Path

from bench.tables.pages import TABLES

HEAD = (
    "date,device,driver,torch,commit,command,layer,tokens,candidate,us,low_us,high_us,baseline,"
    "vs_cublas,note"
)


def row(layer: str, tokens: int, name: str, ratio: str, note: str = "") -> str:
    us = "100,99,101,cublas bf16" if ratio else ",,,"
    return f"2026-12-01,GPU,580,2.11,abc,cmd,{layer},{tokens},{name},{us},{ratio},{note}"


def test_lines_are_candidates_and_columns_sparsities(tmp_path: Path) -> None:
    rows = [
        row(f"down block:64x64@{sparsity}", 4096, name, ratio)
        for sparsity, dense, ours in (("0.5", "1.000", "0.950"), ("0.8", "1.000", "2.500"))
        for name, ratio in (("cublas bf16", dense), ("block prefill", ours))
    ]
    rows += [
        row("down block:64x64@0.8", 4096, "torch bsr", "", "no kernel"),
        row("down block:64x64@0.8", 1, "block decode", "4.000"),
        row("down block:64x64@0.8", 4096, "block decode", "", "takes at most 64 tokens"),
        row("down bitmap@0.5", 1, "bitmap decode", "1.500"),
    ]
    (tmp_path / "blocks_2026-12-01_x_abc.csv").write_text("\n".join([HEAD, *rows]))
    lines = TABLES["blocks"](tmp_path).splitlines()
    assert lines[0] == "| layer | format | tokens | runs | 50% zero | 80% zero |"
    assert lines[2:5] == [
        "| down | block:64x64 | 4096 | block prefill | 0.95 | **2.50** |",
        "| down | block:64x64 | 1 | block decode | - | **4.00** |",
        "",
    ]
    assert "GPU, driver 580, torch 2.11, 2026-12-01, commit abc, `cmd`; quartiles" in lines[5]
    assert lines[6] == "Without a figure: torch bsr: no kernel."
    assert TABLES["bitmap"](tmp_path).splitlines()[:3] == [
        "| layer | format | tokens | runs | 50% zero |",
        "| --- | --- | --- | --- | --- |",
        "| down | bitmap | 1 | bitmap decode | **1.50** |",
    ]
