"""`secateur report`: what the page is given."""

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.files.sidecar import read_sidecar
from secateur.integrations.tokens import token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from tests.cli.shell import refused, run, said, tokens


def test_report_shows_what_the_folder_and_the_measures_tell(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    said(
        run(
            "report", pruned, "-o", out, "--baseline", dense, "--tokens",
            tokens(dense, "validation"), "--rows", 2, "--title", "Two blocks",
        )
    )  # fmt: skip
    page = out.read_text()
    assert "<title>Two blocks</title>" in page
    for section in ("accuracy", "sparsity", "masks", "errors", "sizes", "plan", "provenance"):
        assert f'<section id="{section}">' in page
    assert '<section id="dispatch">' not in page and "Speed was not measured" in page
    rows = token_rows(tokens(dense, "validation"), 2, 2)
    perplexity = evaluate.perplexity(load_folder(pruned).float(), rows).perplexity
    assert f">{perplexity:.3f}<" in page and "bfloat16" in page


def test_report_says_what_packing_would_give(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("secateur.cli.report.write_html", lambda *_, **given: shown.append(given))
    page = ("-o", tmp_path / "report.html")
    said(run("export", pruned, "--to", "packed", "-o", tmp_path / "packed"))
    said(run("report", pruned, "--baseline", dense, *page))
    written = (tmp_path / "packed" / "model.secateur.safetensors").stat().st_size
    sizes = shown[0]["sizes"]
    size = (dense / "model.safetensors").stat().st_size
    assert list(sizes) == ["dense", "pruned", "pruned, if packed"]
    assert sizes["dense"] == sizes["pruned"] == size
    headers = 14 * 200  # names and shapes of more tensors
    assert sizes["pruned, if packed"] == pytest.approx(written, abs=headers)
    assert written < size - 2 * headers
    for folder in (dense, tmp_path / "packed"):  # nothing to pack
        said(run("report", folder, *page))
        assert list(shown[-1]["sizes"]) == [folder.name]


def test_report_compares_folders(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("secateur.cli.report.write_html", lambda *_, **given: shown.append(given))
    other, page = tmp_path / "other", ("-o", tmp_path / "report.html")
    data = ("--tokens", tokens(dense, "validation"), "--rows", 2)
    said(run("prune", dense, "-o", other, "-p", "2:4", "-m", "random"))
    said(run("report", pruned, other, "--baseline", dense, *data, *page))
    assert list(shown[0]["evaluations"]) == ["dense", "pruned", "other"]
    assert [r.method for r in shown[0]["prune"]] == ["pruned: magnitude", "other: random"]
    assert shown[0]["plan"] == read_sidecar(pruned).plan and shown[0]["model"] is None
    assert shown[0]["title"] == "pruned and other"
    found = json.loads(said(run("eval", other, "--baseline", dense, *data, "--json")))
    assert shown[0]["evaluations"]["other"] == found["other"]
    line = refused(run("report", pruned, other, "--tokens-per-call", "1", *page))
    assert "--tokens-per-call needs one folder, got 2" in line


@pytest.mark.parametrize("name", ["rep.pdf", "report", "a.html.png", "report.json"])
def test_a_page_is_called_what_it_is(pruned: Path, tmp_path: Path, name: str) -> None:
    line = refused(run("report", pruned, "-o", tmp_path / name))
    assert line.endswith("give it a name that ends in .html") and not (tmp_path / name).exists()
    data = ("--tokens", tokens(pruned.with_name("dense"), "validation"), "--rows", 1)
    assert "ends in .html" in refused(run("sensitivity", pruned, *data, "--html", tmp_path / name))
    name = name.replace(".json", ".html")
    assert "ends in .json" in refused(run("sensitivity", pruned, *data, "-o", tmp_path / name))


def test_report_measures_speed_where_it_is_asked_to(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    said(run("report", pruned, "-o", out, "--tokens-per-call", "1"))
    assert '<section id="dispatch">' in out.read_text()
    assert "Speed was not measured" not in out.read_text()
    line = refused(run("report", pruned, "-o", out, "--sensitivity", pruned / "config.json"))
    assert "config.json is no sensitivity" in line
