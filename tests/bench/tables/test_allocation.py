"""The tables of allocations and budgets."""

from pathlib import Path

from bench.tables.pages import TABLES


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
    lines = TABLES["allocation"](tmp_path).splitlines()
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
    lines = TABLES["budget"](tmp_path).splitlines()
    assert lines[2] == "| 16 | 0.200 | 0.206 | +3.0% | 0.190 | 0.400 |"
    assert lines[4].startswith("12 linear layers of m with random weights in bfloat16, one after")
