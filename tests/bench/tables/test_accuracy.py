"""The tables of accuracy: each case of its last run, with the range over calibration sets."""

from pathlib import Path

from bench.lib import results
from bench.tables.accuracy import latest
from bench.tables.pages import TABLES

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
    whole = TABLES["accuracy-all"](tmp_path)
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
    whole = TABLES["accuracy-all"](tmp_path)
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
    short = TABLES["accuracy-short"](tmp_path)
    assert "| thorough | 4.06 (80%; 0.20, 0.20 to 0.20; 0.18, 0.10 to 0.25) |" in short
    assert "alps" not in short  # the README has a few methods
    assert "(mean of 2 sets) and 64 validation rows, the former of 58 documents; a c" in short
    assert WANDA not in short and WANDA in TABLES["accuracy-all"](tmp_path)
    assert TABLES["accuracy-all"](tmp_path).count("| perplexity") == 3


def test_r_s_flatters_in_all_rows_that_there_are() -> None:
    """What README and the guide say of the two shares, held to the rows themselves."""
    avoided = [
        (float(row["r_s"]), float(row["r_kl"]))
        for rows in latest(results.RESULTS).values()
        for row in rows
        if row["r_s"] and row["r_kl"] and row["method"] != "dense"
    ]
    assert len(avoided) > 50
    assert all(r_kl < r_s for r_s, r_kl in avoided if r_s > 0.01)


ROWS = """\
date,device,torch,commit,model,pattern,calibration_rows,first_row,validation_rows,method,nll,top1,library,note
2026-11-22,a chip,2.13,abc,m,2:4,32,0,64,dense,1.0,,,
2026-11-22,a chip,2.13,abc,m,2:4,32,0,64,theirs,2.0,0.7,other 1.2,
2026-11-22,a chip,2.13,abc,m,4:8,32,0,64,theirs,1.5,0.8,other 1.2,2 layers break the plan
2026-11-22,a chip,2.13,abc,m,4:8,32,0,64,another,,,,it has no 4:8
"""


def test_the_table_names_versions_and_what_was_wrong(tmp_path: Path) -> None:
    (tmp_path / "accuracy_2026-11-22_x_abc.csv").write_text(ROWS)
    lines = TABLES["accuracy-all"](tmp_path).splitlines()
    assert lines[2:4] == ["| dense | 2.72 | - |", "| theirs | 7.39 (70%) | 4.48 (80%) |"]
    assert lines[6:] == [
        "Other libraries: other 1.2.",
        "Notes: theirs, 4:8: 2 layers break the plan; another, 4:8: it has no 4:8.",
    ]
