"""A training state comes back as it was, and another run's is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.train.state import TrainingState


def trained(seed: int, steps: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "a.weight": nn.Parameter(torch.randn(2, 3, generator=generator)),
        "never.used": nn.Parameter(torch.ones(1)),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        parameters["a.weight"].grad = torch.randn(2, 3, generator=generator)
        optimizer.step()
    return parameters, optimizer


def test_parameters_and_moments_come_back_and_the_next_step_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    parameters, optimizer = trained(0)
    with TrainingState(folder, {"run": 1}) as state:
        state.keep(parameters, optimizer, [3.0, 2.0, 1 / 3], 12.5)
    assert sorted(p.name for p in folder.iterdir()) == [
        "progress.json",
        "step-00000003.safetensors",
    ]
    others, other = trained(1, steps=0)
    with TrainingState(folder, {"run": 1}) as state:
        assert (state.losses, state.seconds) == ([3.0, 2.0, 1 / 3], 12.5)
        state.restore(others, other)
    for p, o in ((parameters, optimizer), (others, other)):
        p["a.weight"].grad = torch.ones(2, 3)
        o.step()
    assert torch.equal(parameters["a.weight"], others["a.weight"])
    assert "never.used" in others and float(other.state[others["a.weight"]]["step"]) == 4


def test_only_the_newest_step_is_kept(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    with TrainingState(tmp_path, {}) as state:
        state.keep(parameters, optimizer, [1.0], 0.0)
        state.keep(parameters, optimizer, [1.0, 2.0], 0.0)
        state.keep(parameters, optimizer, [1.0, 2.0], 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "progress.json",
        "step-00000002.safetensors",
    ]
    with TrainingState(tmp_path, {}) as state:
        assert state.losses == [1.0, 2.0]


def test_without_a_kept_step_nothing_is_restored(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    before = parameters["a.weight"].detach().clone()
    with TrainingState(tmp_path / "absent", {}) as state:
        state.restore(parameters, optimizer)
    assert torch.equal(parameters["a.weight"], before) and state.losses == []
    assert not (tmp_path / "absent").exists()


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    parameters, optimizer = trained(0)
    with TrainingState(folder, {"seed": 1, "steps": 5}) as state:
        state.keep(parameters, optimizer, [1.0], 0.0)
    with pytest.raises(
        ValueError, match=r"state belongs to another run, its steps differs: choose"
    ):
        TrainingState(folder, {"seed": 1, "steps": 6})
    (folder / "progress.json").write_text(json.dumps({"fingerprint": {}}))
    with pytest.raises(ValueError, match=r"progress.json is not a checkpoint: it has another form"):
        TrainingState(folder, {})
    with pytest.raises(ValueError, match="needs an empty folder or its own, .* has 'state'"):
        TrainingState(tmp_path, {})


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    with TrainingState(tmp_path, {}) as state:
        state.keep(parameters, optimizer, [1.0], 0.0)
    file = tmp_path / "step-00000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with (
        TrainingState(tmp_path, {}) as state,
        pytest.raises(ValueError, match=r"step-00000001.safetensors of the checkpoint is damaged"),
    ):
        state.restore(parameters, optimizer)
