"""The tables of few tokens show losers and gaps."""

from pathlib import Path

from bench.tables.pages import TABLES

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
    lines = TABLES["decode"](tmp_path).splitlines()
    assert lines[0] == (
        "| layer | tokens | cublas bf16 | semi24_int4 | semi24 | sparse-marlin int4 "
        "| cusparselt searched | cusparselt alg 0 | semi24 plain |"
    )
    assert lines[2] == "| o | 1 | 12.0, 2.7 | 3.0, **4.00**, 2.2 | - | - | - | - | - |"
    assert lines[3] == "| q | 1 | 15.5, 3.2 | - | 6.8, **2.41**, 4.2 | - | - | - | - |"
    assert lines[4] == (
        "| q | 64 | 17.0, 2.9 | - | 34.0, 0.50, 0.8 | - | 20.0, 0.85, 1.0 | 68.0, 0.25, 1.0 "
        "| 40.0, 0.42, 0.7 |"
    )
    assert "a chip, driver 580, torch 2.11, 2026-11-22, commit abc" in lines[6]
    assert lines[6].endswith("quartiles at most 6% of the median apart.")
    assert lines[7] == "Without a figure: sparse-marlin int4: no library."


def test_the_short_decode_table_has_a_row_for_each_format(tmp_path: Path) -> None:
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(DECODE)
    lines = TABLES["decode-short"](tmp_path).splitlines()
    assert lines[0] == "| layer | format | 1 token | 64 tokens |"
    assert lines[2:7] == [
        "| o | semi24_int4 | **4.00** | - |",
        "| o | best other kernel | - | - |",
        "| q | semi24 | **2.41** | 0.50 |",
        "| q | best other kernel | - | 0.85 |",
        "",
    ]
    assert {"decode", "decode-short"} < set(TABLES)


def test_a_later_run_replaces_what_it_measured_alone(tmp_path: Path) -> None:
    (tmp_path / "decode_2026-11-22_x_abc.csv").write_text(DECODE)
    later = (
        "2026-11-23,a chip,580,2.11,abd,q,1,cublas bf16,15,15,15,3.2,cublas bf16,1.000,",
        "2026-11-23,a chip,580,2.11,abd,q,1,semi48,10,10,10,3.2,cublas bf16,1.500,",
    )
    (tmp_path / "decode_2026-11-23_x_abd.csv").write_text(
        "\n".join([DECODE.split("\n")[0], *later])
    )
    lines = TABLES["decode-short"](tmp_path).splitlines()
    assert lines[4:7] == [
        "| q | semi24 | **2.41** | 0.50 |",
        "| q | semi48 | **1.50** | - |",
        "| q | best other kernel | - | 0.85 |",
    ]
    assert "2026-11-22, commit abc; 2026-11-23, commit abd" in "".join(lines)
