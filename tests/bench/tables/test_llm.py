"""The table of tokens a second: ratios are to dense of the same case, and losing rows stay."""

from pathlib import Path

from bench.tables.llm import llm, llm_cpu, llm_short

HEADS = (
    "date,device,driver,torch,commit,format,head,model,blocks,batch,prompt,tokens,"
    "ms,tokens_s,first_ms,allocated,peak,note"
)
CASE = "l,32,1,1024,128"
ROWS = [
    f"dense,dense,{CASE},5.0,200.0,40.1,16000000000,17000000000,",
    f"semi24,dense,{CASE},10.0,100.0,50.0,9000000000,9500000000,",
    f"semi24_int4,semi24_int4,{CASE},1.25,800.0,60.0,4200000000,4460000000,",
    f"semi24_fp8,dense,{CASE},,,,,,RuntimeError: no room",
    "dense,dense,l,32,8,1024,128,8.0,1000.0,90.0,,,",
]


def lines_of(folder: Path, rows: list[str]) -> list[str]:
    lines = [HEADS, *(f"2026-11-30,a chip,580,2.11,abc,{row}" for row in rows)]
    (folder / "llm_2026-11-30_x_abc.csv").write_text("\n".join(lines) + "\n")
    return llm(folder).splitlines()


def test_ratios_are_to_dense_of_the_same_case(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, ROWS)
    assert lines[2:5] == [
        "| 2:4, bf16 | bf16 | its own | 100 | 0.50 | 50.0 | 9.00 | 9.50 |",
        "| bf16 | bf16 | its own | 200 | 1.00 | 40.1 | 16.00 | 17.00 |",
        "| 2:4, int4 | 2:4, int4 | its own | 800 | **4.00** | 60.0 | 4.20 | 4.46 |",
    ]
    assert "batch 1, 128 tokens after a prompt of 1,024" in lines[6]
    assert "speed alone" in lines[6] and "2026-11-30, commit abc" in lines[6]
    assert lines[7] == "Without a figure: semi24_fp8 by steps: RuntimeError: no room."
    assert "| bf16 | bf16 | its own | 1,000 | 1.00 | 90.0 | - | - |" in lines


def test_a_later_run_replaces_its_own_rows(tmp_path: Path) -> None:
    lines_of(tmp_path, ROWS)
    later = HEADS + "\n2026-12-01,a chip,580,2.11,def," + ROWS[2].replace("1.25", "1.0")
    (tmp_path / "llm_2026-12-01_x_def.csv").write_text(later + "\n")
    lines = llm(tmp_path).splitlines()
    assert lines[4] == "| 2:4, int4 | 2:4, int4 | its own | 800 | **5.00** | 60.0 | 4.20 | 4.46 |"
    assert "2026-11-30, commit abc; 2026-12-01, commit def" in lines[6]


def test_each_loop_is_compared_with_dense_in_the_same_loop(tmp_path: Path) -> None:
    rows = [f"{row},{loop}" for loop in ("steps", "generate") for row in ROWS[:2]]
    rows[2] = rows[2].replace("5.0,200.0", "20.0,50.0")
    lines = ["loop".join([HEADS + ",", ""]), *(f"2026-11-30,a chip,580,2.11,abc,{r}" for r in rows)]
    (tmp_path / "llm_2026-11-30_x_abc.csv").write_text("\n".join(lines) + "\n")
    found = [line.split(" | ")[2:5] for line in llm(tmp_path).splitlines()[2:6]]
    stock = "transformers' `generate`, static cache, compiled"
    assert sorted(found) == sorted(
        [[stock, "50", "1.00"], [stock, "100", "**2.00**"],
         ["its own", "100", "0.50"], ["its own", "200", "1.00"]]
    )  # fmt: skip


def test_the_short_table_has_the_fastest_of_each_format(tmp_path: Path) -> None:
    slower = ROWS[2].replace("semi24_int4,semi24_int4", "semi24_int4,dense").replace("800", "700")
    rows = [f"{row},{loop}" for row in [slower, *ROWS] for loop in ("custom_generate", "steps")]
    lines = [f"{HEADS},loop", *(f"2026-11-30,a chip,580,2.11,abc,{row}" for row in rows)]
    (tmp_path / "llm_2026-11-30_x_abc.csv").write_text("\n".join(lines) + "\n")
    found = [line.split(" | ")[:4] for line in llm_short(tmp_path).splitlines()[2:]]
    assert [row for row in found if len(row) > 1] == [
        ["| 2:4, bf16", "bf16", "its own", "100"],
        ["| bf16", "bf16", "its own", "200"],
        ["| 2:4, int4", "2:4, int4", "its own", "800"],
    ]


def test_a_cpu_has_a_table_of_its_own(tmp_path: Path) -> None:
    heads = HEADS.replace("commit", "commit,threads,dtype")
    row = f"2026-12-01,a processor,-,2.13,abc,2,float32,block:64x64,dense,{CASE},5.0,200.0,40.1,,,"
    (tmp_path / "llm_2026-12-01_y_abc.csv").write_text(f"{heads}\n{row}\n")
    lines_of(tmp_path, ROWS)
    assert "processor" not in llm(tmp_path) and "a chip" not in llm_cpu(tmp_path)
    lines = llm_cpu(tmp_path).splitlines()
    assert lines[2] == "| 80 % blocks, fp32 | fp32 | its own | 200 | - | 40.1 | - | - |"
    assert "Ratios are to fp32" in lines[4] and "a processor, 2 threads" in lines[4]
