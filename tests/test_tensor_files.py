"""Safetensors files are written as other files are."""

from pathlib import Path

import torch

from secateur.tensor_files import load_file, save_file


def test_a_file_comes_back_and_others_may_read_it(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    for _ in range(2):  # a new file, and one that is there
        save_file(tensors, tmp_path / "tensors", {"format": "pt"})
        assert (tmp_path / "tensors").stat().st_mode == plain.stat().st_mode
    found = load_file(tmp_path / "tensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
