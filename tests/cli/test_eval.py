"""`secateur eval`: the library's measures, of folders that may be compared."""

import json
import shutil
from pathlib import Path

import pytest

from secateur.integrations.tokens import token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from tests.cli.shell import LENGTH, ROWS, refused, run, said, tokens


def test_eval_is_the_library_s(dense: Path, pruned: Path) -> None:
    command = ("eval", pruned, "--tokens", tokens(dense, "validation"), "--rows", ROWS)
    found = json.loads(said(run(*command, "--baseline", dense, "--json")))
    rows = token_rows(tokens(dense, "validation"), ROWS, ROWS)
    model, teacher = load_folder(pruned).float(), load_folder(dense).float()
    assert found["tokens"] == ROWS * LENGTH
    assert found["dense"]["perplexity"] == pytest.approx(
        evaluate.perplexity(teacher, rows).perplexity, rel=1e-5
    )
    assert found["pruned"]["KL to dense"] == pytest.approx(
        evaluate.compare(model, teacher, rows).kl, rel=1e-4
    )
    text = said(run(*command))
    perplexity = evaluate.perplexity(model, rows).perplexity
    assert f"pruned {perplexity:.3f}" in " ".join(text.split())
    assert "on 192 tokens of tokens.safetensors:validation" in text


def test_eval_of_an_encoder_needs_a_baseline(encoder: Path, tmp_path: Path) -> None:
    data = ("--tokens", tokens(encoder, "rows"), "--rows", 4)
    said(run("prune", encoder, "-o", tmp_path / "out", "-p", "2:4", "--ignore", "pooler.*"))
    line = refused(run("eval", tmp_path / "out", *data))
    assert "BertModel has no perplexity: compare it by --baseline DENSE" in line
    arguments = ("--eval-tokens", tokens(encoder, "rows"), "--eval-rows", 4, "--ignore", "pooler.*")
    text = said(run("prune", encoder, "-o", tmp_path / "x", "-p", "2:4", *arguments))
    (told,) = [line for line in text.splitlines() if line.startswith("cosine to dense")]
    assert told.split()[3] == "-" and "(tokens.safetensors:rows, 96 tokens)" in told
    found = json.loads(said(run("eval", tmp_path / "out", *data, "--baseline", encoder, "--json")))
    assert f"{found['out']['cosine to dense']:.4f}" == told.split()[4]
    rows = token_rows(tokens(encoder, "rows"), 4, 4)
    expected = evaluate.embedding_cosine(load_folder(tmp_path / "out"), load_folder(encoder), rows)
    assert found["out"]["cosine to dense"] == pytest.approx(expected.mean, rel=1e-5)
    assert 0 < found["out"]["cosine to dense"] < 0.9999


def test_eval_needs_data(pruned: Path) -> None:
    assert "either --text FILE or --tokens FILE:KEY, got neither" in refused(run("eval", pruned))


def test_a_short_text_is_used_as_it_is_and_that_is_said(pruned: Path, tmp_path: Path) -> None:
    """In the words of the command line, on stderr; no error unless there is not one row."""
    text = tmp_path / "text.txt"
    text.write_text("a b c d " * 21)
    result = run("eval", pruned, "--text", text, "--rows", 9, "--length", 16)
    assert "on 80 tokens of text.txt" in said(result)
    short, few = result.stderr.splitlines()
    assert short.startswith("warning: --rows 9: there are only 5 rows of 16 tokens, which are used")
    assert short.endswith("a smaller --length") and few.startswith("warning: the 5 rows are of 1 d")
    (tmp_path / "texts").mkdir()
    for name in "12345678":
        (tmp_path / "texts" / name).write_text("a b c d " * 5)
    result = run("eval", pruned, "--text", tmp_path / "texts", "--rows", 8, "--length", 16)
    assert "on 128 tokens of texts" in said(result) and result.stderr == ""
    text.write_text("a b c")
    line = refused(run("eval", pruned, "--text", text, "--length", 16))
    assert (
        "a row needs 16 tokens, the text has 4: give more text, or give a smaller --length" in line
    )


def test_warnings_name_the_option_that_is_meant(dense: Path, tmp_path: Path) -> None:
    data = ("--eval-tokens", tokens(dense, "validation"), "--eval-rows", ROWS + 1)
    result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", *data)
    said(result)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"warning: --eval-rows {ROWS + 1}: there are only {ROWS} rows of")


def test_eval_compares_folders_on_one_text(dense: Path, pruned: Path, tmp_path: Path) -> None:
    other = tmp_path / "pruned"
    said(run("prune", dense, "-o", other, "-p", "unstructured:0.25"))
    data = ("--tokens", tokens(dense, "validation"), "--rows", ROWS, "--baseline", dense, "--json")
    both = json.loads(said(run("eval", pruned, other, *data)))
    assert list(both) == ["tokens", "data", "dense", str(pruned), str(other)]  # of one name
    for folder in (pruned, other):
        alone = json.loads(said(run("eval", folder, *data)))
        assert alone["pruned"] == both[str(folder)] and alone["dense"] == both["dense"]
    assert both[str(other)]["KL to dense"] < both[str(pruned)]["KL to dense"]
    assert "is named twice" in refused(run("eval", pruned, pruned, *data))


def test_folders_of_two_tokenizers_are_not_compared_on_a_text(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"x7"'))
    text = ("--text", dense / "text.txt", "--rows", 1, "--length", 8)
    for verb in ("eval", "report"):
        line = refused(run(verb, dense, other, *text))
        assert f"{file} is another tokenizer than {dense / 'tokenizer.json'}" in line
    assert said(run("eval", dense, other, "--tokens", tokens(dense, "validation"), "--rows", 2))
