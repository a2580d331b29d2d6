"""`warmup`: every kind of packed layer is run once for each number of tokens, nothing else is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear
from tests.formats.weights import sparse_linear, tokens_in


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SparseLinear, Tensor]]:
    """Every call of a packed layer, which still computes."""
    runs: list[tuple[SparseLinear, Tensor]] = []
    forward = SparseLinear.forward

    def noted(self: SparseLinear, input: Tensor) -> Tensor:
        runs.append((self, input))
        result = forward(self, input)
        assert not result.requires_grad
        return result

    monkeypatch.setattr(SparseLinear, "forward", noted)
    return runs


def test_each_kind_of_layer_runs_once_for_each_number_of_tokens(
    runs: list[tuple[SparseLinear, Tensor]],
) -> None:
    first = sparse_linear("semi24", 16, 24)
    kinds = [
        first,
        sparse_linear("semi24", 16, 24, bias=False),
        sparse_linear("semi24", 24, 16),
        sparse_linear("semi24", 16, 24, dtype=torch.bfloat16),
        sparse_linear("semi24_int8", 16, 24),
        sparse_linear("block:4x8", 16, 24),
    ]
    slow = sparse_linear("block:4x8", 16, 24)
    slow.use((("cpu", 4), ("reference", None)))
    kinds.append(slow)
    alike = [sparse_linear("semi24", 16, 24, seed=1), first]
    model = nn.Sequential(nn.Linear(8, 8), *kinds, nn.ModuleList(alike))
    assert sc.warmup(model, tokens=(3, 1, 3)) == len(kinds) == 7
    assert [layer for layer, _ in runs] == [layer for layer in kinds for _ in range(2)]
    for number, (layer, x) in enumerate(runs):
        assert x.shape == ((3, 1)[number % 2], layer.in_features)
        assert x.dtype == layer.packed.dtype and x.device == layer.packed["values"].device
        assert not x.any()


def test_nothing_of_the_model_changes_or_sees_the_zeros() -> None:
    model = nn.Sequential(sparse_linear("semi24", 16, 24), nn.ReLU()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *arguments: seen.append(arguments))
    assert sc.warmup(model) == 1
    assert seen == [] and model[0].training and torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].bias.grad is None and model(tokens_in(2, 24)).requires_grad


def test_a_layer_of_its_own_is_a_model(runs: list[tuple[SparseLinear, Tensor]]) -> None:
    assert sc.warmup(sparse_linear("csr")) == 1
    assert [x.shape[0] for _, x in runs] == [1, 16]


def test_a_model_without_packed_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup needs a packed model, got a Sequential without"):
        sc.warmup(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tokens", [(), (0,), (1, -4), (1.0,), (True,), "ab"], ids=str)
def test_tokens_that_are_no_numbers_are_refused(
    tokens: Any, runs: list[tuple[SparseLinear, Tensor]]
) -> None:
    with pytest.raises(ValueError, match="numbers of tokens from 1 upwards, got .*: name those"):
        sc.warmup(sparse_linear("semi24"), tokens=tokens)
    assert runs == []
