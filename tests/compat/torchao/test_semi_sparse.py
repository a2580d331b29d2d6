"""Training with 2:4 weights or activations: values, gradients, and swapping to and fro."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import _semi_structured_conversions as conversions

from secateur.compat.torchao import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    semi_structured_sparsify,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from secateur.compat.torchao.semi_sparse import tile_mask


def test_a_tile_worked_by_hand() -> None:
    """16 and 15 fill row 0, 14 fills column 0 with 16; what is full takes no more."""
    tile = torch.tensor(
        [
            [16.0, -15.0, 9.0, 8.0],
            [14.0, 13.0, 12.0, 1.0],
            [-11.0, 10.0, 2.0, 3.0],
            [4.0, 5.0, 6.0, 7.0],
        ]
    )
    kept = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert tile_mask(tile).int().tolist() == kept
    assert torch.equal(semi_structured_sparsify(tile), tile * torch.tensor(kept))


def test_the_greedy_choice_is_torch_s_own() -> None:
    """torch's plain version takes the largest values and works in place: give it magnitudes."""
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    theirs = conversions._sparse_semi_structured_tile(x.abs())
    assert torch.equal(tile_mask(x), theirs != 0)
    equal = torch.ones(8, 8)
    theirs = conversions._sparse_semi_structured_tile(equal.clone())
    assert torch.equal(tile_mask(equal), theirs != 0)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 13), columns=st.integers(1, 13), seed=st.integers(0, 99))
def test_rows_and_columns_of_every_tile_keep_two_and_no_more_would_fit(
    rows: int, columns: int, seed: int
) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    keep = F.pad(tile_mask(x), (0, -columns % 4, 0, -rows % 4))
    tiles = keep.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2)
    in_row, in_column = tiles.sum(3), tiles.sum(2)
    assert (in_row <= 2).all() and (in_column <= 2).all()
    fits = (in_row[..., None] < 2) & (in_column[..., None, :] < 2) & ~tiles
    there = F.pad(torch.ones(rows, columns, dtype=torch.bool), (0, -columns % 4, 0, -rows % 4))
    there = there.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2)
    assert not (fits & there).any()


def test_forward_and_gradients_are_those_of_the_pruned_weight() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(16, 8)
    layer = SemiSparseLinear.from_dense(dense)
    x = torch.randn(2, 5, 16, requires_grad=True)
    up = torch.randn(2, 5, 8)
    (layer(x) * up).sum().backward()
    pruned = dense.weight.detach() * tile_mask(dense.weight)
    assert torch.equal(layer(x), F.linear(x, pruned, dense.bias))
    torch.testing.assert_close(x.grad, up @ pruned)
    rows, outputs = x.detach().flatten(0, 1), up.flatten(0, 1)
    torch.testing.assert_close(dense.weight.grad, outputs.T @ rows)
    assert bool(dense.weight.all())


def test_the_activation_s_gradient_is_dense_and_the_weight_s_that_of_the_pruned() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(16, 8, bias=False)
    layer = SemiSparseActivationLinear.from_dense(dense)
    x = torch.randn(2, 5, 16, requires_grad=True)
    up = torch.randn(2, 5, 8)
    (layer(x) * up).sum().backward()
    rows = x.detach().flatten(0, 1)
    pruned = rows * tile_mask(rows)
    torch.testing.assert_close(layer(x), F.linear(pruned, dense.weight).view(2, 5, 8))
    torch.testing.assert_close(x.grad, up @ dense.weight.detach())
    torch.testing.assert_close(dense.weight.grad, up.flatten(0, 1).T @ pruned)


def test_pruned_weights_come_back_in_training() -> None:
    torch.manual_seed(0)
    layer = SemiSparseLinear.from_dense(nn.Linear(8, 8, bias=False))
    before = tile_mask(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    target = torch.randn(8, 8)
    losses = list[float]()
    for _ in range(60):
        x = torch.randn(32, 8)
        loss = (layer(x) - x @ target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 1.5
    assert bool((tile_mask(layer.weight) & ~before).any())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4, bias=False)
        self.again = self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.again(self.body(x)))
        return result


def test_swapping_keeps_parameters_mode_hooks_and_sharing() -> None:
    model, called = Net().eval(), list[int]()
    model.body[0].register_forward_hook(lambda *args: called.append(1))
    before = dict(model.named_parameters())
    swap_linear_with_semi_sparse_linear(
        model, {"body.0": SemiSparseLinear, "head": SemiSparseActivationLinear}
    )
    assert type(model.body[0]) is SemiSparseLinear and model.again is model.body[0]
    assert type(model.head) is SemiSparseActivationLinear
    assert not any(module.training for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    model(torch.randn(3, 8))
    assert called == [1, 1]
    swap_semi_sparse_linear_with_linear(model)
    assert type(model.body[0]) is nn.Linear and type(model.head) is nn.Linear
    assert model.again is model.body[0] and not model.head.training and model.head.bias is None
    assert all(p is before[name] for name, p in model.named_parameters())


def test_the_one_liner_with_a_wrong_name_says_which_is_right() -> None:
    model = nn.Sequential(nn.Linear(16, 32))
    with pytest.raises(ValueError, match=r"no layer of Sequential is named 'seq\.0': .* '0'"):
        swap_linear_with_semi_sparse_linear(model, {"seq.0": SemiSparseLinear})
    with pytest.raises(ValueError, match=r"named 'hed'.*'head'"):
        swap_linear_with_semi_sparse_linear(
            (net := Net()), {"body.0": SemiSparseLinear, "hed": SemiSparseLinear}
        )
    assert type(net.body[0]) is nn.Linear


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"body": SemiSparseLinear}, r"'body' needs to be an nn.Linear.*Sequential"),
        ({"": SemiSparseLinear}, r"wrap a bare one"),
        ({"head": nn.Linear}, r"'head' needs a class with from_dense"),
    ],
)
def test_what_cannot_be_swapped_is_refused_first(config: dict[str, Any], said: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=said):
        swap_linear_with_semi_sparse_linear(net, {"body.0": SemiSparseLinear, **config})
    assert type(net.body[0]) is nn.Linear


def test_unknown_algorithms_and_shapes_are_refused() -> None:
    x = torch.randn(4, 4)
    assert torch.equal(
        semi_structured_sparsify(x, "largest_abs_values_greedy", backend="cusparselt"),
        semi_structured_sparsify(x),
    )
    with pytest.raises(ValueError, match="'causal1122'"):
        semi_structured_sparsify(x, algo="causal1122")
    with pytest.raises(ValueError, match="'triton'"):
        semi_structured_sparsify(x, backend="triton")
    with pytest.raises(ValueError, match=r"matrix, got shape \(2, 4, 4\)"):
        semi_structured_sparsify(torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match="use to_dense"):
        swap_semi_sparse_linear_with_linear(SemiSparseLinear(4, 4))
