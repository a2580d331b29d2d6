"""The bench of tokens a second: a row for each configuration, with what made the tokens."""

from pathlib import Path

import pytest
import torch

from bench.lib import results
from bench.run import llm
from bench.tables.pages import TABLES
from secateur.formats import SparseLinear

WORDS = "--model tiny --device cpu --prompt 5 --tokens 4 --rounds 2".split()


@pytest.mark.parametrize(("dtype", "short"), [("bfloat16", "bf16"), ("float32", "fp32")])
def test_each_configuration_has_a_row(
    dtype: str, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    words = [*WORDS, "--output", str(tmp_path), "--head", "semi24", "--dtype", dtype]
    loops = ["steps", "custom_generate"]
    assert llm.main([*words, "--formats", "dense", "semi24_int4", "--loops", *loops]) == 0
    rows = results.read(Path(capsys.readouterr().out.split()[-1]))
    named = [(row["format"], row["head"], row["loop"]) for row in rows]
    assert named == [
        *(("dense", "dense", loop) for loop in loops),
        *(("semi24_int4", "semi24", loop) for loop in loops),
    ]
    for row in rows:
        assert row["note"] == "" and (row["model"], row["blocks"], row["batch"]) == (
            "tiny",
            "2",
            "1",
        )
        assert float(row["tokens_s"]) == pytest.approx(1e3 / float(row["ms"]), rel=0.01)
        assert float(row["first_ms"]) > 0 and row["allocated"] == row["peak"] == ""
    assert rows[0]["runs"].startswith("the model's own forward")
    table = TABLES["llm-cpu"](tmp_path)
    assert f"| 2:4, int4 | 2:4, {short} | its own |" in table and f"Ratios are to {short}" in table


def test_blocks_are_pruned_to_80_percent() -> None:
    pytest.importorskip("transformers")
    sizes = {**llm.MODELS["wide"], "num_hidden_layers": 1}
    made = llm.llama(sizes, 9, "block:64x64", "dense", "cpu", torch.float32)
    layer = made.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, SparseLinear) and layer.dtype == torch.float32
    assert float((layer.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.001)


@pytest.mark.slow  # half a minute of a C++ compiler
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_transformers_compiles_on_a_cpu_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    torch._dynamo.utils.counters.clear()
    words = [*WORDS, "--output", str(tmp_path), "--formats", "dense", "--loops", "generate"]
    assert llm.main(words) == 0
    (row,) = results.read(Path(capsys.readouterr().out.split()[-1]))
    assert row["runs"] == "transformers' generate, static cache, compiled" and not row["note"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_what_fails_has_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("no room. And more")

    monkeypatch.setattr(llm, "steps_of", refuses)
    assert llm.main([*WORDS, "--output", str(tmp_path), "--formats", "dense"]) == 0
    (row,) = results.read(Path(capsys.readouterr().out.split()[-1]))
    assert row["note"].startswith("RuntimeError: no room") and row["ms"] == ""
