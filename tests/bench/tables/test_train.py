"""The tables of training: ratios beside dense microseconds, and packs beside a copy."""

from pathlib import Path

from bench.tables.pages import TABLES

HEAD = (
    "date,device,driver,torch,commit,command,layer,tokens,candidate,dtype,us,low_us,high_us,"
    "baseline,vs_cublas,note"
)
DENSE = "cublas bf16 forward + backward"


def row(layer: str, tokens: str, name: str, us: str, ratio: str, note: str = "") -> str:
    dtype = name.split()[-1] if not tokens else "bfloat16"
    times = f"{us},{us},{us}" if us else ",,"
    baseline = DENSE if tokens else f"copy {dtype}"
    origin = "2026-12-01,GPU,580,2.11,abc,cmd"
    return f"{origin},{layer},{tokens},{name},{dtype},{times},{baseline},{ratio},{note}"


def test_steps_and_packs(tmp_path: Path) -> None:
    rows = [
        row("up", "16384", DENSE, "8939.4", "1.000"),
        row("up", "16384", "2:4 rows forward + backward", "6800", "1.315"),
        row("up", "16384", "fp8 forward + backward", "", "", "no GPU"),
        row("up", "4096", DENSE, "2000", "1.000"),
        row("up", "4096", "2:4 rows forward + backward", "2100", "0.952"),
        row("64 x 128", "", "copy bfloat16", "18.448", "1.000"),
        row("64 x 128", "", "pack rows bfloat16", "29.97", "0.615"),
    ]
    (tmp_path / "train_2026-12-01_x_abc.csv").write_text("\n".join([HEAD, *rows]))
    lines = TABLES["train"](tmp_path).splitlines()
    assert lines[:4] == [
        "| layer | tokens | dense bf16, us | 2:4 rows | fp8 |",
        "| --- | --- | --- | --- | --- |",
        "| up | 16,384 | 8,939 | **1.31** | - |",
        "| up | 4,096 | 2,000 | 0.95 | - |",
    ]
    assert "GPU, torch 2.11, 2026-12-01, commit abc; quartiles" in lines[5]
    assert lines[6] == "Without a figure: fp8 forward + backward: no GPU."
    assert TABLES["train-packs"](tmp_path).splitlines()[:3] == [
        "| weight | stored as | copy | pack rows |",
        "| --- | --- | --- | --- |",
        "| 64 x 128 | bfloat16 | 18.4 | 30.0 |",
    ]
