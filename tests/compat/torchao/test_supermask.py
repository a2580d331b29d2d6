"""SupermaskLinear: its mask, exactly counted, its gradients, and the way to and from Linear."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.compat.torchao import SupermaskLinear


def test_from_linear_keeps_the_blocks_of_largest_magnitude_every_time() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    model = nn.Sequential(nn.Linear(128, 64))
    model[0].load_state_dict(linear.state_dict())
    sc.prune_(model, "block:16x16@0.75")
    made = [SupermaskLinear.to_linear(SupermaskLinear.from_linear(linear, 0.75, 16)) for _ in "ab"]
    assert torch.equal(made[0].weight, made[1].weight)
    assert torch.equal(made[0].weight, model[0].weight)
    assert torch.equal(made[0].bias, linear.bias)
    assert type(made[0]) is nn.Linear and sc.check(nn.Sequential(made[0]), "block:16x16@0.75")


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 20),
    inputs=st.integers(1, 20),
    blocksize=st.integers(1, 7),
    share=st.floats(0, 1),
    equal=st.booleans(),
)
def test_the_count_is_exact_whatever_the_shape_and_the_scores(
    out: int, inputs: int, blocksize: int, share: float, equal: bool
) -> None:
    blocks = math.ceil(out / blocksize) * math.ceil(inputs / blocksize)
    level = share * (1 - 1 / blocks)
    layer = SupermaskLinear(level, blocksize, False, False, inputs, out)
    if equal:
        nn.init.ones_(layer.scores)
    mask = layer.get_mask()
    assert mask.shape == layer.weight.shape and set(mask.unique().tolist()) <= {0.0, 1.0}
    kept = mask[::blocksize, ::blocksize]
    assert kept.shape == layer.scores.shape
    assert int((kept == 0).sum()) == int(level * blocks + 0.5)


def test_a_block_at_the_edge_counts_by_the_weights_that_it_has() -> None:
    linear = nn.Linear(5, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, -1.0, 1.0, 1.0, 3.0]])
    assert SupermaskLinear.from_linear(linear, 0.5, 4).scores.tolist() == [[1.0, 3.0]]


def test_the_forward_is_that_of_to_linear_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        linear = nn.Linear(32, 16).to(dtype).eval()
        layer = SupermaskLinear.from_linear(linear, 0.5, 4)
        x = torch.randn(2, 3, 32).to(dtype)
        dense = SupermaskLinear.to_linear(layer)
        assert torch.equal(layer(x), dense(x)) and dense.weight.dtype == dtype
        assert int((dense.weight == 0).sum()) == 16 * 32 // 2
        assert not layer.training and not dense.training


def test_gradients_are_straight_through() -> None:
    """One input, one row: the output is sum m_j w_j x_j, so dy/ds_block = sum w x and dy/dw = x."""
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    layer = SupermaskLinear.from_linear(linear, 0.5, 2)
    assert layer.get_mask().tolist() == [[0.0, 0.0, 1.0, 1.0]]
    layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert layer.scores.grad is not None and layer.weight.grad is not None
    assert layer.scores.grad.tolist() == [[1 - 20, 300 + 4000]]
    assert layer.weight.grad.tolist() == [[1.0, 10.0, 100.0, 1000.0]]


def test_scores_learn_which_block_matters() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0] * 4 + [1.1] * 4])
    layer = SupermaskLinear.from_linear(linear, 0.5, 4)
    layer.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.scores], lr=0.05)
    for _ in range(50):
        x = torch.randn(16, 8)
        loss = (layer(x) - x[:, :4].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.get_mask()[0].tolist() == [1.0] * 4 + [0.0] * 4


def test_fixed_masks_and_weights_do_not_learn() -> None:
    layer = SupermaskLinear(0.5, 4, True, True, 8, 8, bias=False)
    assert not layer.scores.requires_grad and not layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "scores"]


def test_what_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 0\.75, got 0\.9: of 2x2 blocks one has to"):
        SupermaskLinear.from_linear(nn.Linear(8, 8), sparsity_level=0.9, blocksize=4)
    with pytest.raises(ValueError, match="blocksize of at least 1, got 0"):
        SupermaskLinear.from_linear(nn.Linear(8, 8), blocksize=0)
    with pytest.raises(ValueError, match="needs an nn.Linear, got a ReLU"):
        SupermaskLinear.from_linear(nn.ReLU())
