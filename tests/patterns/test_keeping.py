"""A pattern for a weight with zeros: laws that hold whatever the pattern, and the walk in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns import NM, Block, Channel, Pattern, Unstructured
from secateur.patterns.keeping import KeepingZeros
from tests.guests.pattern import Pairs
from tests.patterns.test_laws import PATTERNS, SHAPE, scores, zeros_asked

each_pattern = pytest.mark.parametrize("pattern", [*PATTERNS, Pairs(0.5)], ids=str)


def some_zeros(seed: int, share: float) -> Tensor:
    """Zeros whose share differs from row to row and from column to column."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(n, generator=generator) for n in SHAPE)
    return torch.rand(SHAPE, generator=generator) < 4 * share * rows[:, None] * columns


def walked(pattern: Pattern, score: Tensor) -> Tensor:
    parts = pattern.parts((score.shape[0], score.shape[1]))
    return torch.cat([part.mask(score[:, a:b]) for a, b, part in parts], 1)


@each_pattern
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=10)
def test_zeros_stay_and_the_pattern_holds(pattern: Pattern, seed: int, share: float) -> None:
    zeros = some_zeros(seed, share)
    keeping = KeepingZeros(pattern, zeros)
    for mask in (keeping.mask(scores(seed)), walked(keeping, scores(seed))):
        assert not (mask & zeros).any()
        assert pattern.violation(mask) is None
        assert keeping.violation(mask) is None


@each_pattern
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_zeros_that_the_pattern_would_have_are_all_that_there_are(
    pattern: Pattern, seed: int
) -> None:
    """Whatever the scores, negative ones too: what is zero already counts, and nothing is added."""
    mask = pattern.mask(scores(seed))
    for score in (scores(seed + 1), scores(seed + 1) - 0.5, torch.zeros(SHAPE)):
        assert torch.equal(KeepingZeros(pattern, ~mask).mask(score), mask)


@each_pattern
def test_without_zeros_it_is_the_pattern(pattern: Pattern) -> None:
    none = KeepingZeros(pattern, torch.zeros(SHAPE, dtype=torch.bool))
    assert torch.equal(none.mask(scores(3)), pattern.mask(scores(3)))
    assert torch.equal(walked(none, scores(3)), walked(pattern, scores(3)))
    assert str(none) == str(pattern) and none.sparsity == pattern.sparsity


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if list(p.groups(64))], ids=str)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.05, 0.3, 0.6]))
@settings(max_examples=10)
def test_single_zeros_count_to_the_element(pattern: Pattern, seed: int, share: float) -> None:
    """Of each budget the larger of what is asked and what is there, in the walk too."""
    zeros = some_zeros(seed, share)
    match pattern:
        case Unstructured(scope="layer"):
            budgets = [(slice(None), slice(None))]
        case _:
            budgets = [
                (slice(row, row + 1), slice(*group))
                for row in range(SHAPE[0])
                for group in pattern.groups(SHAPE[1])
            ]
    full = ~pattern.mask(torch.ones(SHAPE))
    expected = sum(max(int(full[b].sum()), int(zeros[b].sum())) for b in budgets)
    outside = int(zeros.sum()) - sum(int(zeros[b].sum()) for b in budgets)
    keeping = KeepingZeros(pattern, zeros)
    for mask in (keeping.mask(scores(seed)), walked(keeping, scores(seed))):
        assert int((~mask).sum()) == expected + outside


def test_the_walk_keeps_the_same_share_everywhere() -> None:
    """Half of a row of 512 is asked for, and 3/4 of its first 128 are zero: 160 more are to go."""
    zeros = torch.zeros(1, 512, dtype=torch.bool)
    zeros[0, :96] = True
    for pattern in (Unstructured(0.5), Unstructured(0.5, "layer"), Block(1, 1, 0.5)):
        keeping = KeepingZeros(pattern, zeros)
        counts = [int((~p.mask(torch.rand(1, b - a))).sum()) for a, b, p in keeping.parts((1, 512))]
        assert counts == [96 + 12, 50, 49, 49]  # 256 of 416 stay: 19.7 of 32, 78.8 of 128


def test_the_best_of_the_rest_is_kept() -> None:
    weight = torch.tensor([[0.0, 1, 2, 3, 0, 0, 0, 4, 0, 9, 8, 7]])
    keeping = KeepingZeros(NM(2, 4), weight == 0)
    assert keeping.mask(-weight).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1]]


def test_a_tile_that_is_zero_goes_first_and_zeros_add_nothing() -> None:
    score = torch.tensor([[0.0, 0, 3, 9, 1, 1, 2, 3]])
    zeros = torch.tensor([[False, False, False, True, False, False, True, True]])
    pairs = KeepingZeros(Block(1, 2, 0.5), zeros)
    assert pairs.mask(score).int().tolist() == [[0, 0, 1, 0, 1, 1, 0, 0]]
    columns = KeepingZeros(Channel(0.5, "in"), zeros)
    assert columns.mask(score).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]]


def test_a_mask_that_keeps_a_zero_is_named() -> None:
    zeros = torch.zeros(4, 8, dtype=torch.bool)
    zeros[2, 5] = True
    told = KeepingZeros(Unstructured(0.0), zeros).violation(torch.ones(4, 8, dtype=torch.bool))
    assert told == "keeps 1 weights that were zero, first row 2, column 5"


def test_at_keeps_the_zeros() -> None:
    zeros = torch.zeros(16, 64, dtype=torch.bool)
    zeros[:, :8] = True
    mask = KeepingZeros(Unstructured(0.5), zeros).at(0.25).mask(scores(1))
    assert not mask[:, :8].any() and int((~mask).sum()) == zeros_asked(Unstructured(0.25))
