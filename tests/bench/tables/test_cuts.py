"""The tables of cuts show the fastest."""

from pathlib import Path

from bench.tables.pages import TABLES

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
    lines = TABLES["cuts"](tmp_path).splitlines()
    assert lines[2] == "| a | semi24 | 4.0, **2.00** | 20.0, 0.50 |"
    assert lines[3] == "| a | semi24_fp8 | - | 5.0, **2.00** |"
    assert "kernel.cu abc" in lines[-1]
    assert "semi24_fp8" not in TABLES["cuts-short"](tmp_path)
