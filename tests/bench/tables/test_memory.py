"""The table of memory has shares of the dense row of the same model, and what failed."""

from pathlib import Path

from bench.tables.memory import memory

HEADS = (
    "date,device,torch,commit,model,blocks,configuration,verb,tokens,prompt,"
    "packed,file,held,allocated,peak,note"
)
ROWS = [
    "2,dense,pack,1 2048,2048,0,16000000000,16100000000,16200000000,17000000000,",
    "2,semi24,pack,1 2048,2048,14,10000000000,10100000000,10125000000,10200000000,",
    "1,semi24,pack,1 2048,2048,7,5000000000,5000000000,5000000000,5000000000,",
    "2,semi24_int4,accelerate,1 2048,2048,,,,,,MemoryError: no room",
]


def lines_of(folder: Path, rows: list[str]) -> list[str]:
    lines = [HEADS, *(f"2026-11-30,a chip,2.13,abc,l,{row}" for row in rows)]
    (folder / "memory_2026-11-30_x_abc.csv").write_text("\n".join(lines) + "\n")
    return memory(folder).splitlines()


def test_shares_are_of_the_dense_row_of_the_same_model(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, ROWS)
    heads = "| configuration | layers packed | file GB | held GB | allocated GB | to dense "
    assert lines[0] == f"{heads}| peak GB | to dense |"
    model, packed = "| l, 2 blocks, prompt of 2,048: ", "by `pack_`, 1 2048 tokens | "
    assert lines[2:5] == [
        f"{model}dense | 0 | 16.00 | 16.10 | 16.20 | 1.00 | 17.00 | 1.00 |",
        f"{model}semi24 {packed}14 | 10.00 | 10.10 | 10.12 | 0.62 | 10.20 | 0.60 |",
        f"{model.replace('2 b', '1 b')}semi24 {packed}7 | 5.00 | 5.00 | 5.00 | - | 5.00 | - |",
    ]
    assert "a chip, torch 2.13, 2026-11-30, commit abc, `python -m bench.run.memory`" in lines[6]
    failed = "l, 2 blocks, prompt of 2,048: semi24_int4 by `accelerate_`, 1 2048 tokens"
    assert lines[7] == f"Without a figure: {failed}: MemoryError: no room."


def test_a_cpu_has_no_figures_of_the_allocator(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, ["2,dense,pack,1 2048,2048,0,16000000000,16100000000,,,"])
    assert lines[2].endswith("dense | 0 | 16.00 | 16.10 | - | - | - | - |")
