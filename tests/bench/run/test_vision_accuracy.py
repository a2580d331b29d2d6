"""The vision transformer's accuracy bench: a row a pattern, method and seed, with right figures."""

import copy
from pathlib import Path

import pytest

import secateur as sc
from bench.lib.configurations import EVERYTHING
from bench.lib.digits import digits, top1, trained
from bench.run import vision_accuracy
from tests.bench.rows import rows_of

pytest.importorskip("sklearn")

OURS = ["magnitude", "sparsegpt", "refit(sparsegpt)", "alps", "blockwise(alps)"]


def test_rows_are_of_the_transformer_that_the_methods_pruned(tmp_path: Path) -> None:
    words = ["--tiny", "--seeds", "5", "--patterns", "2:4", "--output", str(tmp_path)]
    assert vision_accuracy.main([*words, "--methods", *OURS, "llm-compressor wanda"]) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path, "vision-accuracy")}
    assert list(rows) == ["dense", *OURS, "llm-compressor wanda"]
    last = rows.pop("llm-compressor wanda")
    assert last["note"] and not last["top1"]  # it is absent, or takes none but transformers' models
    assert {(row["pattern"], row["seed"], row["note"]) for row in rows.values()} == {
        ("2:4", "5", "")
    }
    dense = rows.pop("dense")
    assert float(dense["kl"]) == 0 and float(dense["as_dense"]) == 1
    assert all(float(row["kl"]) > 0 for row in rows.values())
    assert float(rows["refit(sparsegpt)"]["kl"]) < float(rows["sparsegpt"]["kl"])
    data = digits(5)
    model = trained(vision_accuracy.TINY, data, 5)
    assert float(dense["top1"]) == pytest.approx(top1(model, data))
    pruned = copy.deepcopy(model)
    sc.prune_(pruned, sc.plan(pruned, "2:4", layers=EVERYTHING))
    assert float(rows["magnitude"]["top1"]) == pytest.approx(top1(pruned, data))


def test_without_scikit_learn_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert vision_accuracy.main(["--output", str(tmp_path)]) == 2
    assert "bench.run.vision_accuracy needs scikit-learn" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
