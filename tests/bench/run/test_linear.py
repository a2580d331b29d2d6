"""The bench of single layers on a CPU: what a row holds, and that a wrong result is none."""

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench.lib.shapes import SHAPES
from bench.run import linear
from secateur.formats import parse_format

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")


@pytest.mark.parametrize("format", ["semi24", "block:4x8", "csr", "bitmap"])
def test_weights_have_zeros_that_the_format_stores(format: str) -> None:
    chosen = parse_format(format)
    weight = linear.sparse_weight((64, 128), chosen, 0.8)
    assert chosen.why_not(weight) is None
    wanted = 0.5 if format == "semi24" else 0.8
    assert float((weight == 0).float().mean()) == pytest.approx(wanted, abs=0.06)
    assert torch.equal(weight, linear.sparse_weight((64, 128), chosen, 0.8))


def test_a_run_appends_rows_with_their_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "BERT-base attention", (64, 128))
    words = "--threads 1 --tokens 1 3 --formats block:4x8 semi24 --sparsities 0.5 0.9"
    layers = ["--layers", "BERT-base attention", "--output", str(tmp_path)]
    linear.main([*words.split(), *layers])
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path and path.name.startswith("linear_")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {
        (r["candidate"], r["sparsity"], r["tokens"]) for r in rows if "dense" not in r["candidate"]
    }
    assert cases == {
        *(("block:4x8 cpu", sparsity, tokens) for sparsity in ("0.5", "0.9") for tokens in "13"),
        *(("semi24 reference", "0.5", tokens) for tokens in "13"),
    }
    dense = [row for row in rows if row["candidate"] == "dense"]
    assert len(dense) == 6 and all(float(row["vs_eager"]) == 1 for row in dense)
    for row in rows:
        eager = next(d for d in dense if comparable(d) == comparable(row))
        assert float(row["vs_eager"]) == pytest.approx(float(eager["us"]) / float(row["us"]), 0.05)
        assert row["commit"] and row["command"] and row["torch"] == torch.__version__
        assert row["threads"] == "1" and row["out"] == "64"


def comparable(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["format"], row["sparsity"], row["tokens"]


def test_a_wrong_implementation_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "BERT-base attention", (64, 128))
    monkeypatch.setattr(linear, "admitted", lambda *_: ([], ["it is wrong by 1"]))
    with pytest.raises(RuntimeError, match="it is wrong by 1"):
        list(linear.case("BERT-base attention", parse_format("csr"), 0.9, 1, torch.float32))


def test_rounded_inputs_are_compared_with_the_fastest_dense_int8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "BERT-base attention", (64, 128))
    case = ("BERT-base attention", parse_format("semi24_int8_dynamic"), 0.5, 3)
    rows = {str(row["candidate"]): row for row in linear.case(*case, torch.float32)}
    assert {"dense int8 x86", "dense int8 onednn", "semi24_int8_dynamic reference"} < {*rows}
    in_int8 = [float(rows[f"dense int8 {engine}"]["us"]) for engine in ("x86", "onednn")]
    for row in rows.values():
        wanted = min(in_int8) / float(row["us"])
        assert float(row["vs_int8"]) == pytest.approx(wanted, rel=0.05, abs=0.002)
    assert rows["dense int8 x86"]["weight_bytes"] == 64 * 128
    sixteen = list(linear.case(*case, torch.bfloat16))  # which torch's does not take
    assert not any("dense int8" in str(row["candidate"]) or row["vs_int8"] for row in sixteen)
