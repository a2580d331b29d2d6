"""The tables of many tokens show losers, gaps and the choice."""

from pathlib import Path

from bench.tables.pages import TABLES
from bench.tables.prefill import NO_LOSS
from secateur.accelerate import decision

PREFILL = """\
date,device,driver,torch,commit,command,layer,tokens,candidate,us,low_us,high_us,baseline,vs_cublas,note
2026-11-22,GPU,580,2.11,abc,cmd,q,128,cublas bf16,20,20,21,cublas bf16,1.000,
2026-11-22,GPU,580,2.11,abc,cmd,q,128,cusparselt alg 0,40,40,40,cublas bf16,0.500,
2026-11-22,GPU,580,2.11,abc,cmd,q,128,accelerate_,21.05,21,21.1,cublas bf16,0.950,runs dense: so
2026-11-22,GPU,580,2.11,abc,cmd,q,128,semi24 decode,,,,,,takes at most 64 tokens
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,cublas bf16,600,600,600,cublas bf16,1.000,
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,accelerate_,400,400,400,cublas bf16,1.500,runs cusparselt
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,semi24 decode,,,,,,takes at most 64 tokens
"""


def test_the_table_shows_losers_gaps_and_the_choice(tmp_path: Path) -> None:
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    lines = TABLES["prefill"](tmp_path).splitlines()
    assert lines[0] == (
        "| layer | tokens | cublas bf16 | cusparselt alg 0 | accelerate_ | semi24 decode |"
    )
    assert lines[2] == "| q | 128 | 20.0 | 40.0, 0.50 | 21.1, 0.95 (dense) | - |"
    assert lines[3] == "| q | 4096 | 600.0 | - | 400.0, **1.50** (cusparselt) | - |"
    assert "GPU, driver 580, torch 2.11, 2026-11-22, commit abc, `cmd`;" in lines[5]
    assert "quartiles at most 5% of the median apart." in lines[5]
    assert lines[5].endswith("is more than 3% slower than dense in 1 of 2 cases: q at 128 (0.95).")
    assert lines[6] == "Without a figure, for instance: semi24 decode: takes at most 64 tokens."
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL.replace("0.950", "0.971"))
    assert "than dense in 0 of 2 cases." in TABLES["prefill-short"](tmp_path)
    assert NO_LOSS == decision.NO_LOSS


def test_each_case_is_shown_from_its_last_run(tmp_path: Path) -> None:
    """The later run had no 4096 tokens; the origin names both."""
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    later = [line for line in PREFILL.splitlines() if ",4096," not in line]
    text = "\n".join(later).replace("2026-11-22", "2026-11-23").replace("abc", "def")
    (tmp_path / "prefill_2026-11-23_x_def.csv").write_text(text.replace("40,", "30,"))
    lines = TABLES["prefill"](tmp_path).splitlines()
    assert lines[2].startswith("| q | 128 | 20.0 | 30.0,")
    assert lines[3].startswith("| q | 4096 | 600.0 |")
    assert "2026-11-23, commit def, `cmd`; 2026-11-22, commit abc, `cmd`; quartiles" in lines[5]


def test_the_short_table_has_a_column_for_each_number_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    lines = TABLES["prefill-short"](tmp_path).splitlines()
    assert lines[0] == "| layer | runs | 128 tokens | 4096 tokens |"
    assert lines[2:5] == [
        "| q | cusparselt alg 0 | 0.50 | - |",
        "| q | accelerate_ | 0.95 | **1.50** |",
        "",
    ]
