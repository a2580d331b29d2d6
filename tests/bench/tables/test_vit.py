"""The tables of the image encoder keep what loses and what failed."""

from pathlib import Path

from bench.tables.pages import TABLES, render

VIT = """\
date,device,driver,torch,commit,model,configuration,batch,img_s,rounds,peak_mib,error,note
2026-11-22,a chip,1.2,2.13,abc,h,dense,1,20.0,20,3000,0.0,
2026-11-22,a chip,1.2,2.13,abc,h,2:4 mlp,1,25.0,20,2500,0.00123,
2026-11-22,a chip,1.2,2.13,abc,h,dense,32,40.0,20,9000,0.0,
2026-11-22,a chip,1.2,2.13,abc,h,2:4 mlp,32,38.0,20,9500,0.00123,
2026-11-22,a chip,1.2,2.13,abc,h,ours,32,,,,,RuntimeError: no room
"""


def test_the_encoder_table_keeps_what_loses_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "vit_2026-11-22_x_abc.csv").write_text(VIT)
    page = "<!-- bench:vit -->\n<!-- /bench -->"
    assert TABLES["vit"](tmp_path) in render(page, tmp_path)
    lines = TABLES["vit"](tmp_path).splitlines()
    heads = "| model | batch | configuration | img/s | to dense | peak MiB | error |"
    assert lines[0] == heads
    assert lines[2:7] == [
        "| h | 1 | dense | 20.00 | 1.00 | 3000 | 0.0000 |",
        "| h | 1 | 2:4 mlp | 25.00 | **1.25** | 2500 | 0.0012 |",
        "| h | 32 | dense | 40.00 | 1.00 | 9000 | 0.0000 |",
        "| h | 32 | 2:4 mlp | 38.00 | 0.95 | 9500 | 0.0012 |",
        "| h | 32 | ours | - | - | - | - |",
    ]
    assert "a chip, driver 1.2, torch 2.13, 2026-11-22, commit abc, `python -m b" in lines[8]
    assert lines[9] == "Without a figure: ours, batch 32: RuntimeError: no room."


def test_a_ratio_needs_a_dense_row(tmp_path: Path) -> None:
    kept = [line for line in VIT.splitlines() if ",dense,32," not in line]
    (tmp_path / "vit_2026-11-22_x_abc.csv").write_text("\n".join(kept) + "\n")
    assert "| h | 32 | 2:4 mlp | 38.00 | - | 9500 | 0.0012 |" in TABLES["vit"](tmp_path)


VISION = """\
date,device,torch,commit,configuration,recovery,seed,top1,left_out,hidden,layers
2026-11-22,a chip,2.13,abc,dense,none,0,0.9500,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,none,0,0.5000,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,reconstruct,0,0.9000,597,32,4
2026-11-22,a chip,2.13,abc,dense,none,1,0.9300,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,none,1,0.6000,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,reconstruct,1,0.9200,597,32,4
"""


def test_the_vision_table_has_the_mean_and_range_of_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "vision_2026-11-22_x_abc.csv").write_text(VISION)
    lines = TABLES["vision"](tmp_path).splitlines()
    assert lines[0] == "| top-1 | before recovery | reconstructed |"
    assert lines[2] == "| dense | 94.0% (93.0% to 95.0%) | - |"
    assert lines[3] == "| 2:4 mlp | 55.0% (50.0% to 60.0%) | 91.0% (90.0% to 92.0%) |"
    assert lines[5].startswith("Mean and range of 2 seeds, on 597 digits left out; a vision trans")
    assert "a chip, torch 2.13, 2026-11-22, commit abc, `python -m bench.vision`" in lines[5]
