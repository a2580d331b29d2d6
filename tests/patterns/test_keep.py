"""`keep_top`: exactly k, ties to the lower index, by each of its algorithms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.patterns.keep import (
    PAIRWISE_WIDTH,
    _losses_at_once,
    _losses_in_turns,
    count_zeros,
    keep_top,
)


@given(
    width=st.integers(1, 3 * PAIRWISE_WIDTH),
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([1, 3, 100_000]),
    data=st.data(),
)
@settings(max_examples=150)
def test_equals_a_stable_sort(width: int, seed: int, levels: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, width))
    score = torch.randint(levels, (3, width), generator=torch.Generator().manual_seed(seed)).float()
    order = score.argsort(dim=-1, descending=True, stable=True)
    expected = torch.zeros(3, width, dtype=torch.bool).scatter_(1, order[:, :k], True)
    assert torch.equal(keep_top(score, k), expected)


@given(
    width=st.integers(2, PAIRWISE_WIDTH),
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([1, 3, 100_000]),
)
def test_pairs_at_once_or_in_turns_are_the_same(width: int, seed: int, levels: int) -> None:
    """Few scores on a GPU are compared at once."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (5, 3, width), generator=generator).float()
    score[0, 0, 0], score[1, 0, -1] = float("nan"), float("inf")
    order = score[2:].argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(width).expand_as(order)
    beaten_by = torch.empty_like(order).scatter_(-1, order, rank)
    losses = _losses_at_once(score)
    assert torch.equal(losses, _losses_in_turns(score))
    assert torch.equal(losses[2:] + (width - 1 - torch.arange(width)), beaten_by)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [64, 100_000])  # at once, and in turns
@pytest.mark.parametrize("width", [4, 16])
def test_on_a_gpu_as_on_the_cpu(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(5, (rows, 1, width), generator=generator).float()
    found = keep_top(score.cuda(), width // 2)
    assert torch.equal(found.cpu(), keep_top(score, width // 2))


def test_infinite_scores_are_kept_first() -> None:
    score = torch.tensor([[1.0, float("inf"), 2.0, -float("inf")]])
    assert keep_top(score, 2).tolist() == [[False, True, True, False]]


def test_k_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match="0 <= k <= 4, got 5"):
        keep_top(torch.rand(2, 4), 5)


@pytest.mark.parametrize(
    ("sparsity", "n", "zeros"),
    [(0.5, 3, 2), (0.25, 10, 3), (0.35, 10, 4), (0.999, 10, 10), (0.0, 7, 0)],
)
def test_zeros_are_rounded_half_up(sparsity: float, n: int, zeros: int) -> None:
    assert count_zeros(sparsity, n) == zeros
