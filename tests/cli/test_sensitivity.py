"""`secateur sensitivity`: curves, a page, and what is refused."""

from pathlib import Path

import pytest

import secateur as sc
from secateur.allocation import read_sensitivity
from secateur.integrations.tokens import token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from tests.cli.shell import refused, run, said, tokens


def test_sense_writes_curves_and_a_page(dense: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "sense.json", tmp_path / "sense.html"
    text = said(
        run(
            "sensitivity", dense, "-p", "2:4", "--pattern", "unstructured:0.9",
            "--layers", "*.1.mlp.*", "--tokens",
            tokens(dense, "validation"), "--rows", 2, "-o", out, "--html", page,
        )
    )  # fmt: skip
    found = read_sensitivity(out)
    assert found.patterns == ("2:4", "unstructured:0.9") and len(found.increase) == 3
    rows = token_rows(tokens(dense, "validation"), 2, 2)
    model = load_folder(dense).float()
    before = evaluate.perplexity(model, rows).nll
    assert found.loss == pytest.approx(before, rel=1e-5)
    name = "model.layers.1.mlp.up_proj"
    sc.prune_(model, sc.plan(model, "unstructured:0.9", layers=[name]))
    increase = evaluate.perplexity(model, rows).nll - before
    assert found.increase[name]["unstructured:0.9"] == pytest.approx(increase, abs=1e-5)
    assert f"{increase:+.4f}" in text
    assert name in page.read_text() and "<svg" in page.read_text()


def test_what_sense_refuses(dense: Path, tmp_path: Path) -> None:
    data = ("--tokens", tokens(dense, "validation"), "--rows", 1)
    line = refused(run("sensitivity", dense, *data, "-m", "sparsegpt"))
    assert "needs a criterion, 'sparsegpt' refits the kept weights" in line
    assert "unknown pattern 'foo'" in refused(
        run("sensitivity", dense, *data, "-p", "2:4", "-p", "foo")
    )
    line = refused(run("sensitivity", dense, *data, "-o", tmp_path / "no" / "sense.json"))
    assert "name a file in a folder that exists" in line
