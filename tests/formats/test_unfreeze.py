"""A packed layer whose weight trains: `values` is a parameter, and all else still works."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, unpack_
from secateur.formats.linear import REFERENCE
from tests.formats.weights import (
    DYNAMIC,
    EXACT,
    QUANTISED,
    changed,
    fitting_weight,
    sparse_linear,
    tokens_in,
)


def trained(layer: nn.Module, steps: int = 3, keep: Tensor | None = None) -> list[float]:
    """The losses of some steps of SGD with momentum; zeros stay zero where `keep` says so."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    x, target = tokens_in(5, 7, 24, seed=8), tokens_in(5, 7, 16, seed=9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        if keep is not None:
            layer.get_parameter("weight").grad.mul_(keep)  # type: ignore[union-attr]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("format", EXACT)
def test_it_trains_as_the_dense_layer_does_under_its_mask(format: str) -> None:
    layer = sparse_linear(format).unfreeze_()
    ones = torch.ones_like(layer.packed["values"])
    places = changed(layer.packed, values=ones).dense()
    dense = nn.Linear(24, 16)
    dense.weight.data.copy_(fitting_weight(format, 16, 24))
    dense.bias.data.copy_(layer.bias.data)
    assert trained(layer) == pytest.approx(trained(dense, keep=places), rel=1e-5)
    assert torch.allclose(layer.weight, dense.weight, rtol=1e-4, atol=1e-6)
    assert not torch.equal(layer.weight, fitting_weight(format, 16, 24))


@pytest.mark.parametrize("format", EXACT)
def test_values_alone_get_their_gradients(format: str) -> None:
    """Neither the input nor the bias asks for any, so that nothing but `values` is followed."""
    layer = sparse_linear(format).unfreeze_()
    layer.bias.requires_grad_(False)
    layer(tokens_in(3, 24, seed=8)).square().sum().backward()
    assert layer.values.grad is not None and bool(layer.values.grad.any())


def test_only_values_become_a_parameter_and_once() -> None:
    layer = sparse_linear("block:4x8")
    assert [name for name, _ in layer.named_parameters()] == ["bias"] and not layer.trains
    assert layer.unfreeze_() is layer and layer.trains
    values = layer.values
    assert isinstance(values, nn.Parameter)
    assert layer.unfreeze_().values is values
    assert {name for name, _ in layer.named_parameters()} == {"bias", "values"}
    assert list(layer.state_dict()) == ["bias", *layer.format.tensors]


def test_the_optimizers_parameter_survives_tables_casts_and_loading() -> None:
    layer = sparse_linear("block:4x8").unfreeze_()
    values, state = layer.values, copy.deepcopy(layer.state_dict())
    layer.use(REFERENCE)
    assert layer.values is values
    layer.double()
    assert layer.values is values and values.dtype == torch.float64
    layer.float()
    values.data.zero_()
    layer.load_state_dict(state)
    assert layer.values is values and torch.equal(values, state["values"])


def test_copies_and_pickles_train_on() -> None:
    layer = sparse_linear("block:4x8").unfreeze_()
    buffer = io.BytesIO(pickle.dumps(layer))
    for other in (copy.deepcopy(layer), pickle.load(buffer)):
        assert other.trains and other.values is not layer.values
        assert other.dispatch == layer.dispatch
        assert trained(copy.deepcopy(layer)) == trained(other)


@pytest.mark.parametrize("format", EXACT)
def test_what_is_unpacked_is_what_was_trained(format: str) -> None:
    model = nn.Sequential(sparse_linear(format).unfreeze_())
    trained(model)
    wanted = model[0].weight
    unpack_(model)
    assert type(model[0]) is nn.Linear and model[0].weight.is_leaf
    assert torch.equal(model[0].weight, wanted)


@pytest.mark.parametrize("format", ["semi24", "block:4x8"])
def test_a_fused_activation_has_gradients(format: str) -> None:
    layer = sparse_linear(format, bias=False).unfreeze_()
    x = tokens_in(3, 24)
    (wanted,) = torch.autograd.grad(torch.relu(layer(x)).sum(), [layer.values])
    layer.activation = "relu"
    (found,) = torch.autograd.grad(layer(x).sum(), [layer.values])
    assert torch.equal(found, wanted)


def test_what_does_not_read_the_values_is_refused() -> None:
    layer = sparse_linear("block:4x8").unfreeze_()
    assert "simd" not in layer.dispatch
    with pytest.raises(ValueError, match="cannot run simd here: it does not read values, which"):
        layer.use((("simd", None),))
    assert layer.trains


@pytest.mark.parametrize("format", QUANTISED + DYNAMIC)
def test_codes_are_not_trained(format: str) -> None:
    layer: SparseLinear = sparse_linear(format)
    with pytest.raises(ValueError, match="'layer' needs an exact format to train its weight, got"):
        layer.unfreeze_()
    assert not layer.trains
