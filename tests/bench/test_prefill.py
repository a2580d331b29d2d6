"""The bench of many tokens: a row for everyone, what is wrong has no time, and losers are shown."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import cold, prefill, prefill_tables, tables
from bench.shapes import SHAPES
from secateur.accelerate import decision
from secateur.accelerate.report import LayerReport
from secateur.formats import dynamic
from secateur.formats.kernels import cusparselt, quantise, timing
from secateur.formats.kernels.cusparselt import Setting
from tests.formats.kernels.fake_cusparselt import Fake, forget, install
from tests.formats.test_dynamic import plain_quantise, plain_scale_bias

OUT, WIDTH = 64, 128
EXACT = ["semi24 dense", "semi24 cusparselt", "semi24 decode"]
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


def run(folder: Path, capsys: pytest.CaptureFixture[str], tokens: str) -> tables.Rows:
    words = f"--device cpu --shapes Tiny --tokens {tokens} --rounds 2 --output".split()
    assert prefill.main([*words, str(folder)]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path.parent == folder and path.name.startswith("prefill_")
    return tables._read(path)


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
    assert len(rows) == 2 * (7 + 9)
    assert "| Tiny o | 130 |" in prefill_tables.prefill(tmp_path)


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
    assert set(prefill_tables.SHORT) <= rows.keys()


def data_of(tokens: Sequence[int]) -> prefill.Data:
    dense, sparse = cold.random_weights((OUT, WIDTH), torch.device("cpu"))
    x = cold.random_inputs(max(tokens), WIDTH, prefill.STEP, torch.device("cpu"))
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(5)).bfloat16()
    return prefill.Data(dense, sparse, bias, x, tokens)


def test_what_a_chain_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph knows only addresses: it keeps nothing that its launches read."""
    x = torch.ones(2, 4)
    made = list["weakref.ref[nn.Linear]"]()

    def tune(runs: Sequence[cold.Run], x: Tensor) -> cold.Tuned:
        tuned = [nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in runs]
        made.extend(map(weakref.ref, tuned))
        tuned[0].weight.copy_(torch.eye(4))
        return tuned, ""

    def captured(*arguments: object) -> timing.Chain:
        return timing.Chain(lambda: None, lambda: None, 1, captured=True)

    monkeypatch.setattr(cold, "chain", captured)
    candidate = cold.Candidate("a", 64, lambda: torch.clone, x, Tensor.double, "a", tune)
    prepared = cold.prepared(candidate, [torch.clone, torch.clone], 2)
    gc.collect()
    assert len(made) == 2 and [one() for one in made] == list(prepared.runs)


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


def test_failures_are_rows_with_a_reason() -> None:
    x = torch.ones(200, 2)

    def full() -> cold.Run:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    calls = list[int]()

    def fails_late(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > 3:
            raise RuntimeError("the library has given up\nat a place")
        return x.clone()

    def one_nan(x: Tensor) -> Tensor:
        result = x.clone()
        result[1, 0] = torch.nan  # not among the tokens that are compared
        return result

    def maker(name: str, make: object) -> list[cold.Candidate]:
        return [cold.Candidate(name, 10**9, make, x, Tensor.double, "right")]  # type: ignore[arg-type]

    made = {
        "right": lambda: torch.clone,
        "full": full,
        "late": lambda: fails_late,
        "nan": lambda: one_nan,
    }
    makers = {name: lambda name=name, make=make: maker(name, make) for name, make in made.items()}
    layer = cold.layer_from("a layer", (2, 2), makers, 10**10)
    rows = {row["candidate"]: row for row in cold.case(layer, 200, torch.device("cpu"), rounds=5)}
    assert rows["right"]["us"] and len({tuple(row) for row in rows.values()}) == 1
    assert {name: row["note"] for name, row in rows.items() if not row["us"]} == {
        "full": "CUDA out of memory",
        "late": "the library has given up",
        "nan": "wrong result: relative error nan",
    }
    tokens = cold.wanted_of(layer.ready[0][0], x).tokens
    assert len(tokens) == cold.CHECKED and {0, 199} < set(tokens.tolist()) and 1 not in tokens


def test_shapes_and_tokens_of_prefill() -> None:
    parser = cold.parser_of("prefill", "", ["sam-vit-h"], [128])
    assert cold.parsed(parser, []).layers == ["SAM-ViT-h lin1", "SAM-ViT-h lin2"]
    assert SHAPES["SAM-ViT-h lin1"] == (5120, 1280) and SHAPES["SAM-ViT-h lin2"] == (1280, 5120)


PREFILL = """\
date,device,driver,torch,commit,command,layer,tokens,candidate,us,low_us,high_us,baseline,vs_cublas,note
2026-11-22,GPU,580,2.11,abc,cmd,q,128,cublas bf16,20,20,21,cublas bf16,1.000,
2026-11-22,GPU,580,2.11,abc,cmd,q,128,cusparselt alg 0,40,40,40,cublas bf16,0.500,
2026-11-22,GPU,580,2.11,abc,cmd,q,128,accelerate_,21.05,21,21.1,cublas bf16,0.950,runs dense: so
2026-11-22,GPU,580,2.11,abc,cmd,q,128,semi24 decode,,,,,,takes at most 64 tokens
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,cublas bf16,600,600,600,cublas bf16,1.000,
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,accelerate_,400,400,400,cublas bf16,1.500,runs cusparselt
2026-11-22,GPU,580,2.11,abc,cmd,q,4096,semi24 decode,,,,,,takes at most 64 tokens
"""


def test_the_table_shows_losers_gaps_and_the_choice(tmp_path: Path) -> None:
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    lines = prefill_tables.prefill(tmp_path).splitlines()
    assert lines[0] == (
        "| layer | tokens | cublas bf16 | cusparselt alg 0 | accelerate_ | semi24 decode |"
    )
    assert lines[2] == "| q | 128 | 20.0 | 40.0, 0.50 | 21.1, 0.95 (dense) | - |"
    assert lines[3] == "| q | 4096 | 600.0 | - | 400.0, **1.50** (cusparselt) | - |"
    assert "GPU, driver 580, torch 2.11, 2026-11-22, commit abc, `cmd`;" in lines[5]
    assert "quartiles at most 5% of the median apart." in lines[5]
    assert lines[5].endswith("is more than 3% slower than dense in 1 of 2 cases: q at 128 (0.95).")
    assert lines[6] == "Without a figure, for instance: semi24 decode: takes at most 64 tokens."
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL.replace("0.950", "0.971"))
    assert "than dense in 0 of 2 cases." in prefill_tables.prefill_short(tmp_path)
    assert prefill_tables.NO_LOSS == decision.NO_LOSS


def test_each_case_is_shown_from_its_last_run(tmp_path: Path) -> None:
    """The later run had no 4096 tokens; the origin names both."""
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    later = [line for line in PREFILL.splitlines() if ",4096," not in line]
    text = "\n".join(later).replace("2026-11-22", "2026-11-23").replace("abc", "def")
    (tmp_path / "prefill_2026-11-23_x_def.csv").write_text(text.replace("40,", "30,"))
    lines = prefill_tables.prefill(tmp_path).splitlines()
    assert lines[2].startswith("| q | 128 | 20.0 | 30.0,")
    assert lines[3].startswith("| q | 4096 | 600.0 |")
    assert "2026-11-23, commit def, `cmd`; 2026-11-22, commit abc, `cmd`; quartiles" in lines[5]


def test_the_short_table_has_a_column_for_each_number_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "prefill_2026-11-22_x_abc.csv").write_text(PREFILL)
    lines = prefill_tables.prefill_short(tmp_path).splitlines()
    assert lines[0] == "| layer | runs | 128 tokens | 4096 tokens |"
    assert lines[2:5] == [
        "| q | cusparselt alg 0 | 0.50 | - |",
        "| q | accelerate_ | 0.95 | **1.50** |",
        "",
    ]
