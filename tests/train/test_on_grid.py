"""Latent weights behind layers: what the layers get, and where their gradients go."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import secateur as sc
from secateur.model import layers as _layers
from secateur.patterns import Int3
from secateur.patterns.grids import Grid
from secateur.train.on_grid import SHARE_OF_SCALES, Latent, OnGrid, kept_rms

GRIDS = (Int3(8), sc.Int4(None), sc.Int8(), sc.Fp8())


def made() -> tuple[nn.Module, dict[str, nn.Module], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    return model, {"0": model[0], "3": model[3]}, torch.randn(7, 4, 4, 4)


def latent_of(layers: dict[str, nn.Module], grid: Grid, clipped: float = 0.8) -> dict[str, Latent]:
    """Latent weights of which some are beyond the largest code, half of them dropped."""
    found = {}
    for name, module in layers.items():
        weight = _layers.matrix(module).detach().clone()
        scales = clipped * grid.scales(weight)
        found[name] = Latent(weight, scales, sc.NM(2, 4).mask(weight.abs()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_layers_get_what_the_latent_weights_round_to(grid: Grid, dtype: torch.dtype) -> None:
    _, layers, _ = made()
    latent = latent_of(layers, grid)
    OnGrid(layers, latent, grid, dict.fromkeys(layers, dtype)).place_()
    for name, module in layers.items():
        weight, scales, mask = latent[name]
        kept = grid.dequantised(grid.codes(weight, scales.to(dtype)), scales.to(dtype)).to(dtype)
        expected = kept.float().masked_fill(~mask, 0)
        assert torch.equal(_layers.matrix(module).detach(), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_gradients_are_those_of_autograd_through_the_whole_model(grid: Grid) -> None:
    model, layers, x = made()
    latent = latent_of(layers, grid)
    on_grid = OnGrid(layers, latent, grid, dict.fromkeys(layers, torch.float32))
    on_grid.place_()
    model(x).square().sum().backward()
    on_grid.gradients_()
    leaves = {
        name: (found.weight.double().requires_grad_(), found.scales.double().requires_grad_())
        for name, found in latent.items()
    }
    weights = {
        f"{name}.weight": _layers.from_matrix(
            layers[name],
            grid.straight_through(*leaves[name], torch.float64).masked_fill(~latent[name].mask, 0),
        )
        for name in layers
    }
    functional_call(copy.deepcopy(model).double(), weights, x.double()).square().sum().backward()
    for name, (weight, scales) in leaves.items():
        for own, expected in ((on_grid.weights, weight), (on_grid.scales, scales)):
            found = own[name].grad
            assert found is not None and expected.grad is not None
            torch.testing.assert_close(found.double(), expected.grad, rtol=1e-3, atol=1e-4)
            assert bool(expected.grad.any())
        assert on_grid.weights[name].grad[~latent[name].mask].eq(0).all()  # type: ignore[index]
        assert layers[name].weight.grad is None


def test_a_layer_that_a_batch_does_not_reach_takes_no_step() -> None:
    model, layers, x = made()
    on_grid = OnGrid(
        layers, latent_of(layers, sc.Int4()), sc.Int4(), dict.fromkeys(layers, torch.float32)
    )
    trained = on_grid.trained(0.1)
    before = {name: p.detach().clone() for name, p in trained.parameters.items()}
    on_grid.place_()
    model[0](x).square().sum().backward()
    trained.gradients_()
    trained.step_(0.1, 0)
    moved = {name for name, p in trained.parameters.items() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.scales"}


def test_scales_have_a_learning_rate_of_their_own() -> None:
    _, layers, _ = made()
    latent = latent_of(layers, sc.Int8())
    on_grid = OnGrid(layers, latent, sc.Int8(), dict.fromkeys(layers, torch.float32))
    weights, *scales = on_grid.trained(0.5).optimizer.param_groups
    assert len(weights["params"]) == 2 and weights.get("share", 1.0) == 1.0
    unit = torch.cat([found.weight.flatten() for found in latent.values()]).square().mean().sqrt()
    assert kept_rms(found.weight for found in latent.values()) == pytest.approx(float(unit))
    for group, found in zip(scales, latent.values(), strict=True):
        of_scales = float(found.scales.square().mean().sqrt())
        assert group["share"] == pytest.approx(SHARE_OF_SCALES * of_scales / float(unit))
