"""The README's tables are short, and keep what loses."""

from pathlib import Path

from bench.tables.pages import ROOT, TABLES

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


def test_the_readme_stays_short() -> None:
    """Someone reads it in two minutes; all figures are in the docs."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    heads = sum(line.startswith("| ---") for line in lines)
    assert len(lines) <= 120 and len(rows) - heads <= 12
