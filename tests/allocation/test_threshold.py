"""One threshold for all layers: the count to the weight, floors, and how scores compare."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.allocation import threshold
from secateur.criteria import fisher, taylor
from secateur.patterns import Unstructured
from tests.models import Decoder


def net(seed: int = 0, levels: int = 0) -> nn.Sequential:
    """Linear layers of different sizes and scales, perhaps with many equal weights."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 30), nn.Linear(30, 6), nn.Linear(6, 4))
    with torch.no_grad():
        for scale, layer in zip((0.4, 1.0, 2.0), model, strict=True):
            drawn = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_((drawn * levels).round() / levels if levels else drawn * scale)
    return model


def zeros_of(model: nn.Module) -> dict[str, int]:
    return {
        name: int((module.weight == 0).sum())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def ids() -> list[Tensor]:
    return [torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))]


@given(
    st.floats(0, 0.98), st.sampled_from(["none", "rms", "lamp"]), st.integers(0, 50),
    st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_all_layers_together_lose_as_many_as_asked_for(
    sparsity: float, normalise: Any, seed: int, levels: int
) -> None:
    model = net(seed, levels)
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(2 * (layer.weight == 0))  # zeros will be those that were made
    made = Unstructured(sparsity, "layer")
    found = threshold(model, made, normalise=normalise, floor=0.01)
    assert list(found) == ["0", "1", "2"]
    sc.prune_(model, sc.plan(model, found))
    total = sum(layer.weight.numel() for layer in model)
    assert sum(zeros_of(model).values()) == int(sparsity * total + 0.5)
    for layer in model:
        assert int((layer.weight != 0).sum()) >= math.ceil(0.01 * layer.weight.numel())


def test_magnitudes_as_they_are_are_torch_s_global_unstructured() -> None:
    from torch.nn.utils import prune

    model = net()
    other = copy.deepcopy(model)
    sc.prune_(model, sc.plan(model, threshold(model, "unstructured:0.8@layer", normalise="none")))
    prune.global_unstructured(
        [(layer, "weight") for layer in other], prune.L1Unstructured, amount=0.8
    )
    for one, two in zip(model, other, strict=True):
        assert torch.equal(one.weight, two.weight)
    # the first layer's are smallest, so most zeros are there
    assert zeros_of(model)["0"] > 0.95 * 240 > zeros_of(model)["1"]


def test_by_rms_the_scale_of_a_layer_does_not_matter() -> None:
    model = net()
    found = threshold(model, "unstructured:0.8@layer", normalise="rms")
    with torch.no_grad():
        model[1].weight.mul_(64)
    assert threshold(model, "unstructured:0.8@layer", normalise="rms") == found
    assert all(0.7 < pattern.sparsity < 0.9 for pattern in found.values())
    root = {name: model.get_submodule(name).weight.square().mean().sqrt() for name in found}
    least = {
        name: (model.get_submodule(name).weight.abs() / root[name]).flatten() for name in found
    }
    cut = torch.cat(list(least.values())).kthvalue(round(0.8 * 444)).values
    for name, scores in least.items():
        assert round(found[name].sparsity * scores.numel()) == int((scores <= cut).sum())


def test_lamp_is_the_paper_s() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[10.0, 10.0], [10.0, 12.0]]))
    # LAMP: 1/30, 4/29, 9/25, 1 and, counted as equals, 100/444 three times, 1
    for zeros, expected in ((2, (2, 0)), (5, (2, 3)), (6, (3, 3))):
        found = threshold(model, Unstructured(zeros / 8, "layer"), normalise="lamp")
        assert [round(4 * p.sparsity) for p in found.values()] == list(expected)


def test_scores_below_zero_are_the_lowest() -> None:
    model = net()
    weights = torch.cat([layer.weight.flatten() for layer in model])
    for sparsity in (0.3, 0.8):
        cut = weights.kthvalue(int(sparsity * 444 + 0.5)).values
        found = threshold(
            model, Unstructured(sparsity, "layer"), lambda weight: weight, normalise="none"
        )
        for layer, pattern in zip(model, found.values(), strict=True):
            n = layer.weight.numel()
            assert round(pattern.sparsity * n) == int((layer.weight <= cut).sum())


def test_ties_go_to_the_earlier_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(-1.0)
    found = threshold(model, "unstructured:0.75@layer", normalise="none", floor=0.125)
    assert [round(8 * pattern.sparsity) for pattern in found.values()] == [5, 7]


@settings(max_examples=20)
@given(st.floats(0, 0.29), st.integers(0, 20))
def test_a_floor_is_kept_and_changes_nothing_where_it_does_not_bind(
    floor: float, seed: int
) -> None:
    model = net(seed)
    free = threshold(model, "unstructured:0.7@layer", normalise="none")
    held = threshold(model, "unstructured:0.7@layer", normalise="none", floor=floor)
    if all(1 - pattern.sparsity >= floor + 0.05 for pattern in free.values()):
        assert held == free
    for name, pattern in held.items():
        n = model.get_submodule(name).weight.numel()
        assert n - round(pattern.sparsity * n) >= floor * n


@pytest.mark.parametrize("criterion", [taylor, fisher])
def test_gradients_are_compared_over_the_whole_model(criterion: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, batches = Decoder(), ids()
    made = threshold(
        model, "unstructured:0.4@layer", criterion, batches, normalise="none", ignore=["lm_head"]
    )
    whole = {
        name: torch.zeros_like(model.get_submodule(name).weight, dtype=torch.float64)
        for name in made
    }
    rows = [row[None] for batch in batches for row in batch] if criterion is fisher else batches
    for row in rows:
        model.eval().zero_grad()
        logits = model(row)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten())
        loss.backward()
        for name, total in whole.items():
            gradient = model.get_submodule(name).weight.grad.double()
            total += (gradient.square() if criterion is fisher else gradient) / len(rows)
    scores = {
        name: (
            model.get_submodule(name).weight.double().square() * total
            if criterion is fisher
            else (model.get_submodule(name).weight.double() * total).square()
        )
        for name, total in whole.items()
    }
    n = sum(score.numel() for score in scores.values())
    cut = torch.cat([score.flatten() for score in scores.values()]).kthvalue(int(0.4 * n + 0.5))
    masks = {name: (score > cut.values).detach() for name, score in scores.items()}
    report = sc.prune_(model, sc.plan(model, made), criterion, batches)
    assert report.zeros == int(0.4 * n + 0.5)
    differ = sum(
        int(((model.get_submodule(name).weight != 0) != mask).sum()) for name, mask in masks.items()
    )
    assert differ <= 4  # of thousands around the cut, where float32 gradients and float64 disagree


def test_blocks_compete_as_wholes() -> None:
    model = net()
    found = threshold(model, "block:2x2@0.5", normalise="none")
    assert all(str(pattern).startswith("block:2x2@") for pattern in found.values())
    sc.prune_(model, sc.plan(model, found))
    tiles = [
        layer.weight.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).abs().sum((1, 3))
        for layer in model
    ]
    assert sum(int((tile == 0).sum()) for tile in tiles) == (60 + 45 + 6 + 1) // 2


def test_a_plan_file_keeps_the_count_to_the_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1999, 1009), nn.Linear(1009, 2003))
    found = threshold(model, "unstructured:0.6137@layer", normalise="none")
    plan = sc.plan(model, found)
    plan.write(tmp_path / "plan.yaml")
    assert sc.read_plan(tmp_path / "plan.yaml").layers == plan.layers
    sc.prune_(model, sc.read_plan(tmp_path / "plan.yaml"))
    n = 1009 * (1999 + 2003)
    assert sum(zeros_of(model).values()) == int(0.6137 * n + 0.5)


def test_a_layer_that_loses_everything_is_told() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"1 of 3 layers lose all their weights, first 2: give"):
        found = threshold(model, "unstructured:0.5@layer", normalise="none")
    sc.prune_(model, sc.plan(model, found))
    assert zeros_of(model)["2"] == 24
    found = threshold(model, "unstructured:0.5@layer", normalise="none", floor=0.05)
    assert round(found["2"].sparsity * 24) == 22  # 0.05 * 24 is 1.2


def test_what_it_refuses() -> None:
    model = net()
    ask = partial(threshold, normalise="none")
    with pytest.raises(ValueError, match=r"one budget for a layer, got unstructured:0.5: such as"):
        ask(model, "unstructured:0.5")
    with pytest.raises(ValueError, match=r"one budget for a layer, got 2:4"):
        ask(model, "2:4")
    with pytest.raises(ValueError, match=r"one budget for a layer, got channels:0.5"):
        ask(model, "channels:0.5")
    with pytest.raises(
        ValueError, match=r"0.6 in each layer leaves 177 of 444 to drop, 222 are asked for"
    ):
        ask(model, "unstructured:0.5@layer", floor=0.6)
    with pytest.raises(ValueError, match=r"a floor in \[0, 1\], got 5"):
        ask(model, "unstructured:0.5@layer", floor=5.0)
    with pytest.raises(ValueError, match="taylor needs calibration data for gradient"):
        ask(model, "unstructured:0.5@layer", taylor)
    with pytest.raises(ValueError, match=r"layer 0: 'lamp' needs scores of at least 0, got -"):
        threshold(model, "unstructured:0.5@layer", lambda weight: weight, normalise="lamp")


def test_a_way_to_normalise_that_is_none(unchecked: None) -> None:
    other: Any = "l2"
    with pytest.raises(ValueError, match="normalise is one of none, rms, lamp, got 'l2'"):
        threshold(net(), "unstructured:0.5@layer", normalise=other)
