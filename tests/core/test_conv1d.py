"""GPT-2's `Conv1D`: the linear that it computes, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.conv1d import as_linear, conv1d, is_conv1d

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
sizes = st.integers(1, 9)


def test_it_is_known_by_what_it_is() -> None:
    assert is_conv1d(Conv1D(3, 2))
    assert not is_conv1d(torch.nn.Conv1d(3, 2, 1)) and not is_conv1d(torch.nn.Linear(2, 3))


@given(out=sizes, width=sizes)
def test_its_linear_computes_the_same_from_the_same_memory(out: int, width: int) -> None:
    layer, x = Conv1D(out, width), torch.randn(4, width)
    linear = as_linear(layer)
    assert linear.weight.shape == (out, width)
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.weight.data_ptr() == layer.weight.data_ptr() and linear.bias is layer.bias


@given(out=sizes, width=sizes)
def test_conv1d_undoes_as_linear(out: int, width: int) -> None:
    layer, x = Conv1D(out, width), torch.randn(4, width)
    again = conv1d(Conv1D, as_linear(layer).weight.detach())
    again.bias = layer.bias
    assert type(again) is Conv1D and repr(again) == repr(layer)
    assert torch.equal(again.weight, layer.weight) and again.weight.is_contiguous()
    assert torch.equal(again(x), layer(x))
