"""The bench of blocks: a row for everyone, zero blocks to the block, and steps that are right."""

from pathlib import Path

import pytest
import torch

from bench.lib import cold, results
from bench.lib.shapes import SHAPES
from bench.run import blocks
from secateur.formats.block import Blocks

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)


def run(folder: Path, capsys: pytest.CaptureFixture[str], words: str) -> results.Rows:
    given = f"--device cpu --shapes Tiny --rounds 2 --formats block:16x32 {words} --output {folder}"
    assert blocks.main(given.split()) == 0
    return results.read(Path(capsys.readouterr().out.split()[-1]))


def test_everyone_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "--sparsities 0.5 0.75 --tokens 3 70")
    expected = [
        (f"Tiny o block:16x32@{sparsity}", tokens, name)
        for sparsity in ("0.5", "0.75")
        for tokens in ("3", "70")
        for name in ("cublas bf16", "block reference", "torch bsr")
    ]
    assert [(row["layer"], row["tokens"], row["candidate"]) for row in rows] == expected
    for row in rows:
        if row["candidate"] == "torch bsr":  # torch has none for bfloat16 on a CPU
            assert not row["us"] and row["note"]
        else:
            assert float(row["error"]) < 5e-3 and row["baseline"] == "cublas bf16"


def test_a_step_is_held_to_the_gradient_of_the_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, capsys, "--train --sparsities 0.5 --tokens 40")
    names = [f"{name} forward + backward" for name in ("cublas bf16", "block cpu")]
    assert [row["candidate"] for row in rows] == names
    assert all(row["baseline"] == names[0] and 0 < float(row["error"]) < 0.01 for row in rows)


def test_rounded_weights_are_held_to_what_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, capsys, "--formats bitmap_int4 --sparsities 0.5 --tokens 3")
    found = {row["candidate"]: row for row in rows}
    assert float(found["bitmap_int4 reference"]["error"]) < 5e-3
    assert int(found["bitmap_int4 reference"]["weight_bytes"]) < 64 * 128 / 2


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
def test_zero_blocks_are_counted_exactly(sparsity: float) -> None:
    weight = blocks.with_zeros(torch.ones(64, 96), "block:16x32", sparsity)
    assert Blocks(16, 32).density(weight) == pytest.approx(round(12 * (1 - sparsity)) / 12)
    assert torch.equal(weight, blocks.with_zeros(torch.ones(64, 96), "block:16x32", sparsity))


def test_zeros_anywhere_are_counted_exactly() -> None:
    weight = blocks.with_zeros(torch.ones(64, 96), "bitmap", 0.7)
    assert int(weight.count_nonzero()) == 64 * 96 - round(0.7 * 64 * 96)


def test_other_formats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        blocks.main(["--formats", "bitmap", "csr", "--device", "cpu"])
    assert "formats are blocks, bitmap and bitmap_int4, got csr" in capsys.readouterr().err
