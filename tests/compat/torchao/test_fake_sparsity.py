"""FakeSparsity: zeros that hide, in the weight's own dtype, from checkpoints old and older."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from secateur.compat.torchao import FakeSparsity


def prepared(dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(4, 2, bias=False, dtype=dtype)
    layer.weight.data.copy_(torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]]))
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]], dtype=dtype)
    parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))
    return layer


def test_hidden_weights_are_plus_zero_and_stay_in_original() -> None:
    layer = prepared()
    assert layer.weight.tolist() == [[1, 0, 0, -4], [0, -6, 7, 0]]
    assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    assert layer.parametrizations.weight.original[1].tolist() == [5, -6, 7, -8]


def test_hidden_infinities_are_zero() -> None:
    layer = prepared()
    layer.parametrizations.weight.original.data[0, 1] = math.inf
    assert layer.weight[0].tolist() == [1, 0, 0, -4]


def test_hidden_weights_have_no_gradient() -> None:
    layer = prepared()
    layer(torch.tensor([[1.0, 2, 3, 4]])).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient is not None
    assert gradient.tolist() == [[1, 0, 0, 4], [0, 2, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_a_mask_of_another_dtype_leaves_the_weights_dtype(
    dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    layer = prepared(dtype)
    layer.parametrizations.weight[0].mask.data = torch.eye(2, 4).to(mask_dtype)
    assert layer.weight.dtype == dtype
    assert layer(torch.ones(1, 4, dtype=dtype)).tolist() == [[1, -6]]
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight.dtype == dtype


def test_a_mask_of_another_shape_is_an_error() -> None:
    layer = prepared()
    layer.parametrizations.weight[0].mask.data = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), got \(2, 8\)"):
        layer(torch.ones(1, 4))


def test_the_layout_of_torchao_loads() -> None:
    original, mask = torch.arange(8.0).view(2, 4), torch.eye(2, 4)
    layer = prepared()
    layer.load_state_dict(
        {"parametrizations.weight.original": original, "parametrizations.weight.0.mask": mask}
    )
    assert torch.equal(layer.weight, original * mask)
    assert set(layer.state_dict()) == {
        "parametrizations.weight.original",
        "parametrizations.weight.0.mask",
    }


def test_the_layout_of_core_without_a_mask_loads_and_keeps_the_mask() -> None:
    layer = prepared()
    before = layer.parametrizations.weight[0].mask.clone()
    core = {"parametrizations.weight.original": torch.full((2, 4), 9.0)}
    missing = layer.load_state_dict(core, strict=False).missing_keys
    assert missing == ["parametrizations.weight.0.mask"]
    assert torch.equal(layer.weight, 9 * before)
    with pytest.raises(RuntimeError, match="mask"):
        layer.load_state_dict(core)
