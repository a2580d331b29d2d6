"""The README's tables are short, and keep what loses."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.tables.figure import BARS, DOTS, LABELS, front_page
from bench.tables.pages import FIGURES, ROOT, TABLES

SVG = "{http://www.w3.org/2000/svg}"
ACCURACY_HEAD = (
    "date,device,torch,commit,model,pattern,calibration_rows,first_row,validation_rows,method,"
    "nll,top1,r_s,kl"
)
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
    lines = TABLES["speed-short"](tmp_path).splitlines()
    assert lines[0] == "| times dense bf16 | 1 token | 16 tokens | 64 tokens | 4,096 tokens |"
    assert "| 2:4 | - | - | - | **1.46** |" in lines
    assert "| 2:4, int4 weights | **4.50** | - | - | - |" in lines
    assert "| 2:4, cuSPARSELt as torch calls it | 0.25 | - | - | 0.94 |" in lines
    assert lines[-1].startswith("Llama-3-8B gate_up, 8 x 4; ratio to dense cuBLAS")


def test_the_figure_shows_what_the_tables_show(tmp_path: Path) -> None:
    """A bar for each method, a dot for each speed, and losers left of the line of dense."""
    method = '"sparsegpt, algorithm 1 in float64"'
    accuracy = [ACCURACY_HEAD]
    for name, nll in (("dense", 1.0), ("magnitude", 2.0), (method, 1.5), ("blockwise(alps)", 1.4)):
        accuracy.append(f"2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,{name},{nll},0.8,,")
    accuracy.append("2026-11-22,a chip,2.13,abc,m,2:4,128,0,64,thorough,1.3,0.8,,")
    accuracy.append("2026-11-22,a chip,2.13,abc,m,4:8,128,0,64,thorough,1.2,0.8,,")
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text("\n".join(accuracy) + "\n")
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(FEW)
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(MANY)
    text = front_page(tmp_path)
    assert text == front_page(tmp_path)
    drawing = ElementTree.fromstring(text)
    bars = [float(bar.attrib["width"]) for bar in drawing.iter(f"{SVG}rect")]
    largest = BARS[1] - BARS[0]
    logs = (1.0, 2.0, 1.5, 1.4, 1.3)
    assert bars == [pytest.approx(largest * math.exp(nll - 2.0), abs=0.06) for nll in logs]
    (line,) = drawing.iter(f"{SVG}line")
    dots = [float(dot.attrib["cx"]) for dot in drawing.iter(f"{SVG}circle")]
    told = [dot.findtext(f"{SVG}title") for dot in drawing.iter(f"{SVG}circle")]
    assert told == ["4,096 tokens: 1.46", "1 token: 4.50", "1 token: 0.25", "4,096 tokens: 0.94"]
    dense = float(line.attrib["x1"])
    assert [dot > dense for dot in dots] == [True, True, False, False]


def test_the_figure_of_the_front_page_is_small_and_complete() -> None:
    path = ROOT / "docs" / "measured.svg"
    assert path in FIGURES
    assert path.stat().st_size < 100_000
    drawing = ElementTree.parse(path).getroot()
    width, height = map(float, drawing.attrib["viewBox"].split()[2:])
    assert len(list(drawing.iter(f"{SVG}rect"))) == len(LABELS)
    for dot in drawing.iter(f"{SVG}circle"):
        assert DOTS[0] <= float(dot.attrib["cx"]) <= DOTS[1] <= width
        assert float(dot.attrib["cy"]) < height


def test_the_readme_stays_short() -> None:
    """Someone reads it in two minutes; all figures are in the docs."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    heads = sum(line.startswith("| ---") for line in lines)
    assert len(lines) <= 120 and len(rows) - heads <= 12
