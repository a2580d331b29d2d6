"""The table of families: shares of all parameters, and what most of the rest is."""

from pathlib import Path

from bench.tables.pages import TABLES

ROWS = """\
date,device,torch,commit,transformers,kind,family,layers,planned,left
2026-12-01,a chip,2.13,abc,5.23,decoder,Llama,14,700,"{""embeddings"": 260, ""vectors: b"": 40}"
2026-12-01,a chip,2.13,abc,5.23,vision,ResNet,9,99,"{""vectors: biases"": 1}"
"""


def test_shares_are_of_all_parameters_and_small_reasons_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "families_2026-12-01_x_abc.csv").write_text(ROWS)
    lines = TABLES["families"](tmp_path).splitlines()
    assert lines[0] == "| kind | family | pruned | left dense |"
    assert lines[2:4] == [
        "| decoder | Llama | 70% | 26% embeddings |",
        "| vision | ResNet | 99% | - |",
    ]
    assert lines[5].startswith("2 families of transformers 5.23 in their least sizes")
