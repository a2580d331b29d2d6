"""Safetensors files are written like any other file."""

from pathlib import Path

import torch

from secateur.core.disk.tensor_files import load_file, read_tensors, save_file, shapes_in


def test_a_file_comes_back_and_others_may_read_it(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    for _ in range(2):  # a new file, and an existing one
        save_file(tensors, tmp_path / "tensors", {"format": "pt"})
        assert (tmp_path / "tensors").stat().st_mode == plain.stat().st_mode
    found = load_file(tmp_path / "tensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_some_tensors_are_read_and_all_are_described(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    stored = {
        "matrix": torch.arange(6.0).view(2, 3),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    save_file(stored, path)
    found = read_tensors(path, ["matrix"])
    assert found.keys() == {"matrix"} and torch.equal(found["matrix"], stored["matrix"])
    assert shapes_in(path) == {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
