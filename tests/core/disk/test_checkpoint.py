"""A checkpoint believes only its own run's undamaged files, and never rewrites them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur.core.disk.checkpoint import Checkpoint, digest
from secateur.core.disk.tensor_files import read_metadata, save_file
from tests.faults.verbs import batches, dense

FIRST = "layers-00000.safetensors"


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_grows_by_a_file_and_rewrites_none(tmp_path: Path) -> None:
    with Checkpoint(tmp_path, {}) as saved:
        saved.add({"a": torch.ones(2), "b": torch.zeros(3)}, {"a": {"rank": 1}, "b": {}})
        before = kept(tmp_path)
        saved.add({"c": torch.ones(2)}, {"c": {}})
    after = kept(tmp_path)
    assert after.keys() - before.keys() == {"layers-00001.safetensors"}
    assert {name: after[name] for name in before} == before
    with Checkpoint(tmp_path, {}) as again:
        assert again.finished() == {"a": {"rank": 1}, "b": {}, "c": {}}
        found = again.weights(["b", "c", "d"])
    assert found.keys() == {"b", "c"} and torch.equal(found["c"], torch.ones(2))


@pytest.mark.parametrize("where", ["one value", "the description", "another run's", "cut off"])
def test_a_damaged_file_is_named_and_made_again(where: str, tmp_path: Path) -> None:
    model = dense()
    sc.reconstruct_(model, "2:4", sc.sparsegpt, batches(), checkpoint=tmp_path)
    file = tmp_path / FIRST
    whole, metadata = load_file(file), dict(read_metadata(file))
    if where == "one value":
        next(iter(whole.values())).view(torch.int32)[0, 0] ^= 1
    elif where == "the description":
        metadata["description"] = metadata["description"].replace("0.5", "0.6")
    elif where == "another run's":
        metadata["run"] = "0" * 64
    save_file(whole, file, metadata)
    if where == "cut off":
        file.write_bytes(file.read_bytes()[:-4])
    again = dense()
    before = {name: t.clone() for name, t in again.state_dict().items()}
    with pytest.raises(ValueError, match=f"{FIRST} of the checkpoint is damaged: .*: remove this"):
        sc.reconstruct_(again, "2:4", sc.sparsegpt, batches(), checkpoint=tmp_path)
    assert all(torch.equal(before[name], t) for name, t in again.state_dict().items())
    file.unlink()
    sc.reconstruct_(again, "2:4", sc.sparsegpt, batches(), checkpoint=tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in again.state_dict().items())


@pytest.mark.parametrize("what", ["one bit", "another order", "one batch less"])
def test_other_data_is_another_run(what: str, tmp_path: Path) -> None:
    sc.reconstruct_(dense(), "2:4", sc.sparsegpt, batches(), checkpoint=tmp_path)
    other = batches()
    if what == "one bit":
        other[-1].view(torch.int32)[-1, -1, -1] ^= 1
    elif what == "another order":
        other.reverse()
    else:
        other.pop()
    with pytest.raises(ValueError, match="belongs to another run, its batches differs"):
        sc.reconstruct_(dense(), "2:4", sc.sparsegpt, other, checkpoint=tmp_path)


def test_a_digest_tells_what_numbers_do_not() -> None:
    x = torch.tensor([0.0, 1.0])
    assert digest([x]) == digest([x.clone()])
    others = [torch.tensor([-0.0, 1.0]), x.double(), x.view(1, 2), [x, "a"]]
    assert len({digest([other]) for other in [x, *others]}) == 5
