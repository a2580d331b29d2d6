"""Orders of columns, compared with all orders of a few columns and with scores counted by hand."""

import sys
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.prune.permutation import find_permutation, kept_score


def integers(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.integers(0, 9), min_size=columns, max_size=columns)
    scores = st.lists(row, min_size=rows, max_size=rows)
    return scores.map(lambda one: torch.tensor(one, dtype=torch.float64))


def kept_by_hand(score: Tensor, order: list[int], n: int, m: int) -> float:
    """The sum of the largest n of each m, row by row."""
    return sum(
        sum(sorted(row[i : i + m], reverse=True)[:n])
        for row in score[:, order].tolist()
        for i in range(0, len(order), m)
    )


patterns = st.sampled_from([sc.NM(2, 4), sc.NM(1, 4), sc.NM(3, 4), sc.NM(1, 2), sc.NM(4, 8)])


@settings(max_examples=40)
@given(st.data(), patterns)
def test_it_is_a_permutation_that_never_keeps_less(data: st.DataObject, pattern: sc.NM) -> None:
    columns = pattern.m * data.draw(st.integers(1, 4))
    score = data.draw(integers(3, columns))
    order = find_permutation(score, pattern).tolist()
    assert sorted(order) == list(range(columns))
    before = kept_by_hand(score, list(range(columns)), pattern.n, pattern.m)
    kept = kept_by_hand(score, order, pattern.n, pattern.m)
    assert kept >= before
    assert kept_score(score[:, order], pattern) == kept
    if kept == before:
        assert order == list(range(columns)), "columns do not move for nothing"


def of_rows(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Where columns moved for nothing, a slot that had been tried before could gain in the end.
@example(of_rows([0, 1, 0, 0, 5, 0, 4, 4], [2, 8, 0, 0, 0, 0, 2, 0], [5, 1, 3, 0, 5, 0, 5, 7]))
@example(of_rows([0] * 8, [0, 0, 0, 3, 2, 3, 3, 3], [0, 1, 1, 0, 2, 0, 0, 1]))
@settings(max_examples=30)
@given(integers(3, 8))
def test_no_assignment_within_a_slot_is_better_nor_any_order_better_than_the_best(
    score: Tensor,
) -> None:
    order = find_permutation(score, sc.NM(2, 4)).tolist()
    kept = kept_by_hand(score, order, 2, 4)
    best = max(
        kept_by_hand(score, [*one, *(i for i in range(8) if i not in one)], 2, 4)
        for one in combinations(range(8), 4)
    )
    assert kept <= best
    if order == list(range(8)):
        return
    for slot in range(4):
        exchanged = list(order)
        exchanged[slot], exchanged[4 + slot] = order[4 + slot], order[slot]
        assert kept_by_hand(score, exchanged, 2, 4) <= kept


def test_large_columns_that_lie_together_are_spread_as_well_as_can_be() -> None:
    score = torch.tensor([9.0, 8, 7, 6, 0, 1, 2, 3]).expand(5, 8).contiguous()
    assert kept_score(score, sc.NM(2, 4)) == 5 * (9 + 8 + 2 + 3)
    order = find_permutation(score, sc.NM(2, 4))
    assert kept_score(score[:, order], sc.NM(2, 4)) == 5 * (9 + 8 + 7 + 6)


def test_assignment_finds_what_dealing_by_sums_cannot_see() -> None:
    """All columns sum to 1: four meet in one row, four in another, and 2:4 can keep all of them."""
    rows = torch.zeros(2, 8)
    rows[0, ::2] = rows[1, 1::2] = 1
    apart = torch.cat([rows[:, ::2], rows[:, 1::2]], 1)
    assert kept_score(apart, sc.NM(2, 4)) == 4
    mixed = apart[:, find_permutation(apart, sc.NM(2, 4))]
    assert kept_score(mixed, sc.NM(2, 4)) == 8


def test_random_scores_keep_more_in_several_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(16, 96, dtype=torch.float64, generator=generator).abs()
    identity = kept_score(score, sc.NM(2, 4))
    one = kept_score(score[:, find_permutation(score, sc.NM(2, 4))], sc.NM(2, 4))
    monkeypatch.setattr("secateur.prune.permutation.GROUPS_AT_ONCE", 7)  # 24 groups in 4 blocks
    order = find_permutation(score, sc.NM(2, 4))
    assert sorted(order.tolist()) == list(range(96))
    several = kept_score(score[:, order], sc.NM(2, 4))
    assert (one - identity) / 2 < several - identity < one - identity, "every block gains"


def test_the_finder_refuses_what_it_cannot_group() -> None:
    with pytest.raises(ValueError, match="multiple of 4 for 2:4, got 10"):
        find_permutation(torch.rand(2, 10), sc.NM(2, 4))
    with pytest.raises(ValueError, match="finite scores"):
        find_permutation(torch.tensor([[1.0, 2, float("inf"), 4]]), sc.NM(2, 4))


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install 'secateur\[budget\]'"):
        find_permutation(torch.rand(2, 8), sc.NM(2, 4))
