"""The bench of few tokens: a row for everyone, within the time that there is."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.lib import cold, results
from bench.lib.shapes import SHAPES
from bench.run import decode


def test_decode_takes_models_and_single_layers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = decode.parsed(["--shapes", "llama-3-8b", "Qwen2.5-7B o", "--tokens", "1", "16"])
    short = ("qkv", "o", "gate_up", "down")
    assert arguments.layers == [*(f"Llama-3-8B {name}" for name in short), "Qwen2.5-7B o"]
    assert arguments.tokens == [1, 16] and arguments.device == "cuda" and not arguments.plain
    assert SHAPES["Llama-3-8B gate_up"] == (28672, 4096)
    assert len(decode.parsed(["--shapes", "llama-3-70b", "qwen2.5-7b"]).layers) == 8
    with pytest.raises(SystemExit):
        decode.parsed(["--shapes", "llama-4"])
    assert (
        "shapes are llama-3-8b, llama-3-70b, qwen2.5-7b, gemma-2-9b, sam-vit-h or the"
        in capsys.readouterr().err
    )


def test_plain_launches_are_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[str | None] = []
    launches = SimpleNamespace(cache_clear=lambda: cleared.append(os.environ.get("X")))
    monkeypatch.setattr(decode, "DEPENDENT", "X")
    monkeypatch.setitem(sys.modules, decode.LAUNCHES, SimpleNamespace(_launch=launches))
    monkeypatch.delenv("X", raising=False)
    with decode.plainly():
        assert os.environ["X"] == "0"
    assert cleared == ["0", None]
    monkeypatch.setenv("X", "1")
    with decode.plainly():
        assert os.environ["X"] == "0"
    assert os.environ["X"] == "1" and cleared == ["0", None, "0", "1"]


def test_decode_writes_a_row_for_everyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)
    words = (
        "--device cpu --shapes Tiny --tokens 1 3 --formats semi24 int4 semi25 --plain --rounds 2"
    )
    where = ["--output", str(tmp_path), "--peers", str(tmp_path / "lib.so")]
    assert decode.main([*words.split(), *where]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path.name.startswith("decode_")
    rows = results.read(path)
    measured = [row for row in rows if row["us"]]
    ours = ["semi24 reference", "semi24 reference plain", "int4 reference", "int4 reference plain"]
    names = ["cublas bf16", "cublas fp16", *ours]
    assert [(r["candidate"], r["tokens"]) for r in measured] == [
        (name, tokens) for tokens in "13" for name in names
    ]
    for row in measured:
        dense = next(d for d in measured if d["tokens"] == row["tokens"])
        assert float(row["error"]) < 3e-3 and row["copies"] == row["launches"] == "4"
        assert row["dtype"] == ("float16" if "fp16" in row["candidate"] else "bfloat16")
        if row["baseline"] == "cublas bf16":
            assert float(row["vs_cublas"]) == pytest.approx(
                float(dense["us"]) / float(row["us"]), abs=0.002
            )
    notes = {row["candidate"]: row["note"] for row in rows if not row["us"]}
    assert notes["semi25"].startswith("unknown format 'semi25': did you mean 'semi24'?")
    assert notes["sparse-marlin int4"] == "Sparse-Marlin needs a GPU"
    assert {"cusparselt searched", "tinygemm int4"} < set(notes)
    assert len(rows) == 2 * (6 + 4)


def test_decode_stops_at_its_time_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (64, 128))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)
    clock = iter([0.0, 1.0, 2.0, 9.0])  # the start, before a case, after it, before the next
    monkeypatch.setattr(cold, "monotonic", lambda: next(clock))
    words = "--device cpu --shapes Tiny --tokens 1 3 --formats --rounds 2 --time-budget 5"
    assert decode.main([*words.split(), "--output", str(tmp_path)]) == 1
    *_, left, path = capsys.readouterr().out.splitlines()
    assert left == "out of time, left out: Tiny o, 3 tokens"
    assert {row["tokens"] for row in results.read(Path(path))} == {"1"}
