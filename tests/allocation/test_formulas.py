"""Allocations by formula: the requested mean, the papers' shapes, and the limits of both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.allocation import erk, owl
from secateur.patterns import Pattern
from tests.models import Decoder


def mean_sparsity(model: nn.Module, found: dict[str, Pattern]) -> float:
    sizes = {name: model.get_submodule(name).weight.numel() for name in found}
    return sum(found[n].sparsity * sizes[n] for n in found) / sum(sizes.values())


def mixed() -> nn.Sequential:
    """A convolution and linear layers of very different sizes."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 400), nn.Linear(400, 100))


def decoder() -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder()
    with torch.no_grad():
        for i, block in enumerate(model.blocks):  # more outliers in each
            block.up_proj.weight[: 2 * i, :2] *= 40
    return model


def ids() -> list[torch.Tensor]:
    return [torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))]


@given(st.floats(0, 0.99))
def test_erk_has_the_sparsity_asked_for(sparsity: float) -> None:
    model = mixed()
    found = erk(model, sc.Unstructured(sparsity, "layer"))
    assert list(found) == ["0", "1", "2"]
    assert mean_sparsity(model, found) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= pattern.sparsity < 1 for pattern in found.values())
    assert all(pattern.scope == "layer" for pattern in found.values())


def test_erk_densities_are_the_formula_and_at_most_one() -> None:
    # sides over products: 17 / 216, 408 / 3200, 500 / 40000; the first two are above 1 at e = 10
    found = erk(mixed(), "unstructured:0.75")
    kept = 0.25 * (216 + 3200 + 40000)
    assert found["0"].sparsity == found["1"].sparsity == 0
    assert found["2"].sparsity == pytest.approx(1 - (kept - 3416) / 40000, abs=1e-12)
    # at 0.98 no layer is dense: e = kept / (17 + 408 + 500)
    found = erk(mixed(), "unstructured:0.98")
    e = 0.02 * 43416 / 925
    for name, ratio in (("0", 17 / 216), ("1", 408 / 3200), ("2", 500 / 40000)):
        assert found[name].sparsity == pytest.approx(1 - e * ratio, abs=1e-12)


def test_formulas_refuse_a_pattern_of_one_sparsity() -> None:
    with pytest.raises(ValueError, match=r"erk needs a pattern of any sparsity, got 2:4: such as"):
        erk(mixed(), "2:4")
    with pytest.raises(ValueError, match=r"owl needs a pattern of any sparsity, got 2:4"):
        owl(decoder(), "2:4", ids())


@settings(max_examples=15)
@given(st.floats(0.2, 0.8), st.floats(0, 0.09))
def test_owl_has_the_sparsity_and_the_band_asked_for(sparsity: float, width: float) -> None:
    model = decoder()
    found = owl(model, sc.Unstructured(sparsity), ids(), width=width)
    assert mean_sparsity(model, found) == pytest.approx(sparsity, abs=1e-9)
    values = [pattern.sparsity for pattern in found.values()]
    assert max(values) - min(values) == pytest.approx(2 * width, abs=1e-9)


def test_owl_is_denser_where_outliers_are_and_one_for_a_block() -> None:
    model = decoder()
    found = owl(model, "unstructured:0.5", ids(), ignore=["lm_head"])
    sparsity = [
        {found[name].sparsity for name in found if name.startswith(f"blocks.{i}.")}
        for i in range(3)
    ]
    assert [len(one) for one in sparsity] == [1, 1, 1]
    (first,), (second,), (third,) = sparsity
    assert first > second > third
    assert model.training


def test_owl_counts_outliers_as_the_paper_does() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 20]]))
        model[1].weight.copy_(torch.tensor([[1.0, 1], [1, 1]]))
    # inputs of norm 1: one of 8 scores is above 5 means (27 / 8), of the second layer's four none
    found = owl(model, "unstructured:0.5", [torch.eye(4)], width=0.1)
    # shares 1/8 and 0, the mean over weights 1/12, so the slope is 0.2 / (1/8)
    assert found["0"].sparsity == pytest.approx(0.5 - 1.6 * (1 / 8 - 1 / 12))
    assert found["1"].sparsity == pytest.approx(0.5 + 1.6 / 12)


def test_owl_refuses_a_band_beyond_all_weights() -> None:
    with pytest.raises(ValueError, match=r"owl needs sparsities in \[0, 1\), got 1\.\d+ for .*"):
        owl(decoder(), "unstructured:0.95", ids(), width=0.2)


def test_a_plan_takes_them() -> None:
    model = decoder()
    plan = sc.plan(model, owl(model, "unstructured:0.5@layer", ids()))
    report = sc.prune_(model, plan)
    zeros = sum(int((model.get_submodule(r.layer).weight == 0).sum()) for r in report.layers)
    weights = sum(rows * columns for rows, columns in plan.shapes.values())
    assert zeros == pytest.approx(weights / 2, abs=len(plan.layers))
