"""WeightNorm and NearlyDiagonal: exact counts in every shape and dtype, nothing that piles up."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.compat.torchao import (
    CubicSL,
    NearlyDiagonalSparsifier,
    WeightNormSparsifier,
    mask_creator,
)
from secateur.patterns import NM


def prepared(layer: nn.Module, sparsifier: Any, **settings: Any) -> Any:
    sparsifier.prepare(layer, [{"tensor_fqn": "weight", **settings}])
    return sparsifier


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def mask(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight[0].mask


def by_hand(
    weight: list[list[float]], level: float, block: tuple[int, int], zeros: int
) -> list[list[bool]]:
    """The kept elements, in plain Python: blocks by mean square, elements of a block by size."""
    rows, columns = len(weight), len(weight[0])
    corners = itertools.product(range(0, rows, block[0]), range(0, columns, block[1]))
    blocks = [
        [
            (i, j)
            for i, j in itertools.product(range(a, a + block[0]), range(b, b + block[1]))
            if i < rows and j < columns
        ]
        for a, b in corners
    ]
    scores = [sum(weight[i][j] ** 2 for i, j in cells) / len(cells) for cells in blocks]
    n = len(blocks)
    affected = n if level >= 1 else min(round(max(level, 0) * n), n - 1)
    # The smallest first; ties go to the later one.
    order = sorted(range(n), key=lambda k: (scores[k], -k))[:affected]
    keep = [[True] * columns for _ in range(rows)]
    for k in order:
        cells = sorted(blocks[k], key=lambda c: (weight[c[0]][c[1]] ** 2, [-x for x in c]))
        for i, j in cells[:zeros]:
            keep[i][j] = False
    return keep


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    level=st.sampled_from([-1.0, 0.0, 0.25, 0.35, 0.5, 0.9, 0.999, 1.0, 2.0]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_masks_are_those_of_the_definition(
    shape: tuple[int, int], block: tuple[int, int], level: float, share: float, seed: int
) -> None:
    zeros = round(share * math.prod(block))
    generator = torch.Generator().manual_seed(seed)
    # Powers of two of few sizes: means are exact, and there are equals.
    weight = 2.0 ** torch.randint(-1, 3, shape, generator=generator)
    layer = linear(weight)
    prepared(layer, WeightNormSparsifier(level, block, zeros)).step()
    assert (mask(layer) == 1).tolist() == by_hand(weight.tolist(), level, block, zeros)


def test_a_two_of_four_example() -> None:
    layer = linear(torch.tensor([[1.0, -5, 2, 3, 1, 1, 1, 1]]))
    prepared(layer, WeightNormSparsifier(1.0, (1, 4), 2)).step()
    assert layer.weight.tolist() == [[0, -5, 0, 3, 1, 1, 0, 0]]
    assert torch.equal(mask(layer), mask_creator(layer.parametrizations.weight.original))


def test_all_equal_weights_have_the_exact_level() -> None:
    for level in (0.1, 0.25, 0.5, 0.75):
        layer = linear(torch.ones(40, 20))
        prepared(layer, WeightNormSparsifier(level, (1, 4))).step()
        assert int((mask(layer) == 0).sum()) == round(level * 800)


def test_a_step_is_repeated_without_piling_up() -> None:
    torch.manual_seed(0)
    layer = linear(torch.randn(16, 16))
    sparsifier = prepared(layer, WeightNormSparsifier(0.5, (1, 4)))
    for _ in range(100):
        layer.parametrizations.weight.original.data.normal_()
        sparsifier.step()
        assert float(mask(layer).mean()) == 0.5


def test_zeros_stay_while_the_level_does_not_fall() -> None:
    layer = linear(torch.tensor([[1.0, 2, 3, 4]]))
    sparsifier = prepared(layer, WeightNormSparsifier(0.5, (1, 1)))
    sparsifier.step()
    layer.parametrizations.weight.original.data.copy_(torch.tensor([[8.0, 9, 3, 4]]))
    sparsifier.step()
    assert layer.weight.tolist() == [[0, 0, 3, 4]]
    sparsifier.groups[0]["sparsity_level"] = 0.75
    sparsifier.step()
    assert layer.weight.tolist() == [[0, 0, 0, 4]]


def test_where_the_level_falls_the_largest_hidden_weights_come_back() -> None:
    layer = linear(torch.tensor([[1.0, 2, 3, 4]]))
    sparsifier = prepared(layer, WeightNormSparsifier(0.75, (1, 1)))
    sparsifier.step()
    assert layer.weight.tolist() == [[0, 0, 0, 4]]
    sparsifier.groups[0]["sparsity_level"] = 0.25
    sparsifier.step()
    assert layer.weight.tolist() == [[0, 2, 3, 4]]


def test_a_falling_cubic_schedule_brings_weights_back() -> None:
    layer = linear(torch.arange(1.0, 11)[None])
    sparsifier = prepared(layer, WeightNormSparsifier(0.2, (1, 1)))
    scheduler = CubicSL(sparsifier, init_sl=0.8, delta_t=1, total_t=2)
    kept = []
    for _ in range(3):
        sparsifier.step()
        kept.append(layer.weight[layer.weight != 0].tolist())
        scheduler.step()
    assert [len(k) for k in kept] == [2, 7, 8]
    assert kept[-1] == [3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("level", "zeros"), [(0.5, None), (1.0, 2)])
def test_weights_and_masks_keep_their_dtype(
    dtype: torch.dtype, level: float, zeros: int | None
) -> None:
    torch.manual_seed(0)
    layer = linear(torch.randn(8, 8).to(dtype))
    sparsifier = prepared(layer, WeightNormSparsifier(level, (1, 4), zeros))
    sparsifier.step()
    assert mask(layer).dtype == dtype and float(mask(layer).mean()) == 0.5
    assert layer(torch.ones(1, 8, dtype=dtype)).dtype == dtype
    sparsifier.squash_mask()
    assert layer.weight.dtype == dtype
    assert int((layer.weight == 0).sum()) == 32


def test_the_mask_object_stays_through_steps_and_follows_the_model() -> None:
    layer = linear(torch.randn(8, 8))
    sparsifier = prepared(layer, WeightNormSparsifier())
    before = mask(layer)
    sparsifier.step()
    assert mask(layer) is before
    layer.to(torch.bfloat16)
    sparsifier.step()
    assert mask(layer).dtype == torch.bfloat16


def test_a_row_that_the_block_does_not_divide_has_zeros_in_its_last_block() -> None:
    layer = linear(torch.tensor([[1.0, 2, 3, 4, 1, 2, 3]]))
    prepared(layer, WeightNormSparsifier(1.0, (1, 4), 2)).step()
    assert layer.weight.tolist() == [[0, 0, 3, 4, 0, 0, 3]]
    layer = linear(torch.tensor([[1.0, 2, 3, 4, 9]]))
    prepared(layer, WeightNormSparsifier(0.5, (1, 4), 3)).step()
    assert layer.weight.tolist() == [[0, 0, 0, 4, 9]]


def test_a_convolutions_blocks_lie_along_its_input_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    before = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(1.0, (1, 4), 2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert mask(model[0]).shape == (4, 8, 3, 3)
    assert torch.equal(mask(model[0]), mask_creator(before))
    model(torch.ones(1, 8, 5, 5))
    sparsifier.squash_mask()
    assert NM(2, 4).violation(model[0].weight.permute(0, 2, 3, 1).flatten(1) != 0) is None


def test_the_norm_decides_and_a_tensors_own_goes_first() -> None:
    weight = torch.tensor([[3.0, 0, 2, 2]])  # squares 9 and 8, magnitudes 3 and 4
    kept = {}
    for name, norm in {"default": None, "l2": 2, "l1": 1, "own": lambda w: 1 / (1 + w)}.items():
        layer = linear(weight)
        prepared(layer, WeightNormSparsifier(0.5, (1, 2), norm=norm)).step()
        kept[name] = layer.weight.tolist()[0]
    assert kept["default"] == kept["l2"] == [3, 0, 0, 0]
    assert kept["l1"] == [0, 0, 2, 2]
    assert kept["own"] == [3, 0, 0, 0]
    layer = linear(weight)
    prepared(layer, WeightNormSparsifier(0.5, (1, 2), norm=2), norm=1).step()
    assert layer.weight.tolist() == [[0, 0, 2, 2]]


def test_a_tensors_own_block_is_dropped_whole_unless_it_says_how_much() -> None:
    layer = linear(torch.randn(8, 8))
    sparsifier = prepared(layer, WeightNormSparsifier(0.5, (1, 4)), sparse_block_shape=[4, 4])
    assert sparsifier.groups[0]["zeros_per_block"] == 16
    sparsifier.step()
    assert sorted(mask(layer).unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3)).flatten().tolist()) == [
        0, 0, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zeros_per_block": 5}, "from 0 to the 4 elements of a 1x4 block, got 5"),
        ({"zeros_per_block": -1}, "got -1"),
        ({"sparse_block_shape": (0, 4)}, r"two sizes >= 1, got \(0, 4\)"),
        ({"sparse_block_shape": (4,)}, r"two sizes >= 1, got \(4,\)"),
        ({"sparsity_level": math.nan}, "a number, got nan"),
        ({"norm": 3}, "1, 2 or a function of the weight, got 3"),
    ],
)
def test_what_cannot_be_is_an_error_at_construction_and_by_prepare(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WeightNormSparsifier(**arguments)
    layer = linear(torch.ones(4, 4))
    with pytest.raises(ValueError, match=message):
        prepared(layer, WeightNormSparsifier(), **arguments)
    assert list(layer.state_dict()) == ["weight"]


def test_tensors_that_have_no_blocks_are_an_error_by_prepare() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    for fqn, shape in (("0.bias", r"\(4,\)"), ("1.weight", r"\(4, 4, 3\)")):
        with pytest.raises(ValueError, match=f"{fqn} of .* is of shape {shape}: leave it out"):
            WeightNormSparsifier().prepare(model, [{"tensor_fqn": fqn}])


def test_weights_that_are_no_numbers_are_an_error_that_names_them() -> None:
    layer = linear(torch.tensor([[1.0, math.nan, 3, 4]]))
    sparsifier = prepared(layer, WeightNormSparsifier())
    with pytest.raises(ValueError, match="norms of at least 0, got nan for weight"):
        sparsifier.step()
    sparsifier = prepared(linear(torch.ones(1, 4)), WeightNormSparsifier(norm=lambda w: -w))
    with pytest.raises(ValueError, match="got -1 for weight"):
        sparsifier.step()


def test_a_subclass_may_call_what_it_replaces() -> None:
    class Twice(WeightNormSparsifier):
        def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
            super().update_mask(module, tensor_name, **kwargs)

    layer = linear(torch.tensor([[1.0, 2, 3, 4]]))
    prepared(layer, Twice(0.5, (1, 2))).step()
    assert layer.weight.tolist() == [[0, 0, 3, 4]]


# --- bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nearliness", "shape"), [(1, (4, 4)), (3, (4, 6)), (5, (6, 3))])
def test_a_band_is_kept(nearliness: int, shape: tuple[int, int]) -> None:
    layer = linear(torch.ones(shape, dtype=torch.bfloat16))
    prepared(layer, NearlyDiagonalSparsifier(nearliness)).step()
    kept = [[abs(i - j) <= nearliness // 2 for j in range(shape[1])] for i in range(shape[0])]
    assert (layer.weight == 1).tolist() == kept
    assert layer.weight.dtype == torch.bfloat16


def test_no_band_keeps_nothing() -> None:
    for nearliness in (0, -1, -2):
        layer = linear(torch.ones(4, 4))
        prepared(layer, NearlyDiagonalSparsifier(nearliness)).step()
        assert not layer.weight.any()


def test_a_band_that_cannot_be_is_an_error_before_anything_is_changed() -> None:
    with pytest.raises(ValueError, match="needs to be an odd number, got 4"):
        NearlyDiagonalSparsifier(4)
    layer = linear(torch.ones(4, 6))
    with pytest.raises(ValueError, match="needs to be an odd number, got 2"):
        prepared(layer, NearlyDiagonalSparsifier(), nearliness=2)
    with pytest.raises(ValueError, match=r"at most 7 for weight of shape \(4, 6\), got 9"):
        prepared(layer, NearlyDiagonalSparsifier(9))
    with pytest.raises(ValueError, match=r"a band needs a matrix, weight is of shape \(2, 2, 1, 1"):
        prepared(nn.Conv2d(2, 2, 1), NearlyDiagonalSparsifier())
    prepared(layer, NearlyDiagonalSparsifier(7)).step()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", ["x", None, 2.5, {"nearliness": 1}])
def test_a_width_of_another_kind_is_an_error_that_shows_it(value: object) -> None:
    with pytest.raises(ValueError, match="nearliness needs to be an odd number, got ['N2{]"):
        NearlyDiagonalSparsifier(value)
