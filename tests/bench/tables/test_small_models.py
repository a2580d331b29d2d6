"""The tables of two small models: means of seeds, and what was wrong."""

from pathlib import Path

from bench.tables.pages import TABLES

VISION = """\
date,device,torch,commit,pattern,seed,left_out,hidden,layers,method,top1,note,kl
2026-11-22,a chip,2.13,abc,2:4,0,597,32,4,dense,0.95,,0
2026-11-22,a chip,2.13,abc,2:4,1,597,32,4,dense,0.97,,0
2026-11-22,a chip,2.13,abc,4:8,0,597,32,4,theirs,,it takes no images,
2026-11-22,a chip,2.13,abc,4:8,0,597,32,4,alps,0.9,,0.25
"""


def test_the_vision_table_has_the_mean_and_range_of_its_seeds(tmp_path: Path) -> None:
    (tmp_path / "vision-accuracy_2026-11-22_x_abc.csv").write_text(VISION)
    lines = TABLES["vision-accuracy"](tmp_path).splitlines()
    assert lines[0] == "| top-1; KL to dense | 2:4 | 4:8 |"
    assert lines[2:4] == [
        "| dense | 96.0% (95.0% to 97.0%); 0.000 | - |",
        "| alps | - | 90.0%; 0.250 |",
    ]
    assert lines[5] == "Without a figure: theirs: it takes no images."
    assert lines[7].startswith("Mean and range of 2 seeds, on 597 digits left out; a vision")


def test_the_encoder_table_has_a_cosine(tmp_path: Path) -> None:
    head = "date,device,torch,commit,pattern,calibration_sentences,test_sentences,method,cosine"
    head += ",library"
    row = "2026-11-22,a chip,2.13,abc,2:4,256,200,alps,0.8765,lib 1.2"
    (tmp_path / "encoder-accuracy_2026-11-22_x_abc.csv").write_text(f"{head}\n{row}\n")
    lines = TABLES["encoder-accuracy"](tmp_path).splitlines()
    assert lines[0] == "| mean cosine to dense | 2:4 |" and lines[2] == "| alps | 0.876 |"
    assert lines[4].startswith("all-MiniLM-L6-v2, 256 calibration and 200 other sentences; a chip")
    assert lines[4].endswith("`python -m bench.encoder_accuracy`. Other libraries: lib 1.2.")
