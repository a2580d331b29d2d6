"""State dicts without an architecture: what is pruned of them, and what is refused."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.files.sidecar import read_sidecar
from tests.cli.shell import refused, run, said


def test_a_bare_state_dict_is_pruned_where_it_may_be(bare: Path, tmp_path: Path) -> None:
    text = said(run("prune", bare, "-o", tmp_path / "out", "-p", "2:4"))
    before, after = load_file(bare), load_file(tmp_path / "out" / "weights.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {"blocks.0.type.weight", "stem.weight"}
    linear, conv = after["blocks.0.type.weight"], after["stem.weight"]
    assert bool(((linear.view(-1, 4) != 0).sum(1) == 2).all())
    along_channels = conv.permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool(((along_channels != 0).sum(1) == 2).all())
    with safe_open(tmp_path / "out" / "weights.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "made": "by hand"}
    assert "2 of 8 layers" in text
    zeros = sum(int((t == 0).sum()) for n, t in after.items() if n in changed)
    everything = sum(t.numel() for t in after.values())
    (line,) = [line for line in text.splitlines() if line.startswith("zeros of all")]
    assert line.split()[4:6] == [f"{zeros / everything:.1%}", f"{everything:,}"]
    for reason in ("embed and 1 more: an embedding or output head", "dw: a convolution over one",
                   "gpt.a.c_fc and 1 more: stored as [in, out]",
                   "ids: stored as torch.int8"):  # fmt: skip
        assert f"left alone: {reason}" in text
    assert "recover" not in text and "bench" not in text
    assert said(run("check", tmp_path / "out"))
    found = json.loads(said(run("inspect", tmp_path / "out", "--json")))
    assert {layer["layer"]: layer["zeros"] for layer in found["layers"]} == {
        "blocks.0.type": 0.5, "stem": 0.5,
    }  # fmt: skip


def test_shards_keep_their_files_and_their_index(bare: Path, tmp_path: Path) -> None:
    tensors = load_file(bare)
    folder = tmp_path / "sharded"
    folder.mkdir()
    files = {
        "a.safetensors": ["stem.weight"],
        "b.safetensors": ["embed.weight", "blocks.0.type.weight"],
    }
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    said(run("prune", folder, "-o", out, "-p", "unstructured:0.25"))
    assert {file.name for file in out.iterdir()} == {
        *files, "m.safetensors.index.json", "secateur.json",
    }  # fmt: skip
    assert float((load_file(out / "a.safetensors")["stem.weight"] == 0).float().mean()) == 0.25
    assert set(load_file(out / "b.safetensors")) == set(files["b.safetensors"])
    assert said(run("check", out / "m.safetensors.index.json", "-p", "unstructured:0.25"))
    assert set(read_sidecar(out).files) == {*files, "m.safetensors.index.json"}


def test_what_a_bare_state_dict_cannot_do(bare: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out", "-p", "2:4")
    line = refused(run("prune", bare, *out, "-m", "wanda", "--tokens", "a.safetensors:b"))
    assert "is a bare state dict, which cannot be run on data" in line
    assert "cannot be run on data" in refused(run("prune", bare, *out, "--eval-tokens", "a:b"))
    assert "--dtype needs a model folder" in refused(run("prune", bare, *out, "--dtype", "float32"))
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "norms.safetensors")
    line = refused(run("inspect", tmp_path / "norms.safetensors"))
    assert "has no weight that can be pruned" in line
    assert "holds several state dicts" in refused(run("inspect", tmp_path))
    (tmp_path / "x.safetensors.index.json").write_text('{"weights": []}')
    line = refused(run("inspect", tmp_path / "x.safetensors.index.json"))
    assert "is no index of safetensors" in line
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "lacks its weight file gone.safetensors" in refused(
        run("inspect", tmp_path / "x.safetensors.index.json")
    )
    assert not (tmp_path / "out").exists()


def test_the_output_may_be_a_state_dict_of_its_own_folder(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said(run("prune", bare, "-p", "unstructured:0.25", "-o", out))
    said(run("prune", out, "-p", "2:4", "-o", out, "--overwrite"))
    assert said(run("check", out))
    assert {p.name for p in out.iterdir()} == {"weights.safetensors", "secateur.json"}
    (out / "weights.safetensors").write_bytes((bare).read_bytes())
    assert "it was cut off or changed" in refused(run("check", out, "-p", "2:4")) or "sha256" in (
        refused(run("check", out, "-p", "2:4"))
    )
