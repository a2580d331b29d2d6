"""Models written over themselves, and what lies beside them."""

from pathlib import Path

import secateur as sc
from secateur.files.sidecar import read_sidecar
from secateur.integrations.transformers import load_folder
from tests.cli.shell import refused, run, said, weights


def test_the_output_may_be_the_input_and_holds_all_that_it_held(
    dense: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    said(run("prune", dense, "-p", "unstructured:0.25", "-o", folder))
    mine = {"notes.txt": b"mine", "adapter_model.safetensors": b"mine"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert "holds a saved model" in refused(run("prune", folder, "-p", "2:4", "-o", folder))
    for _ in range(2):
        said(run("prune", folder, "-p", "2:4", "-o", folder, "--overwrite"))
        assert all((folder / name).read_bytes() == content for name, content in mine.items())
        assert (folder / "tokenizer.json").read_bytes() == tokenizer
        assert "tokenizer.json" in read_sidecar(folder).files
        assert "all 14 layers hold their pattern" in said(run("check", folder))
    said(run("export", folder, "--to", "packed", "-o", folder, "--overwrite"))
    assert {p.name for p in folder.glob("model*")} == {"model.secateur.safetensors"}
    assert "all 14 layers hold their pattern" in said(run("check", folder))


def test_a_tokenizer_of_somebody_else_is_not_replaced(dense: Path, tmp_path: Path) -> None:
    sc.save(load_folder(dense), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("mine")
    line = refused(run("prune", dense, "-p", "2:4", "-o", tmp_path / "m", "--overwrite"))
    assert "tokenizer.json is none of the saved model's files and would be replaced" in line
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "mine"
    assert float((weights(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"] == 0).sum()) == 0
