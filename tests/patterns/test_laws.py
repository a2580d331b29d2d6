"""Laws that every pattern keeps. A new pattern joins by an example in `PATTERNS`."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import patterns
from secateur.patterns import NM, Block, Channel, Pattern, Unstructured, parse

PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.61),
    Unstructured(0.3, "layer"),
    Unstructured(0.7, "group", 16),
    NM(2, 4),
    NM(1, 4),
    NM(4, 8),
    NM(5, 8),
    NM(8, 32),
    NM(3, 5, "dense"),
    NM(3, 5, "pad"),
    NM(2, 5, "dense", 16),
    NM(2, 5, "pad", 8),
    Block(4, 8, 0.5),
    Block(1, 4, 0.3),
    Block(16, 1, 0.75),
    Channel(0.25),
    Channel(0.5, "in"),
]
SHAPE = (16, 64)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def scores(seed: int, levels: int = 1_000_000) -> Tensor:
    """Random scores; few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, SHAPE, generator=generator).float() / levels


def zeros_asked(pattern: Pattern) -> int:
    """The zeros of a 16 x 64 mask, counted by hand from the pattern's definition."""
    match pattern:
        case NM(n, m, remainder, channels):
            whole, rest = divmod(channels or 64, m)
            last = max(rest - n, 0) if remainder == "pad" else 0
            return 16 * 64 // (channels or 64) * (whole * (m - n) + last)
        case Block(rows, cols, sparsity):
            return int(sparsity * (16 // rows) * (64 // cols) + 0.5) * rows * cols
        case Channel(sparsity, side):
            return int(sparsity * 16 + 0.5) * 64 if side == "out" else int(sparsity * 64 + 0.5) * 16
        case Unstructured(sparsity, scope, size):
            groups, width = {"layer": (1, 1024), "row": (16, 64), "group": (64, size)}[scope]
            return groups * int(sparsity * width + 0.5)
    raise AssertionError(pattern)


def test_every_pattern_of_the_package_is_here() -> None:
    classes = {
        c
        for name in patterns.__all__
        if dataclasses.is_dataclass(c := getattr(patterns, name)) and hasattr(c, "mask")
    }
    assert {type(pattern) for pattern in PATTERNS} == classes


@each_pattern
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([1, 2, 5, 1_000_000]))
@settings(max_examples=15)
def test_the_count_is_exact_also_with_ties(pattern: Pattern, seed: int, levels: int) -> None:
    mask = pattern.mask(scores(seed, levels))
    assert int((~mask).sum()) == zeros_asked(pattern)
    assert pattern.violation(mask) is None


@each_pattern
def test_one_zero_less_is_a_violation(pattern: Pattern) -> None:
    mask = pattern.mask(scores(0))
    row, column = (~mask).nonzero()[0].tolist()
    mask[row, column] = True
    assert pattern.violation(mask) is not None


@each_pattern
def test_more_zeros_never_are(pattern: Pattern) -> None:
    mask = pattern.mask(scores(1)) & (scores(2) > 0.5)
    assert pattern.violation(mask) is None
    assert pattern.violation(torch.zeros_like(mask)) is None


@each_pattern
def test_scaling_the_scores_changes_nothing(pattern: Pattern) -> None:
    assert torch.equal(pattern.mask(scores(3)), pattern.mask(scores(3) * 8))


@each_pattern
def test_pruning_again_by_magnitude_changes_nothing(pattern: Pattern) -> None:
    weight = (scores(4) + 0.1) * pattern.mask(scores(4) + 0.1)
    again = weight * pattern.mask(weight)
    assert torch.equal(again, weight)


@each_pattern
@given(seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_no_single_exchange_would_keep_more_score(pattern: Pattern, seed: int) -> None:
    """The mask is the best: its kept score equals the best found by sorting units."""
    score = scores(seed)
    kept = float((score * pattern.mask(score)).sum())
    assert kept == pytest.approx(best_score(pattern, score), rel=1e-5)


def best_score(pattern: Pattern, score: Tensor) -> float:
    """The largest score a mask of this pattern can keep, from sorted units."""
    rows, columns = score.shape
    match pattern:
        case NM(n, m, remainder, channels):
            runs = score.split(channels or columns, 1)
            groups = [group for run in runs for group in run.split(m, 1)]
            return sum(
                float(group.sort(descending=True).values[:, : n if chosen else m].sum())
                for group in groups
                for chosen in [group.shape[1] == m or remainder == "pad"]
            )
        case Block(r, c, sparsity):
            units = score.view(rows // r, r, columns // c, c).sum((1, 3)).view(1, -1)
        case Channel(sparsity, side):
            units = score.sum(1 if side == "out" else 0).view(1, -1)
        case Unstructured(sparsity, scope, size):
            units = score.view({"layer": (1, -1), "row": (rows, -1), "group": (-1, size)}[scope])
    kept = units.shape[1] - int(sparsity * units.shape[1] + 0.5)
    return float(units.sort(descending=True).values[:, :kept].sum())


@each_pattern
def test_equal_scores_keep_the_lower_index(pattern: Pattern) -> None:
    """They rank as scores that fall along the rows, and then from row to row."""
    falling = torch.arange(SHAPE[0] * SHAPE[1], 0, -1).float().view(SHAPE)
    mask = pattern.mask(torch.ones(SHAPE))
    assert torch.equal(mask, pattern.mask(falling))
    if isinstance(pattern, NM):
        assert mask[0, : pattern.n].all() and not mask[0, pattern.n : pattern.m].any()


@each_pattern
@pytest.mark.parametrize("shape", [(16, 64), (32, 512), (16, 384)])
def test_parts_cover_the_columns_and_their_zeros_add_up(
    pattern: Pattern, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(shape, generator=generator)
    expected = int((~pattern.mask(score)).sum())
    mask, reached = torch.ones(shape, dtype=torch.bool), 0
    for start, stop, part in pattern.parts(shape):
        assert start == reached < stop
        mask[:, start:stop] = part.mask(score[:, start:stop])
        reached = stop
    assert reached == shape[1]
    assert int((~mask).sum()) == expected
    assert pattern.violation(mask) is None


@each_pattern
def test_the_short_string_reads_back(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern


@each_pattern
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_scores_give_a_bool_mask_of_the_exact_count(
    pattern: Pattern, dtype: torch.dtype
) -> None:
    """torch.ao.pruning's full-block masks were float32 and turned bf16 weights into float32."""
    mask = pattern.mask(scores(5).to(dtype))
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == zeros_asked(pattern)
    weight = scores(5).to(dtype).masked_fill(~mask, 0)
    assert weight.dtype == dtype


@pytest.mark.parametrize(
    ("pattern", "shape", "text"),
    [
        (NM(2, 4), (8, 6), "2:4 needs in_features divisible by 4, got 6"),
        (NM(2, 4, "dense"), (8, 3), "2:4@dense-remainder needs in_features of at least 4, got 3"),
        (NM(2, 4, "pad"), (8, 0), "2:4@pad-remainder needs in_features of at least 1, got 0"),
        (NM(2, 4, channels=6), (8, 24), "2:4 needs in_channels divisible by 4, got 6"),
        (
            NM(2, 4, "dense", 3),
            (8, 48),
            "2:4@dense-remainder needs in_channels of at least 4, got 3",
        ),
        (
            NM(2, 4, "pad", 6),
            (8, 28),
            "2:4@pad-remainder@channels6 needs in_features divisible by 6, got 28",
        ),
        (
            Block(4, 4, 0.5),
            (8, 6),
            "block:4x4@0.5 needs out_features divisible by 4 and in_features by 4, got 8 and 6",
        ),
        (Channel(0.5), (0, 6), "channels:0.5 needs a weight that is not empty, got (0, 6)"),
        (
            Unstructured(0.5),
            (8, 0),
            "unstructured:0.5 needs a weight that is not empty, got (8, 0)",
        ),
    ],
)
def test_ragged_and_empty_shapes_say_why_not(
    pattern: Pattern, shape: tuple[int, int], text: str
) -> None:
    assert pattern.why_not(shape) == text


def test_a_dense_remainder_stays_dense() -> None:
    pattern = NM(2, 4, "dense")
    mask = pattern.mask(torch.arange(12.0).view(2, 6))
    assert mask.tolist() == [[False, False, True, True, True, True]] * 2
    assert [(a, b) for a, b, _ in pattern.parts((2, 6))] == [(0, 4), (4, 6)]


def test_a_padded_remainder_is_a_group_of_its_own() -> None:
    pattern = NM(2, 4, "pad")
    mask = pattern.mask(torch.arange(14.0).view(2, 7))
    assert mask.tolist() == [[False, False, True, True, False, True, True]] * 2
    assert list(pattern.parts((2, 7))) == [(0, 4, NM(2, 4)), (4, 7, NM(2, 3))]


def test_a_remainder_of_at_most_n_stays_whole() -> None:
    for width in (1, 2):
        assert NM(2, 4, "pad").mask(torch.rand(3, width)).all()


def test_no_group_lies_across_two_positions_of_a_kernel() -> None:
    score = torch.tensor([[1.0, 5, 4, 3, 2, 6, 7, 8, 9]])
    assert NM(2, 4, "pad", 3).mask(score).int().tolist() == [[0, 1, 1, 1, 0, 1, 0, 1, 1]]
    score = torch.tensor([[1.0, 5, 4, 3, 2, 6, 7, 8, 9, 1]])
    assert NM(2, 4, "dense", 5).mask(score).int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("pattern", "kept", "told"),
    [
        (NM(2, 4, "pad"), (4, 5, 6), "first columns 4..6 of row 1, keeping 3"),
        (NM(2, 4, "pad", 3), (3, 4, 5), "first columns 3..5 of row 1, keeping 3"),
        (NM(2, 4, "pad", 9), (6, 7, 8, 4), "first columns 4..7 of row 1, keeping 3"),
        (NM(2, 4, "dense", 9), (13, 14, 15, 8), "first columns 13..16 of row 1, keeping 3"),
    ],
)
def test_a_violation_names_the_columns_of_a_group(
    pattern: NM, kept: tuple[int, ...], told: str
) -> None:
    mask = torch.zeros(2, 7 if pattern.channels is None else 18, dtype=torch.bool)
    mask[1, list(kept)] = True
    violation = pattern.violation(mask)
    assert violation == f"has 1 groups of 4 keeping more than 2: {told}"


@given(
    channels=st.integers(1, 9),
    positions=st.integers(1, 4),
    m=st.integers(1, 6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_padded_pattern_is_the_plain_one_on_padded_channels(
    channels: int, positions: int, m: int, seed: int, data: st.DataObject
) -> None:
    """As for a runtime that pads the channels of [out, positions, channels] with zeros."""
    n = data.draw(st.integers(1, m))
    pattern = NM(n, m, "pad", channels)
    score = torch.rand(3, positions, channels, generator=torch.Generator().manual_seed(seed)) + 0.1
    padded = torch.nn.functional.pad(score, (0, -channels % m))
    expected = NM(n, m).mask(padded.flatten(1)).view_as(padded)[..., :channels].flatten(1)
    mask = pattern.mask(score.flatten(1))
    assert torch.equal(mask, expected)
    assert pattern.violation(mask) is None
    per_run = channels // m * (m - n) + max(channels % m - n, 0)
    assert int((~mask).sum()) == 3 * positions * per_run
    parts = list(pattern.parts((3, positions * channels)))
    zeros = sum((stop - start) * part.sparsity for start, stop, part in parts)
    assert zeros == pytest.approx(positions * per_run)
    walked = torch.cat([part.mask(score.flatten(1)[:, a:b]) for a, b, part in parts], 1)
    assert torch.equal(walked, mask)


def test_masks_of_ragged_shapes_raise_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="remainder='dense' or 'pad'"):
        NM(2, 4).mask(torch.rand(4, 6))
    with pytest.raises(ValueError, match="choose a block that divides the weight"):
        Block(3, 4, 0.5).mask(torch.rand(4, 8))


# --- what a pattern answers for itself -----------------------------------------------------------


@each_pattern
@given(sparsity=st.floats(0, 0.99))
def test_at_gives_the_kind_with_no_more_zeros_than_asked(pattern: Pattern, sparsity: float) -> None:
    other = pattern.at(sparsity)
    assert other.kind == pattern.kind
    assert other.sparsity <= sparsity + 1e-9
    assert pattern.at(pattern.sparsity) == pattern
    assert type(other.parse(str(other))) is type(pattern)


def test_kinds_are_what_differs_in_more_than_sparsity() -> None:
    kinds: dict[str, set[Pattern]] = {}
    for pattern in PATTERNS:
        kinds.setdefault(pattern.kind, set()).add(pattern.at(0.0))
    assert all(len(same) == 1 for same in kinds.values())


@each_pattern
@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=20)
def test_weights_may_change_places_within_groups(
    pattern: Pattern, seed: int, data: st.DataObject
) -> None:
    """Any order of a row's mask within a group keeps the pattern, and groups do not overlap."""
    groups = list(pattern.groups(SHAPE[1]))
    assert all(a < b for a, b in groups)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(groups))
    if not groups:
        return
    mask = pattern.mask(scores(seed))
    generator = torch.Generator().manual_seed(seed)
    for row in range(SHAPE[0]):
        start, stop = data.draw(st.sampled_from(groups))
        order = torch.randperm(stop - start, generator=generator)
        mask[row, start:stop] = mask[row, start:stop][order]
    assert pattern.violation(mask) is None


@each_pattern
def test_a_tile_is_kept_or_dropped_as_a_whole(pattern: Pattern) -> None:
    rows, columns = pattern.tile
    tiles = pattern.mask(scores(3)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    assert torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))
    assert pattern.tile == (1, 1) or not list(pattern.groups(SHAPE[1]))


@each_pattern
@pytest.mark.parametrize("channels", [6, 8, 10])
def test_on_a_kernel_no_group_lies_across_two_positions(pattern: Pattern, channels: int) -> None:
    found = pattern.on_kernel(channels)
    if isinstance(pattern, NM) and pattern.remainder == "pad":
        inside = [start // channels == (stop - 1) // channels for start, stop in found.groups(40)]
        assert all(inside) and found.on_kernel(channels) == found
    elif not isinstance(pattern, NM):
        assert found == pattern


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if isinstance(p, NM)], ids=str)
def test_the_largest_that_a_group_drops_is_below_all_that_it_keeps(pattern: NM) -> None:
    """In groups that `groups` names; where nothing is dropped, as in a dense remainder, it is 0."""
    size = scores(5) + 1
    mask = pattern.mask(size)
    found = pattern.largest_dropped(size, mask)
    expected = torch.zeros_like(size)
    for start, stop in pattern.groups(SHAPE[1]):
        part = slice(start, stop)
        dropped = size[:, part].masked_fill(mask[:, part], 0)
        expected[:, part] = dropped.amax(1, keepdim=True)
    assert torch.equal(found, expected)
    assert bool((found <= size)[mask].all()) and bool((found >= size)[~mask].all())
