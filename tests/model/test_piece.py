"""Matrices that live in another module's parameter: laws that hold for every kind of matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.model.layers import from_matrix, input_rows, layers_of, matrix, weight_of
from secateur.model.piece import (
    Piece,
    is_expert,
    kind_of,
    owner_name,
    parameter_name,
)
from tests.model.test_einsum import xlnet
from tests.model.test_experts import mixture
from tests.reconstruct.problems import gpt2_and_batches


def of_every_kind() -> list[tuple[nn.Module, str]]:
    """A model and the name of a layer in it."""
    convolution = nn.Sequential(nn.Conv2d(4, 6, (3, 2), bias=False))
    expert = "model.layers.0.mlp.experts"
    return [
        (nn.Sequential(nn.Linear(8, 6, bias=False)), "0"),
        (nn.Sequential(nn.Embedding(8, 6)), "0"),
        (convolution, "0"),
        (gpt2_and_batches(blocks=1)[0], "transformer.h.0.mlp.c_fc"),
        (mixture(), f"{expert}.gate_up_proj.2"),
        (mixture(), f"{expert}.down_proj.1"),
        (mixture("GptOss"), f"{expert}.gate_up_proj.3"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "0.in_proj_weight.k"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "0.out_proj"),
        (nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6)), "0.k_proj_weight"),
        (nn.Sequential(nn.LSTM(6, 4, 2, bidirectional=True)), "0.weight_hh_l1_reverse"),
        (nn.Sequential(nn.GRUCell(6, 4)), "0.weight_ih"),
        (xlnet(), "layer.1.rel_attn.v"),
        (xlnet(), "layer.0.rel_attn.o"),
    ]


KINDS = pytest.mark.parametrize("number", range(len(of_every_kind())))


@KINDS
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_what_is_written_is_read_back_and_nothing_else_changes(
    number: int, seed: int, share: float
) -> None:
    model, name = MODELS[number]
    layer, generator = layers_of(model)[name], torch.Generator().manual_seed(seed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = matrix(layer).detach().clone()
    mask = torch.rand(old.shape, generator=generator) < share
    new = torch.randn(old.shape, generator=generator).masked_fill(mask, 0)
    with torch.no_grad():
        weight_of(layer).copy_(from_matrix(layer, new))
    assert torch.equal(matrix(layers_of(model)[name]), new)
    own = parameter_name(name, layer)
    for key, value in model.state_dict().items():
        if value.data_ptr() != model.get_parameter(own).data_ptr():
            assert torch.equal(value, before[key])
    if is_expert(layer):
        others = [i for i in range(len(before[own])) if i != int(name.rpartition(".")[2])]
        assert torch.equal(model.get_parameter(own)[others], before[own][others])
    if name.endswith("in_proj_weight.k"):
        others = [*range(8), *range(16, 24)]
        assert torch.equal(model.get_parameter(own)[others], before[own][others])
    changed = (model.get_parameter(own) != before[own]).sum()
    assert changed == (new != old).sum()
    zeros = (model.get_parameter(own) == 0).sum() - (before[own] == 0).sum()
    assert zeros == (new == 0).sum() - (old == 0).sum()


MODELS = of_every_kind()


@KINDS
def test_the_matrix_is_out_by_in_of_what_the_layer_multiplies(number: int) -> None:
    model, name = MODELS[number]
    layer = layers_of(model)[name]
    if isinstance(layer, Piece) and not is_expert(layer):
        return  # their owners multiply, which has tests of its own
    if isinstance(layer, nn.Embedding):
        assert torch.equal(layer(torch.arange(8)), matrix(layer))  # its rows are looked up
        return
    width = matrix(layer).shape[1]
    x = torch.randn(2, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(5, width)
    expected = input_rows(layer, x) @ matrix(layer).T
    given_ = layer(x) - (0 if getattr(layer, "bias", None) is None else layer.bias)
    if isinstance(layer, nn.Conv2d):
        given_ = given_.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(given_, expected, atol=1e-5, rtol=1e-5)


@KINDS
def test_the_parameter_and_its_owner_are_found_by_name(number: int) -> None:
    model, name = MODELS[number]
    layer = layers_of(model)[name]
    own = parameter_name(name, layer)
    assert own in dict(model.named_parameters())
    assert own.startswith(owner_name(name, layer))
    owner = model.get_submodule(owner_name(name, layer))
    assert kind_of(layer) == ("Expert" if is_expert(layer) else type(owner).__name__)


def test_a_model_that_is_the_owner_has_no_prefix() -> None:
    module = nn.LSTM(6, 4)
    layer = layers_of(module)["weight_ih_l0"]
    assert parameter_name("weight_ih_l0", layer) == "weight_ih_l0"
    assert owner_name("weight_ih_l0", layer) == ""
    assert parameter_name("", nn.Linear(2, 2)) == "weight"


def test_a_weight_that_was_moved_is_where_its_parameter_is() -> None:
    module = nn.MultiheadAttention(8, 2)
    layer = layers_of(module)["in_proj_weight.v"]
    module.in_proj_weight.data = torch.randn(24, 8)
    assert torch.equal(weight_of(layer), module.in_proj_weight[16:])
