"""Swap: no single exchange of weights improves its mask, compared with brute force in float64."""

import functools
import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.model.statistics import name_of, needed_by
from secateur.patterns import Pattern
from secateur.reconstruct import Solution, refit, swap, swapped
from tests.reconstruct.problems import model_and_batches, problem

PATTERNS: list[Pattern] = [
    sc.NM(2, 4),
    sc.NM(1, 4),
    sc.NM(4, 8),
    sc.NM(2, 4, remainder="dense"),
    sc.NM(1, 4, remainder="pad"),
    sc.NM(1, 4, remainder="pad", channels=2),
    sc.Unstructured(0.6),
    sc.Unstructured(0.5, "layer"),
    sc.Unstructured(0.5, "group", 6),
]


def error(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Each row's ||(W - What) X||^2."""
    R = weight.double().masked_fill(mask, 0)
    return ((R @ gram.double()) * R).sum(1)


def group_of(pattern: Pattern, column: int, columns: int) -> object:
    """A label for each column, equal for columns that may be exchanged; None if it stays dense."""
    if isinstance(pattern, sc.NM):
        width = pattern.channels or columns
        run, place = divmod(column, width)
        dense = pattern.remainder == "dense" and place >= width // pattern.m * pattern.m
        return None if dense else (run, place // pattern.m)
    assert isinstance(pattern, sc.Unstructured)
    return column // pattern.group_size if pattern.scope == "group" else 0


def best_swap(row: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern) -> float:
    """The least error after one exchange in this row, by trying all pairs."""
    least = float("inf")
    for u, p in itertools.product(*(m.nonzero()[:, 0].tolist() for m in (mask, ~mask))):
        groups = [group_of(pattern, column, len(row)) for column in (u, p)]
        if groups[0] is not None and groups[0] == groups[1]:
            other = mask.clone()
            other[u], other[p] = False, True
            least = min(least, float(error(row[None], other[None], gram)))
    return least


def start(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    return pattern.mask(sc.wanda(weight, gram.diagonal().sqrt()))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_single_swap_lowers_the_error_any_more(pattern: Pattern) -> None:
    columns = 26 if "remainder" in str(pattern) else 24
    gained = 0
    for seed in range(3):
        weight, gram = problem(5, columns, seed)
        mask = start(weight, gram, pattern)
        found = swapped(weight, mask, gram, pattern)
        before, after = (error(weight, m, gram) for m in (mask, found.mask))
        assert found.note == "" and pattern.violation(found.mask) is None
        assert (after <= before).all()
        gained += int((after < before).sum())
        for row, kept, now in zip(weight, found.mask, after.tolist(), strict=True):
            assert best_swap(row, kept, gram, pattern) >= now * (1 - 1e-9)
    assert gained > 5


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kept_weights_keep_their_bits_and_groups_their_counts(pattern: Pattern) -> None:
    columns = 170 if "remainder" in str(pattern) else 168  # more than are kept up to date at once
    weight, gram = problem(7, columns)
    mask = start(weight, gram, pattern)
    found = swapped(weight, mask, gram, pattern)
    assert torch.equal(found.weight, weight.masked_fill(~found.mask, 0))
    assert pattern.violation(found.mask) is None and not torch.equal(found.mask, mask)
    groups = [group_of(pattern, column, columns) for column in range(columns)]
    for group in set(groups):
        chosen = torch.tensor([g == group for g in groups])
        assert torch.equal(mask[:, chosen].sum(1), found.mask[:, chosen].sum(1))
    assert error(weight, found.mask, gram).sum() < 0.9 * error(weight, mask, gram).sum()


def test_a_swap_worked_out_by_hand() -> None:
    """Inputs 0 and 1 nearly cancel, so dropping both loses less than dropping one of them and 2."""
    gram = torch.tensor([[1.0, -0.9, 0.0], [-0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[2.0, 2.0, 1.5]])
    mask = torch.tensor([[True, False, False]])  # loses 4 + 2.25; without 0 and 1 it is 0.8
    found = swapped(weight, mask, gram, sc.Unstructured(2 / 3))
    assert found.mask.tolist() == [[False, False, True]]
    torch.testing.assert_close(error(weight, found.mask, gram), torch.tensor([0.8]).double())


@pytest.mark.parametrize("pattern", [sc.NM(2, 4), sc.NM(1, 4), sc.NM(3, 4)], ids=str)
def test_one_group_reaches_the_best_mask_that_one_swap_leads_to(pattern: sc.NM) -> None:
    masks = [
        torch.tensor([[i in kept for i in range(4)]])
        for kept in itertools.combinations(range(4), pattern.n)
    ]
    for seed, mask in itertools.product(range(20), masks):
        weight, gram = problem(1, 4, seed)
        least = min(masks, key=lambda m: float(error(weight, m, gram)))
        if int((least != mask).sum()) <= 2:
            assert torch.equal(swapped(weight, mask, gram, pattern).mask, least)


def random_case(seed: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    return problem(rows, 4 * groups, seed)


cases = st.builds(random_case, st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 12))
each_pattern = st.sampled_from([sc.NM(2, 4), sc.Unstructured(0.5), sc.Unstructured(0.3, "layer")])
few = settings(max_examples=40)


@few
@given(cases, each_pattern, st.integers(0, 2**31))
def test_the_error_never_rises_from_any_mask(
    case: tuple[Tensor, Tensor], pattern: Pattern, seed: int
) -> None:
    weight, gram = case
    mask = pattern.mask(sc.criteria.random(weight, seed))
    found = swapped(weight, mask, gram, pattern)
    assert (error(weight, found.mask, gram) <= error(weight, mask, gram)).all()
    assert pattern.violation(found.mask) is None
    assert torch.equal(swapped(weight, found.mask, gram, pattern).mask, found.mask)


@few
@given(cases, each_pattern, st.integers(-20, 20), st.integers(-20, 20))
def test_scales_of_weight_and_inputs_do_not_matter(
    case: tuple[Tensor, Tensor], pattern: Pattern, w: int, g: int
) -> None:
    weight, gram = case
    mask = start(weight, gram, pattern)
    one = swapped(weight, mask, gram, pattern).mask
    assert torch.equal(swapped(weight * 2.0**w, mask, gram * 2.0**g, pattern).mask, one)


@few
@given(cases, each_pattern)
def test_inputs_that_do_not_correlate_leave_wandas_mask(
    case: tuple[Tensor, Tensor], pattern: Pattern
) -> None:
    """Each weight costs w^2 G_jj whatever else is dropped: within a row Wanda is optimal."""
    weight, gram = case
    if getattr(pattern, "scope", "row") == "row":
        gram = gram.diagonal().diag()
        mask = start(weight, gram, pattern)
        assert torch.equal(swapped(weight, mask, gram, pattern).mask, mask)


def test_rows_in_parts_give_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(24, 64)
    mask = start(weight, gram, sc.NM(2, 4))
    whole = swapped(weight, mask, gram, sc.NM(2, 4)).mask
    module = importlib.import_module("secateur.reconstruct.swap")
    monkeypatch.setattr(module, "ELEMENTS", 5 * 64)
    assert torch.equal(swapped(weight, mask, gram, sc.NM(2, 4)).mask, whole)


def test_columns_brought_up_to_date_together_or_group_by_group_give_the_same_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, gram = problem(24, 64)
    mask = start(weight, gram, sc.NM(2, 4))
    module = importlib.import_module("secateur.reconstruct.swap")
    monkeypatch.setattr(module, "SWEEPS", 1)  # each sweep starts from exact sums again
    together = swapped(weight, mask, gram, sc.NM(2, 4)).mask
    monkeypatch.setattr(module, "COLUMNS", 4)
    assert torch.equal(swapped(weight, mask, gram, sc.NM(2, 4)).mask, together)


def test_what_could_still_gain_at_the_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("secateur.reconstruct.swap"), "SWEEPS", 1)
    weight, gram = problem(24, 64)
    mask = start(weight, gram, sc.NM(2, 4))
    found = swapped(weight, mask, gram, sc.NM(2, 4))
    moved = int((found.mask != mask).any(1).sum())
    assert found.note == f"{moved} outputs could still gain by swaps" and moved > 10


def test_bfloat16_weights_stay_bfloat16() -> None:
    weight, gram = problem(8, 64)
    low = weight.bfloat16()
    found = swapped(low, start(low, gram, sc.NM(2, 4)), gram, sc.NM(2, 4))
    assert torch.equal(found.weight, low.masked_fill(~found.mask, 0))
    assert found.weight.dtype == torch.bfloat16


def test_arguments_are_not_changed() -> None:
    weight, gram = problem(8, 64)
    mask = start(weight, gram, sc.NM(2, 4))
    copies = weight.clone(), mask.clone(), gram.clone()
    swapped(weight, mask, gram, sc.NM(2, 4))
    assert all(map(torch.equal, (weight, mask, gram), copies))


def test_patterns_of_whole_tiles_and_no_gram_matrix_are_refused() -> None:
    ones = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"swap exchanges single weights, block:1x4@0.5 drops"):
        swapped(ones, ones > 0, torch.eye(8), sc.Block(1, 4, 0.5))
    with pytest.raises(ValueError, match="this one has a diagonal of -1"):
        swapped(ones, ones > 0, -torch.eye(8), sc.NM(2, 4))


def test_what_is_no_method_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"swap takes a criterion .*reconstruct\.swapped"):
        swap("wanda")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [sc.wanda, sc.criteria.random, sc.sparsegpt], ids=name_of)
def test_reconstructing_changes_the_mask_and_no_kept_weight(method) -> None:  # type: ignore[no-untyped-def]
    model, batches = model_and_batches()
    dense = model[0].weight.detach().clone()
    report = sc.reconstruct_(model, "2:4", swap(method), batches)
    assert report.method == f"swap({name_of(method)})"
    x = torch.cat(batches)
    gram = x.T @ x / len(x)
    kept = model[0].weight.detach() != 0
    assert torch.equal(model[0].weight[kept], dense[kept])
    if method is sc.wanda:
        norm = gram.diagonal().sqrt()
        expected = swapped(dense, sc.NM(2, 4).mask(sc.wanda(dense, norm)), gram, sc.NM(2, 4))
        assert torch.equal(kept, expected.mask)
    sc.check(model, "2:4")


def test_asks_for_what_its_method_asks_for() -> None:
    given = ("weight", "pattern", "dtype", "layer")
    assert set(needed_by(swap(sc.wanda), given)) == {"input_norm", "gram"}
    assert needed_by(swap(functools.partial(sc.sparsegpt, damping=0.1)), given) == ("gram",)
    assert name_of(refit(swap(sc.magnitude))) == "refit(swap(magnitude))"


def test_its_mask_can_be_refitted_and_notes_are_joined() -> None:
    def first_two(weight: Tensor, pattern: Pattern) -> Solution:
        return Solution(weight, torch.tensor([True, True, False, False]).expand(4, 4), "by hand")

    gram = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    found = refit(swap(first_two))(
        weight=torch.ones(4, 4), gram=gram, pattern=sc.NM(2, 4), layer="a"
    )
    assert found.note == "by hand; 1 inputs were never active"
    assert found.weight.tolist() == [[0, 0, 1, 1]] * 4


def test_swap_itself_is_not_what_reconstruct_takes() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"swap makes an algorithm of a criterion"):
        sc.reconstruct_(model, "2:4", swap, batches)
