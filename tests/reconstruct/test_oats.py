"""A weight's low-rank part: compared with the paper's alternation, by exact SVDs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns import NM, Block, Pattern, Unstructured, parse
from secateur.reconstruct import alps, compensation, low_rank_part
from tests.reconstruct.problems import problem

PATTERNS = ["2:4", "unstructured:0.5", "unstructured:0.6@layer", "block:4x4@0.5", "channels:0.25"]


def published(
    weight: Tensor, input_norm: Tensor, pattern: Pattern, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """S and L by OATS's algorithms 1 and 2, as they are written."""
    W = weight.double() * input_norm.double()
    S = torch.zeros_like(W)
    for _ in range(iterations):
        U, singular, Vh = torch.linalg.svd(W - S, full_matrices=False)
        L = U[:, :rank] * singular[:rank] @ Vh[:rank]
        S = (W - L).masked_fill(~pattern.mask((W - L).square()), 0)
    return S / input_norm, L / input_norm


def alternated(
    weight: Tensor, input_norm: Tensor, pattern: Pattern, rank: int, iterations: int
) -> Tensor:
    """B A by normal equations in float64: S, then A for that B, B for that A, A for that B."""
    W = weight.double() * input_norm.double()
    B = torch.linalg.svd(W)[0][:, :rank]
    A = torch.linalg.lstsq(B, W).solution
    for _ in range(iterations):
        S = (W - B @ A).masked_fill(~pattern.mask((W - B @ A).square()), 0)
        A = torch.linalg.lstsq(B, W - S).solution
        B = torch.linalg.lstsq(A.T, (W - S).T).solution.T
        A = torch.linalg.lstsq(B, W - S).solution
    return B @ A / input_norm


def error(weight: Tensor, input_norm: Tensor, pattern: Pattern, L: Tensor) -> float:
    """The loss with this low-rank part and the best sparse part, in units of the inputs."""
    rest = (weight.double() - L.double()) * input_norm.double()
    return float(rest.masked_fill(pattern.mask(rest.square()), 0).square().sum())


def case(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, gram = problem(rows, columns, seed)
    return weight, gram, gram.diagonal().sqrt()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (24, 16)])
def test_is_least_squares_in_turns(rows: int, columns: int, pattern: str) -> None:
    weight, _, norm = case(rows, columns, 0)
    kind = parse(pattern)
    for iterations in (0, 1, 6):
        B, A = low_rank_part(weight, norm, kind, 3, iterations)
        torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=0, atol=1e-5)
        L = alternated(weight, norm, kind, 3, iterations)
        torch.testing.assert_close((B @ A).double(), L, rtol=1e-3, atol=1e-4)


def test_inputs_of_one_norm_and_single_zeros_are_the_papers_plain_alternation() -> None:
    """Without outliers: the paper's algorithm 1 on the weight itself, from its first SVD on."""
    weight, _, _ = case(12, 20, 1)
    ones, pattern = torch.ones(20), Unstructured(0.5)
    _, L = published(weight, ones, pattern, 4, 1)
    B, A = low_rank_part(weight, ones, pattern, 4, iterations=0)
    torch.testing.assert_close((B @ A).double(), L, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ends_as_the_papers_with_its_svds(pattern: str) -> None:
    weight, _, norm = case(32, 48, 0)
    kind = parse(pattern)
    start = error(weight, norm, kind, torch.zeros_like(weight))
    S, L = published(weight, norm, kind, 4, 80)
    paper = float(((weight - S - L) * norm).square().sum())
    B, A = low_rank_part(weight, norm, kind, 4)
    assert error(weight, norm, kind, B @ A) < paper + 0.03 * (start - paper)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(PATTERNS), st.integers(1, 8), st.sampled_from([8, 12])
)
def test_the_error_never_grows(seed: int, pattern: str, rank: int, columns: int) -> None:
    weight, _, norm = case(8, columns, seed)
    kind = parse(pattern)
    before = float("inf")
    for iterations in range(6):
        B, A = low_rank_part(weight, norm, kind, rank, iterations)
        after = error(weight, norm, kind, B @ A)
        assert after <= before * (1 + 1e-4) + 1e-8 * float((weight * norm).square().sum())
        before = after


def test_outputs_in_another_order_have_their_factors_in_that_order() -> None:
    weight, _, norm = case(16, 24, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    B, A = low_rank_part(weight, norm, NM(2, 4), 3, 5)
    other, same = low_rank_part(weight[order], norm, NM(2, 4), 3, 5)
    torch.testing.assert_close(other @ same, (B @ A)[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_the_inputs_does_not_matter(unit: float) -> None:
    weight, _, norm = case(16, 24, 3)
    B, A = low_rank_part(weight, norm, NM(2, 4), 3, 5)
    other, same = low_rank_part(weight, norm * unit, NM(2, 4), 3, 5)
    torch.testing.assert_close(other @ same, B @ A, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dead", [slice(0, 4), slice(None)])
def test_inputs_that_were_never_active_do_no_harm(dead: slice) -> None:
    weight, _, norm = case(16, 24, 4)
    norm[dead] = 0
    B, A = low_rank_part(weight, norm, NM(2, 4), 3)
    assert B.isfinite().all() and A.isfinite().all()
    if (live := norm > 0).any():
        other, same = low_rank_part(weight[:, live], norm[live], NM(2, 4), 3)
        torch.testing.assert_close((B @ A)[:, live], other @ same, rtol=1e-3, atol=1e-4)


def test_of_full_rank_it_is_the_weight() -> None:
    weight, _, norm = case(8, 12, 5)
    B, A = low_rank_part(weight, norm, NM(2, 4), 8)
    torch.testing.assert_close(B @ A, weight, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_sparse_plus_low_rank_is_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(48, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    sparse = torch.randn(48, 64, generator=generator)
    pattern = Unstructured(0.9)
    sparse = sparse.masked_fill(~pattern.mask(sparse.abs()), 0)
    B, A = low_rank_part(thin + sparse, torch.ones(64), pattern, 2, iterations=200)
    torch.testing.assert_close(B @ A, thin, rtol=1e-2, atol=1e-2)


def test_what_is_left_loses_less_when_pruned_than_what_is_compensated_afterwards() -> None:
    """Why it exists: factors before zeros against zeros before factors, at the same rank."""
    lost = {"before": 0.0, "after": 0.0}
    for seed in range(2):
        weight, gram, norm = case(48, 64, seed)
        B, A = low_rank_part(weight, norm, NM(2, 4), 6)
        for when, rest in (("before", weight - B @ A), ("after", weight)):
            S = alps(rest, gram, NM(2, 4)).weight
            last = compensation(weight, S, gram, 6)
            E = (weight - S - last[0] @ last[1]).double()
            lost[when] += float(((E @ gram.double()) * E).sum())
    assert lost["before"] < 0.9 * lost["after"]


def test_the_factors_have_the_weights_dtype() -> None:
    weight, _, norm = case(16, 24, 6)
    B, A = low_rank_part(weight.bfloat16(), norm, NM(2, 4), 3)
    exact = low_rank_part(weight.bfloat16().float(), norm, NM(2, 4), 3)
    assert torch.equal(B, exact[0].bfloat16()) and torch.equal(A, exact[1].bfloat16())


@pytest.mark.parametrize(
    ("rank", "norm", "pattern", "message"),
    [
        (0, 1.0, NM(2, 4), "a 8 x 12 weight takes a rank of 1 to 8, got 0"),
        (9, 1.0, NM(2, 4), "a 8 x 12 weight takes a rank of 1 to 8, got 9"),
        (2, float("nan"), NM(2, 4), "finite"),
        (2, 1.0, Block(5, 4, 0.5), "divisible by 5"),
    ],
)
def test_what_cannot_be_taken_apart(rank: int, norm: float, pattern: Pattern, message: str) -> None:
    weight, _, _ = case(8, 12, 0)
    with pytest.raises(ValueError, match=message):
        low_rank_part(weight, torch.full((12,), norm), pattern, rank)
