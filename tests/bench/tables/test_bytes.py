"""The table of bits a weight: the dense grid that a sparse row has to beat stands beside it."""

from pathlib import Path

from bench.tables.pages import TABLES

HEADS = (
    "date,device,torch,commit,model,calibration_rows,seed,documents,validation_rows,batch,"
    "recipe,bits,dnll,kl,top1"
)
CASE = "2026-11-30,a chip,2.13,abc,lm,32,0,20,16,8"
ROWS = [
    '"2:4 int4, sparsegpt",3.125,0.3,0.4,0.75',
    '"dense int4, gptq",4.125,0.02,0.03,0.94',
    '"dense int3, gptq",3.125,0.06,0.08,0.88',
    '"dense int3, nearest",3.125,0.05,0.09,0.87',
    '"4:8 int4, sparsegpt",3.0,0.2,0.3,0.78',
]


def lines_of(folder: Path, name: str, rows: list[str]) -> list[str]:
    text = "\n".join([HEADS, *(f"{CASE},{row}" for row in rows)])
    (folder / f"bytes_{name}.csv").write_text(text + "\n")
    return TABLES["bytes"](folder).splitlines()


def test_the_dense_grid_of_no_more_bits_with_least_kl_is_named(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "2026-11-30_x_abc", ROWS)
    assert lines[2:7] == [
        "| dense int4, gptq | 4.125 | 0.020 | 0.030 | 94.0% |  |",
        "| dense int3, gptq | 3.125 | 0.060 | 0.080 | 88.0% |  |",
        "| dense int3, nearest | 3.125 | 0.050 | 0.090 | 87.0% |  |",
        "| 2:4 int4, sparsegpt | 3.125 | 0.300 | 0.400 | 75.0% | dense int3, gptq: 0.080 |",
        "| 4:8 int4, sparsegpt | 3.000 | 0.200 | 0.300 | 78.0% | none measured |",
    ]
    assert lines[8].startswith("lm, the linear layers of its blocks; 32 calibration rows of 20 doc")
    assert "16 validation rows; a chip" in lines[8] and "commit abc" in lines[8]


def test_rows_of_other_devices_and_batches_stand_beside_them_and_are_told(tmp_path: Path) -> None:
    lines_of(tmp_path, "2026-11-30_x_abc", ROWS)
    case = CASE.replace("a chip", "another").replace("16,8", "16,1")
    text = "\n".join([HEADS, f'{case},"2:4 int4, best",3.125,0.1,0.2,0.8'])
    (tmp_path / "bytes_2026-12-01_y_def.csv").write_text(text + "\n")
    lines = TABLES["bytes"](tmp_path).splitlines()
    assert "| 2:4 int4, best | 3.125 | 0.100 | 0.200 | 80.0% | dense int3, gptq: 0.080 |" in lines
    assert len(lines) == 10
    assert "20 documents, 8 a batch, 1 for 2:4 int4, best, 16 validation" in lines[9]
    assert "a chip, torch 2.13; another, torch 2.13, " in lines[9]


def test_rows_of_a_later_run_stand_for_their_recipes_alone(tmp_path: Path) -> None:
    lines_of(tmp_path, "2026-11-30_x_abc", ROWS)
    lines = lines_of(tmp_path, "2026-12-01_x_def", [ROWS[0].replace("0.4,", "0.07,")])
    assert "| 2:4 int4, sparsegpt | 3.125 | 0.300 | 0.070 |" in lines[3]
    assert len([line for line in lines if "sparsegpt" in line]) == 2


def test_texts_of_another_kind_have_columns_where_they_were_measured(tmp_path: Path) -> None:
    text = "\n".join([f"{HEADS},kl_prose", f"{CASE},{ROWS[0]},0.55", f"{CASE},{ROWS[2]},"])
    (tmp_path / "bytes_2026-12-01_x_abc.csv").write_text(text + "\n")
    lines = TABLES["bytes"](tmp_path).splitlines()
    assert "| top-1 as dense | KL on prose | least KL" in lines[0]
    assert "| 2:4 int4, sparsegpt | 3.125 | 0.300 | 0.400 | 75.0% | 0.550 | dense int3" in lines[3]
    assert "| dense int3, gptq | 3.125 | 0.060 | 0.080 | 88.0% | - |  |" in lines[2]
