"""Laws that every exported criterion keeps; a new one is tested here by being exported."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import criteria
from secateur.model.statistics import GRADIENTS, needed_by

CRITERIA: list[Callable[..., Tensor]] = [vars(criteria)[name] for name in criteria.__all__]
each_criterion = pytest.mark.parametrize("criterion", CRITERIA, ids=criteria.__all__)

# A baseline, and a variant of `magnitude`, which has the source.
WITHOUT_A_PAPER = {sc.criteria.random, criteria.magnitude_l2}


@each_criterion
def test_prunes_a_model_to_the_plan(criterion: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = sc.plan(model, "2:4")
    batches = [torch.randn(40, 16) for _ in range(2)]
    report = sc.prune_(
        model, plan, criterion, batches, loss=lambda output, batch: output.square().mean()
    )
    assert [r.sparsity for r in report.layers] == [0.5, 0.5]
    assert sc.check(model, plan) == {"0": 0.5, "2": 0.5}
    for name, parameter in model.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], dense[name][kept])


@each_criterion
def test_asks_only_for_statistics_there_are(criterion: Callable[..., Tensor]) -> None:
    needed_by(criterion, given=("weight", "layer_seed"))


@each_criterion
def test_says_where_it_comes_from(criterion: Callable[..., Tensor]) -> None:
    doc = inspect.getdoc(criterion)
    assert doc is not None
    assert bool(re.search(r"arXiv:\d{4}\.\d{5}", doc)) == (criterion not in WITHOUT_A_PAPER)


@each_criterion
def test_a_bf16_weight_gets_finite_scores(criterion: Callable[..., Tensor]) -> None:
    available = {
        "weight": torch.randn(4, 8).bfloat16(),
        "layer_seed": 3,
        "input_norm": torch.rand(8),
        "gram": torch.eye(8),
        **{name: torch.rand(4, 8) for name in GRADIENTS},
    }
    names = inspect.signature(criterion).parameters
    score = criterion(**{k: v for k, v in available.items() if k in names})
    assert score.shape == (4, 8)
    assert score.isfinite().all()
