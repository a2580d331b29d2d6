"""The tables of seconds and memory."""

from pathlib import Path

from bench.tables.pages import TABLES

COST = "date,device,torch,commit,threads,model,blocks,rows,length,streamed,method,seconds,peak_gib"


def test_what_was_announced_stands_beside_what_was_taken(tmp_path: Path) -> None:
    rows = [
        f"2026-11-{day},a chip,2.13,{day},2,tiny,2,128,64,False,best,{taken},,{said}"
        for day, taken, said in ((22, 9.0, 1.0), (23, 3.0, 2.0))
    ]
    rows.append("2026-11-23,a chip,2.13,23,2,tiny,2,128,64,False,alps,1.0,,")
    head = COST + ",announced"
    (tmp_path / "cost_2026-11-23_x.csv").write_text("\n".join([head, *rows]) + "\n")
    lines = TABLES["announced"](tmp_path).splitlines()
    assert lines[2] == "| tiny, 2 blocks, 128 x 64 tokens | best | 2.0 s | 3.0 s | 1.50 |"
    assert lines[4].endswith("2026-11-23, commit 23, 2 threads, `python -m bench.cost`.")
    assert len(lines) == 5


def test_the_seconds_of_methods_are_in_times_of_sparsegpts(tmp_path: Path) -> None:
    """The fastest of several sets; at 2:4; where there is something to compare."""
    head = (
        "date,device,torch,commit,model,pattern,calibration_rows,first_row,validation_rows,method,"
    )
    head += "nll,top1,r_s,kl,seconds"
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
    lines = TABLES["seconds"](tmp_path).splitlines()
    assert lines[2] == "| m, 128 rows | a chip | 2 s, 1.0 | - | 5 s, 2.5 | - | - |"
    told = "| big, 32 blocks, 128 rows of 2,048 tokens | gpu | 10 s, 1.0 | - | 44 s, 4.4 | - | - |"
    assert lines[3] == told and lines[4] == ""


def test_the_cost_table_has_the_last_row_of_each_case(tmp_path: Path) -> None:
    head = "date,device,torch,commit,model,blocks,rows,length,streamed,method,seconds,peak_gib"
    for day, rows in ((22, "8,128,64,False,alps,99,2.5"), (23, "8,128,64,False,alps,70.25,3")):
        row = f"2026-11-{day},a chip,2.13,abc{day},m,{rows}"
        streamed = f"2026-11-{day},a chip,2.13,abc{day},m,8,128,64,True,alps,80,1"
        (tmp_path / f"cost_2026-11-{day}_x.csv").write_text(f"{head}\n{row}\n{streamed}\n")
    lines = TABLES["cost"](tmp_path).splitlines()
    assert lines[2:4] == [
        "| m | 8 | alps | 70.2 | 3.0 |",
        "| m | 8 | alps, streamed | 80.0 | 1.0 |",
    ]
    assert "on 128 x 64 random tokens" in lines[5] and "abc22" not in lines[5]
