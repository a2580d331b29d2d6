"""Other tensors in place of weights: the law for every kind of matrix, and several in one."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.model.layers import layers_of, parameter_of, weight_in, weight_of
from secateur.model.piece import parameter_name
from secateur.model.replaced import with_weights
from tests.model.test_piece import KINDS, MODELS


@KINDS
@given(seed=st.integers(0, 2**16))
def test_it_is_what_writing_the_weight_would_give_and_so_is_its_gradient(
    number: int, seed: int
) -> None:
    """The parameter with the weight written into it; upstream's part at the weight's place."""
    model, name = MODELS[number]
    layer, generator = layers_of(model)[name], torch.Generator().manual_seed(seed)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    new = torch.randn(weight_of(layer).shape, generator=generator).requires_grad_()
    ((key, found),) = with_weights({name: layer}, {name: new}).items()
    assert key == parameter_name(name, layer)
    expected = before[key].clone()
    weight_in(layer, expected).copy_(new.detach())
    assert torch.equal(found.detach(), expected)
    upstream = torch.randn(found.shape, generator=generator)
    found.backward(upstream)
    assert new.grad is not None and torch.equal(new.grad, weight_in(layer, upstream))
    for other, value in model.named_parameters():
        assert torch.equal(value, before[other]) and value.grad is None


def test_matrices_of_one_parameter_are_replaced_together() -> None:
    attention = nn.MultiheadAttention(4, 2)
    layers = layers_of(attention)
    new = {f"in_proj_weight.{n}": torch.randn(4, 4, requires_grad=True) for n in "qv"}
    found = with_weights(layers, {**new, "out_proj": torch.ones(4, 4)})
    q, k, v = found["in_proj_weight"].detach().split(4)
    assert torch.equal(q, new["in_proj_weight.q"]) and torch.equal(v, new["in_proj_weight.v"])
    assert torch.equal(k, attention.in_proj_weight[4:8])
    assert torch.equal(found["out_proj.weight"], torch.ones(4, 4))
    (3 * found["in_proj_weight"]).sum().backward()
    assert all(w.grad is not None and bool((w.grad == 3).all()) for w in new.values())


def test_a_copy_in_another_dtype_is_in_that_of_the_given() -> None:
    lstm = nn.LSTM(4, 3).bfloat16()
    layer = layers_of(lstm)["weight_hh_l0"]
    given_ = torch.randn(12, 3)
    (found,) = with_weights({"": layer}, {"": given_}).values()
    assert found.dtype == torch.float32 and torch.equal(found, given_)
    assert parameter_of(layer).dtype == torch.bfloat16
