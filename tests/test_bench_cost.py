"""The bench of what pruning takes, end to end on a toy."""

import csv
from pathlib import Path

import pytest

from bench import cost

pytest.importorskip("transformers")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_for_each_method(tmp_path: Path, streamed: bool) -> None:
    words = ["--model", "tiny", "--rows", "4", "--length", "16", "--batch", "2"]
    words += ["--methods", "sparsegpt", "alps", "--device", "cpu", "--output", str(tmp_path)]
    cost.main([*words, "--stream", str(tmp_path / "dense")] if streamed else words)
    (path,) = tmp_path.glob("cost_*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["method"] for row in rows] == ["sparsegpt", "alps"]
    assert {(row["layers"], row["blocks"]) for row in rows} == {("14", "2")}
    assert {row["streamed"] for row in rows} == {str(streamed)}
    assert all(float(row["seconds"]) > 0 and 0 < float(row["error"]) < 1 for row in rows)
    assert float(rows[1]["error"]) < float(rows[0]["error"])
    assert not (tmp_path / "dense-sparse").exists()
