"""Prepared modules exchanged for others, with their hooks and their zeros."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compat.torchao import (
    FakeSparsity,
    WeightNormSparsifier,
    module_contains_param,
    swap_module,
)


class Backend(nn.Linear):
    """What a backend makes of a dense layer."""

    @classmethod
    def from_dense(cls, dense: nn.Linear) -> "Backend":
        new = cls(dense.in_features, dense.out_features, bias=dense.bias is not None)
        new.weight.data.copy_(dense.weight.detach())
        return new


def prepared() -> tuple[nn.Sequential, WeightNormSparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = WeightNormSparsifier(0.5, (1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    return model, sparsifier


def test_a_module_is_known_by_its_parametrization() -> None:
    model, _ = prepared()
    assert module_contains_param(model[2], FakeSparsity)
    assert not module_contains_param(model[2], nn.ReLU)
    assert not module_contains_param(model[0], FakeSparsity)
    assert not module_contains_param(model, FakeSparsity)


def test_convert_swaps_prepared_modules_only_and_they_see_the_zeros() -> None:
    model, sparsifier = prepared()
    converted = sparsifier.convert(model, {nn.Linear: Backend})
    assert [type(module) for module in converted] == [nn.Linear, nn.ReLU, Backend]
    assert torch.equal(converted[2].weight, model[2].weight)
    assert int((converted[2].weight == 0).sum()) == 32
    assert not isinstance(model[2], Backend)
    assert sparsifier.convert(model, {nn.Linear: Backend}, inplace=True) is model
    assert isinstance(model[2], Backend)


def test_a_module_used_twice_is_swapped_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    converted = sparsifier.convert(model, {nn.Linear: Backend})
    assert isinstance(converted[0], Backend)
    assert converted[0] is converted[2]


def test_a_model_that_is_one_layer_is_converted() -> None:
    layer = nn.Linear(4, 4)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(layer)
    assert isinstance(sparsifier.convert(layer, {nn.Linear: Backend}), Backend)


def test_hooks_are_carried_over_with_their_keywords() -> None:
    model, sparsifier = prepared()
    seen: list[str] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(f"before {sorted(kwargs)}")

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append("after")

    model[2].register_forward_pre_hook(before, with_kwargs=True)
    model[2].register_forward_hook(after)
    new = sparsifier.convert(model, {nn.Linear: Backend})[2]
    new(input=torch.ones(1, 8))
    assert seen == ["before ['input']", "after"]


def test_other_types_are_left_alone_and_several_devices_are_an_error() -> None:
    layer = nn.Linear(2, 2)
    assert swap_module(layer, {nn.Conv2d: Backend}) is layer
    layer.bias = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="on one device, this Linear is on cpu, meta"):
        swap_module(layer, {nn.Linear: Backend})


def test_convert_without_a_usable_mapping_is_an_error() -> None:
    model, sparsifier = prepared()
    with pytest.raises(ValueError, match="convert needs a mapping"):
        sparsifier.convert(model)
    with pytest.raises(ValueError, match=r"nn.modules.*ReLU.* for Linear has none"):
        sparsifier.convert(model, {nn.Linear: nn.ReLU}, inplace=True)
    assert module_contains_param(model[2], FakeSparsity)
