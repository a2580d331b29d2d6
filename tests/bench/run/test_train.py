"""The bench of training in 2:4: a row for everyone, and steps held to the zeros they choose."""

from pathlib import Path

import pytest
import torch

from bench.lib import cold, results
from bench.lib.shapes import SHAPES
from bench.run import train


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)
    monkeypatch.setattr(train, "PACKED", ((64, 128),))


def run(folder: Path, capsys: pytest.CaptureFixture[str], words: str) -> results.Rows:
    assert train.main(f"--device cpu --rounds 2 {words} --output {folder}".split()) == 0
    return results.read(Path(capsys.readouterr().out.split()[-1]))


def test_everyone_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "--shapes Tiny --tokens 3 70")
    names = ("cublas bf16", "2:4 tiles", "2:4 rows", "2:4 greedy", "fp8", "fp8 products alone")
    expected = [(tokens, f"{name} forward + backward") for tokens in ("3", "70") for name in names]
    assert [(row["tokens"], row["candidate"]) for row in rows] == expected
    for row in rows:
        if row["candidate"].startswith("fp8"):
            assert row["note"] == "torch._scaled_mm needs a GPU"
        else:
            assert 0 < float(row["error"]) < 0.01 and row["baseline"] == expected[0][1]


def test_a_step_with_other_zeros_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = cold.random_weights((64, 128), torch.device("cpu"))
    x = cold.random_inputs(40, 128, 1, torch.device("cpu"))
    (one,) = train.sparse(weight, x, train.Selection.ROWS)
    (other,) = train.sparse(weight, x, train.Selection.TILES)
    wanted = cold.wanted_of(one, x)
    assert wanted.error(one.make()(x)) < 0.01 < wanted.error(other.make()(x))


def test_packs_have_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "--packs")
    names = ("copy", "pack tiles", "pack rows", "pack greedy")
    assert [row["candidate"] for row in rows] == [
        f"{name} {dtype}" for dtype in ("bfloat16", "float32") for name in names
    ]
    for row in rows:
        moved = 64 * 128 * (2.25 + (2 if row["dtype"] == "bfloat16" else 4))
        assert float(row["tb_s"]) == pytest.approx(moved / float(row["us"]) / 1e6, abs=5e-4)
        assert row["baseline"] == f"copy {row['dtype']}"


def test_fp8_is_rounded_by_powers_of_two() -> None:
    numbers = torch.tensor([[0.3, -448.0], [1000.0, 2.0**-4]])
    assert float(train.scale_of(numbers)) == 4.0
    found = train.as_fp8(numbers)
    assert found.tolist() == [[0.3125, -448.0], [1024.0, 2.0**-4]]
