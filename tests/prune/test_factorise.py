"""Layers as products of two thin ones: the best of their rank for the outputs."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.prune import factorise as the_verb
from secateur.prune.factorise import as_pairs_, factorise_, rank_for
from tests.prune.shrink.models import language_model, logits, rows


def inputs(count: int = 3, width: int = 12) -> list[Tensor]:
    """Batches that depend on one another, in float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return [
        torch.randn(40, width, generator=generator, dtype=torch.float64) @ mixing
        for _ in range(count)
    ]


def net(hidden: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 10)).double()


@torch.no_grad()
def test_the_error_is_the_optimum_for_the_gram_matrix() -> None:
    """What SVD-LLM's whitening by Cholesky leaves: the tail of the singular values of W L."""
    model, batches = net(), inputs()
    W, X = model[0].weight.clone(), torch.cat(batches)
    report = factorise_(model, batches, 0.4, layers="0", damping=0.0)
    (layer,) = report.layers
    assert layer.rank == int(0.6 * 12 * 20 / 32) == 4
    values = torch.linalg.svdvals(W @ torch.linalg.cholesky(X.T @ X)).square()
    first, second = model[0]
    lost = (X @ (W - second.weight @ first.weight).T).square().sum() / (X @ W.T).square().sum()
    # at the optimum an error of the Gram matrix counts by its square; it is a sum in float32
    assert float(lost) == pytest.approx(float(values[4:].sum() / values.sum()), rel=1e-9)
    assert layer.error == pytest.approx(float(lost), rel=1e-6)
    left, values, right = torch.linalg.svd(W, full_matrices=False)
    plain = left[:, :4] * values[:4] @ right[:4]
    assert float((X @ (W - plain).T).square().sum() / (X @ W.T).square().sum()) > layer.error


@torch.no_grad()
def test_the_model_is_ordinary_and_computes_the_products() -> None:
    model, batches = net(), inputs()
    dense = copy.deepcopy(model)
    report = factorise_(model, batches, 0.25)
    assert [type(part) for part in model[0]] == [nn.Linear, nn.Linear]
    assert model[0][0].bias is None and torch.equal(model[0][1].bias, dense[0].bias)
    keys = ["0.0.weight", "0.1.weight", "0.1.bias", "2.0.weight", "2.1.weight", "2.1.bias"]
    assert sorted(model.state_dict()) == sorted(keys)
    x = batches[0]
    for layer in (dense[0], dense[2]):
        place = 0 if layer is dense[0] else 2
        layer.weight.copy_(model[place][1].weight @ model[place][0].weight)
    torch.testing.assert_close(model(x), dense(x))
    assert [(r.before, r.after) for r in report.layers] == [(240, 5 * 32), (200, 5 * 30)]
    assert report.parameters_before - report.parameters == 240 + 200 - 5 * 62
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_each_pair_is_the_best_for_what_the_pairs_before_it_make() -> None:
    model, batches = net(), inputs()
    W = model[2].weight.clone()
    report = factorise_(model, batches, 0.4, damping=0.0)
    X = model[1](model[0](torch.cat(batches)))
    values = torch.linalg.eigvalsh(W @ (X.T @ X) @ W.T).flip(0)
    rank = report.layers[1].rank
    expected = float(values[rank:].sum() / values.sum())
    assert report.layers[1].error == pytest.approx(expected, rel=1e-6)


def test_a_language_model_runs_and_its_state_dict_is_loaded_into_pairs() -> None:
    model = language_model("Llama")
    fresh = copy.deepcopy(model)
    report = factorise_(model, rows(), 0.3, ignore="*.k_proj")
    assert {r.layer.rpartition(".")[2] for r in report.layers} == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert report.left["lm_head"].startswith("output head")
    assert all(layer.after <= 0.7 * layer.before for layer in report.layers)
    as_pairs_(fresh, report.ranks)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert model.generate(rows(1)[0][:1], max_new_tokens=4).shape[1] == 15


def test_gpt2s_layers_become_pairs_of_linear_layers() -> None:
    model = language_model("GPT2", num_hidden_layers=1)
    before = logits(model)
    report = factorise_(model, rows(), 0.3)
    change = (logits(model) - before).norm() / before.norm()
    assert 0 < float(change) < 1 and len(report.layers) == 4


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.9]))
def test_the_rank_is_the_largest_that_saves_the_share(out: int, in_: int, share: float) -> None:
    rank, percent = rank_for(out, in_, share), round(100 * share)
    assert 100 * rank * (out + in_) <= (100 - percent) * out * in_
    assert 100 * (rank + 1) * (out + in_) > (100 - percent) * out * in_


class Reads(nn.Module):
    """A model that reads a layer's weight, which a pair does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.second.weight.norm()


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_that_cannot_run_pairs_is_left_as_it_was() -> None:
    model = Reads().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match="Reads cannot run pairs in place of layers: .* no attribute 'weight': leave",
    ):
        factorise_(model, inputs(), 0.3)
    assert_untouched(model, before)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(the_verb, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        factorise_(model, inputs(), 0.3)
    assert_untouched(model, before)


def test_what_cannot_be_done_is_said() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"share is of the weights that go, in \(0, 1\), got 25"):
        factorise_(model, inputs(), 25.0)
    with pytest.raises(ValueError, match="0: 20 x 12 weights are too few for a pair of 5% of them"):
        factorise_(model, inputs(), 0.95, layers="0")
    conv = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match="0: it is a Conv2d, and a pair stands for a lin"):
        factorise_(conv, [torch.randn(2, 3, 8, 8)], 0.3)
    with pytest.raises(ValueError, match="5 cannot become a pair: there is none"):
        as_pairs_(model, {"5": 2})


def test_zeros_may_follow() -> None:
    model = net(40)
    factorise_(model, inputs(), 0.2)
    plan = sc.plan(model, "unstructured:0.5")
    assert list(plan.layers) == ["0.0", "0.1", "2.0", "2.1"]
    sc.prune_(model, plan)
    sc.check(model, plan)
