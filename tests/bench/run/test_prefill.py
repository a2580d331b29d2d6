"""The bench of many tokens: a row for everyone, and errors that are those of the format."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench.lib import cold, results
from bench.lib.shapes import SHAPES
from bench.run import prefill
from bench.tables.pages import TABLES
from bench.tables.prefill import SHORT
from secateur.accelerate.layer_report import LayerReport
from secateur.formats import dynamic
from secateur.formats.kernels import cusparselt, quantise
from secateur.formats.kernels.cusparselt import Setting
from tests.formats.kernels.fake_cusparselt import Fake, forget, install
from tests.formats.test_dynamic import plain_quantise, plain_scale_bias

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

OUT, WIDTH = 64, 128


EXACT = [
    *("semi24 prefill", "semi24 dense", "semi24 cusparselt", "semi24 decode"),
    *("semi24_int4 prefill", "semi24_int4 decode", "semi24_int8 prefill", "semi24_fp8 prefill"),
]


DYNAMIC = ["int8_dynamic torch", "fp8_dynamic torch"]


SPARSE = ["semi24_int8_dynamic cusparselt"]


HOPPER = ["semi24_int8_dynamic prefill", "semi24_fp8_dynamic prefill"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "Tiny o", (OUT, WIDTH))
    monkeypatch.setattr(cold, "MOST_LAUNCHES", 4)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    """cuSPARSELt and the quantiser in plain torch, and nobody asks for a GPU; two settings."""
    asked = ((cusparselt, "why_not"), (dynamic, "why_not"))
    for module, name in asked:
        monkeypatch.setattr(module, name, lambda *arguments: None)
    monkeypatch.setattr(quantise, "quantise", plain_quantise)
    monkeypatch.setattr(quantise, "scale_bias", plain_scale_bias)
    us = {Setting(0): 2.0, Setting(1): 1.0}
    yield install(monkeypatch, tmp_path / "cache", Fake(us))
    forget()


def run(folder: Path, capsys: pytest.CaptureFixture[str], tokens: str) -> results.Rows:
    words = f"--device cpu --shapes Tiny --tokens {tokens} --rounds 2 --output".split()
    assert prefill.main([*words, str(folder)]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path.parent == folder and path.name.startswith("prefill_")
    return results.read(path)


def test_everyone_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "3 130")
    measured = [row for row in rows if row["us"]]
    references = [f"{format} reference" for format in prefill.FORMATS]
    names = ["cublas bf16", references[0], "accelerate_", *references[1:]]
    assert [(r["candidate"], r["tokens"]) for r in measured] == [
        (name, tokens) for tokens in ("3", "130") for name in names
    ]
    for row in measured:
        dense = next(d for d in measured if d["tokens"] == row["tokens"])
        ratio = float(dense["us"]) / float(row["us"])
        assert float(row["vs_cublas"]) == pytest.approx(ratio, abs=0.002)
        assert float(row["error"]) < 3e-3 and row["baseline"] == "cublas bf16"
        assert row["dtype"] == "bfloat16" and (row["out"], row["in"]) == ("64", "128")
        assert row["commit"] and row["torch"] == torch.__version__
        if row["candidate"] == "accelerate_":
            assert row["note"].startswith("runs dense: running it packed needs a CUDA GPU")
        else:
            assert row["note"] == ""
    notes = {row["candidate"]: row["note"] for row in rows if not row["us"]}
    assert notes.keys() == {"cusparselt searched", *EXACT, *DYNAMIC, *SPARSE, *HOPPER}
    assert notes["semi24 cusparselt"].startswith("running it packed needs a CUDA GPU")
    assert len(rows) == 2 * (10 + 14)
    assert "| Tiny o | 130 |" in TABLES["prefill"](tmp_path)


def test_some_candidates_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["semi24 reference", "semi24_int4 prefill"]
    words = ["--device", "cpu", "--shapes", "Tiny", "--tokens", "3", "--rounds", "2"]
    assert prefill.main([*words, "--output", str(tmp_path), "--candidates", *some]) == 0
    rows = results.read(Path(capsys.readouterr().out.split()[-1]))
    assert [row["candidate"] for row in rows] == ["cublas bf16", *some]
    with pytest.raises(ValueError, match="candidates are cublas bf16, .*, got semi42"):
        prefill.main([*words, "--candidates", "semi42"])


def test_sparse_products_are_measured(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["candidate"]: row for row in run(tmp_path, capsys, "40")}
    both = ["cusparselt alg 0", "cusparselt searched", "semi24 cusparselt", "accelerate_"]
    for name in (*both, *DYNAMIC, *SPARSE):
        assert rows[name]["us"] and float(rows[name]["error"]) < 1e-2, rows[name]
    assert rows["cusparselt searched"]["note"].startswith("48 rows; algorithm 1; 0 settings wrong")
    assert rows["accelerate_"]["note"].partition(":")[0] in ("runs dense", "runs cusparselt")
    assert not any(rows[name]["us"] for name in ("semi24 decode", *HOPPER))
    assert set(SHORT) <= rows.keys()


def data_of(tokens: Sequence[int]) -> prefill.Data:
    dense, sparse = cold.random_weights((OUT, WIDTH), torch.device("cpu"))
    x = cold.random_inputs(max(tokens), WIDTH, prefill.STEP, torch.device("cpu"))
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(5)).bfloat16()
    return prefill.Data(dense, sparse, bias, x, tokens)


def test_dynamic_formats_are_held_to_rounded_inputs() -> None:
    data = data_of([8])
    exact, rounded = (
        prefill.implemented(data, format, "reference")[0].exact(data.x)
        for format in ("semi24_int8", "semi24_int8_dynamic")
    )
    lost = cold.error(rounded, exact)
    assert 1e-3 < lost < 2e-2  # what rounding the inputs costs is not in the errors
    plain = prefill.implemented(data, "semi24", "reference")[0].exact(data.x)
    assert torch.equal(plain, data.x.double() @ data.sparse.double().t() + data.bias.double())


def test_an_accelerated_layer_says_what_runs() -> None:
    entry = LayerReport("0", (4, 4), "semi24", (), "0", 2, 1, "faster", table=())
    table = (("dense", 256), ("cusparselt", None))
    packed = LayerReport("0", (4, 4), "semi24", (), "0", 2, 1, "faster", table=table)
    runs = [prefill.runs_at(packed, n) for n in (1, 256, 257)]
    assert runs == ["runs dense", "runs dense", "runs cusparselt"]
    assert prefill.runs_at(entry, 1) == "runs dense: faster"
