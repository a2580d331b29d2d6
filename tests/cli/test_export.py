"""`secateur export`: packed and dense again, exactly, and what is said of speed."""

from pathlib import Path

import pytest
import torch

from secateur.files.save import load
from secateur.files.sidecar import read_sidecar
from secateur.formats import parse_format
from secateur.integrations.tokens import token_rows
from secateur.integrations.transformers import load_folder
from tests.cli.shell import refused, run, said, tokens, weights


def test_export_packs_and_unpacks_exactly(pruned: Path, tmp_path: Path) -> None:
    packed, again = tmp_path / "packed", tmp_path / "again"
    text = said(run("export", pruned, "--to", "packed", "-o", packed))
    assert f"packed form written to {packed}" in text
    assert {entry["format"] for entry in read_sidecar(packed).packed.values()} == {"semi24"}
    assert len(read_sidecar(packed).packed) == 14
    small, large = packed / "model.secateur.safetensors", pruned / "model.safetensors"
    assert small.stat().st_size < large.stat().st_size
    assert said(run("check", packed))
    said(run("export", packed, "--to", "dense", "-o", again))
    before, after = weights(pruned), weights(again)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    saved = read_sidecar(again)
    assert saved.plan == read_sidecar(pruned).plan
    assert [dict(r) for r in saved.reports] == [dict(r) for r in read_sidecar(pruned).reports]
    line = refused(run("prune", packed, "-o", tmp_path / "x", "-p", "2:4"))
    assert "is in packed form, whose weights are frozen" in line


@pytest.mark.usefixtures("no_cpu_kernels")
def test_export_says_where_packed_is_slower(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = said(run("export", pruned, "--to", "packed", "-o", tmp_path / "a"))
    assert (
        "slower than dense on this machine: 14 of 14 layers, for nothing here multiplies semi24"
        in text
    )
    assert "bench" not in text
    said(
        run("prune", dense, "-o", tmp_path / "x", "-p", "*.up_proj=block:16x16@0.5", "-p", "*=2:4")
    )
    text = said(run("export", tmp_path / "x", "--to", "packed", "-o", tmp_path / "b"))
    assert "slower than dense on this machine: 12 of 14 layers" in text
    assert "whether the other 2 layers are faster is for `secateur bench`" in text
    assert "slower" not in said(
        run("export", tmp_path / "b", "--to", "dense", "-o", tmp_path / "c")
    )


def test_export_that_rounds_says_how_far(pruned: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    text = said(run("export", pruned, "--to", "packed", "--format", "semi24_int4", "-o", packed))
    assert "semi24_int4 rounds weights: those of a layer are off by up to" in text
    formats = {entry["format"] for entry in read_sidecar(packed).packed.values()}
    assert formats == {"semi24_int4"}
    assert said(run("check", packed))


def test_dense_weights_are_rounded_with_calibration_and_exported(
    dense: Path, tmp_path: Path
) -> None:
    """The pattern that keeps every weight, with a grid: what prune writes packs in the format."""
    rounded, packed = tmp_path / "rounded", tmp_path / "packed"
    data = ("--tokens", tokens(dense, "calibration"), "--rows", 8, "--batch", 4)
    method = ("-m", "sparsegpt", "--option", "grid=int4", "-p", "unstructured:0")
    said(run("prune", dense, "-o", rounded, *method, *data))
    text = said(run("export", rounded, "--to", "packed", "--format", "int4", "-o", packed))
    assert "int4 rounds weights: those of a layer are off by up to" in text
    entries = read_sidecar(packed).packed
    assert {entry["format"] for entry in entries.values()} == {"int4"} and len(entries) == 14
    near, far = weights(rounded), weights(dense)
    found = load(packed).state_dict()
    for name in entries:
        given = parse_format("int4").pack(near[f"{name}.weight"])
        assert torch.equal(found[f"{name}.values"], given["values"])
        assert torch.equal(given.dense(), near[f"{name}.weight"])  # bf16: nothing is rounded again
        assert not torch.equal(near[f"{name}.weight"], far[f"{name}.weight"])
    assert said(run("check", packed))


def test_export_packs_each_layer_in_the_format_of_its_pattern(dense: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    patterns = ("-p", "*.up_proj=block:16x16@0.5", "-p", "*.down_proj=unstructured:0.8")
    said(run("prune", dense, "-o", out, *patterns))
    said(run("export", out, "--to", "packed", "-o", packed))
    formats = {n.split(".")[-1]: e["format"] for n, e in read_sidecar(packed).packed.items()}
    assert formats == {"up_proj": "block:16x16", "down_proj": "bitmap"}
    said(run("export", out, "--to", "packed", "--format", "csr", "-o", tmp_path / "csr"))
    entries = read_sidecar(tmp_path / "csr").packed.values()
    assert {entry["format"] for entry in entries} == {"csr"}
    model = load(packed)
    ids = token_rows(tokens(dense, "validation"), 1, 1)[0]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_folder(out)(ids).logits, atol=0.25)


def test_what_export_refuses(dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    line = refused(run("export", pruned, "--to", "dense", "--format", "csr", *out))
    assert "--format goes with --to packed" in line
    line = refused(run("export", pruned, "--to", "packed", "--format", "semi25", *out))
    assert "unknown format 'semi25': did you mean 'semi24'?" in line
    line = refused(run("export", dense, "--to", "packed", *out))
    assert "packing needs a layer that fits semi24, got none" in line
    assert "name another --format" in line
    assert not (tmp_path / "x").exists()
