"""The same masks, levels and checkpoints as torch.ao.pruning, where that does what it says."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import pruning as core

import secateur.compat.torchao as ao


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 12))


def masked(package: Any, name: str, *arguments: Any) -> tuple[nn.Sequential, Any]:
    model = mlp()
    sparsifier = vars(package)[name](*arguments)
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}]
    sparsifier.prepare(model, config)
    sparsifier.step()
    return model, sparsifier


@pytest.mark.parametrize(
    "arguments",
    [
        ("WeightNormSparsifier", 1.0, (1, 4), 2),
        ("WeightNormSparsifier", 0.3, (1, 4)),
        ("WeightNormSparsifier", 0.5, (4, 2), 5, 1),
        ("WeightNormSparsifier", 0.9, (1, 1)),
        ("WeightNormSparsifier", 0.5, (3, 5)),
        ("WeightNormSparsifier", 2.0, (2, 2)),
        ("WeightNormSparsifier", -1.0, (2, 2)),
        ("NearlyDiagonalSparsifier", 5),
    ],
)
def test_weights_are_masked_alike(arguments: tuple[Any, ...]) -> None:
    (ours, _), (theirs, _) = masked(ao, *arguments), masked(core, *arguments)
    for layer in (0, 2):
        assert torch.equal(ours[layer].weight, theirs[layer].weight)


@pytest.mark.parametrize("settings", [{}, {"init_t": 3, "initially_zero": True}, {"init_sl": 0.2}])
def test_levels_rise_alike(settings: dict[str, Any]) -> None:
    pairs = []
    for package in (ao, core):
        _, sparsifier = masked(package, "WeightNormSparsifier", 0.8)
        scheduler = package.CubicSL(sparsifier, delta_t=2, total_t=4, **settings)
        seen = []
        for _ in range(14):
            sparsifier.step()
            scheduler.step()
            seen.append(scheduler.get_last_sl())
        pairs.append(seen)
    torch.testing.assert_close(torch.tensor(pairs[0]), torch.tensor(pairs[1]), rtol=1e-6, atol=0)


def test_states_of_its_sparsifiers_and_models_load() -> None:
    theirs, source = masked(core, "WeightNormSparsifier", 0.5, (2, 2), 3)
    model = mlp()
    sparsifier = ao.WeightNormSparsifier()
    sparsifier.prepare(model)
    model.load_state_dict(theirs.state_dict(), strict=False)
    state = copy.deepcopy(source.state_dict())
    sparsifier.load_state_dict(state)
    for layer in (0, 2):
        assert torch.equal(model[layer].weight, theirs[layer].weight)
    assert sparsifier.groups[0]["zeros_per_block"] == 3
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, theirs[0].weight)
