"""ALPS: compared with the paper's algorithm in float64, and held to its own laws."""

import copy
import functools
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.model.statistics import name_of
from secateur.patterns import Pattern
from secateur.patterns.keeping import KeepingZeros
from secateur.reconstruct import refitted
from secateur.reconstruct.refit import normalised
from tests.models import Decoder
from tests.reconstruct.problems import PAPER_PATTERNS, output_error, problem
from tests.reconstruct.test_refit import PATTERNS, hessian, row_by_row


def project(W: Tensor, n: int, m: int, k: int) -> Tensor:
    """The nearest matrix [in, out] with n of every m inputs, or with k entries in all."""
    if n:
        groups = W.T.reshape(-1, m)
        drop = groups.abs().argsort(dim=1)[:, : m - n]
        return groups.scatter(1, drop, 0.0).reshape(W.T.shape).T
    drop = W.abs().flatten().argsort()[: W.numel() - k]
    return W.flatten().index_fill(0, drop, 0.0).view_as(W)


def alps_algorithm_1(
    W_hat: Tensor, G: Tensor, *, n: int = 0, m: int = 0, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """ALPS, arXiv:2406.07831, in the paper's orientation W [in, out], every system solved anew.

    Algorithm 1 (ADMM) with the rho update of appendix B.1, s_t the change of the support in three
    iterations: 1.3 rho if s_t >= 0.1 k, 1.2 if >= 0.005 k, 1.1 if >= 1, and done at 0; in the
    authors' code rho / 5 and a fresh start if rho has never grown. Then the least squares that
    algorithm 2 approaches, exactly. Returns weight and mask as [out, in].
    """
    H = hessian(G)
    E = torch.diag(H.diagonal().rsqrt())
    H = E @ H @ E
    W_hat_ = torch.linalg.inv(E) @ W_hat.double().T
    k = W_hat.numel() * n // m if n else W_hat.numel() - int(p * W_hat.numel() + 0.5)
    identity = torch.eye(len(H), dtype=H.dtype)
    D0 = project(W_hat_, n, m, k)
    D, V, rho, grown = D0, torch.zeros_like(D0), 0.1, False
    support = D0 != 0
    for t in range(1, 301):
        W = torch.linalg.solve(H + rho * identity, H @ W_hat_ - V + rho * D)
        D = project(W + V / rho, n, m, k)
        V = V + rho * (W - D)
        if t % 3 == 0:
            s = int(((D != 0) != support).sum())
            support = D != 0
            if s >= 0.1 * k:
                rho, grown = 1.3 * rho, True
            elif s >= 0.005 * k:
                rho, grown = 1.2 * rho, True
            elif not grown:
                rho, D, V, support = rho / 5, D0, torch.zeros_like(D0), D0 != 0
            elif s >= 1:
                rho = 1.1 * rho
            else:
                break
    mask = support.T
    return row_by_row(W_hat, mask, hessian(G)), mask


@pytest.mark.parametrize(("pattern", "options"), PAPER_PATTERNS, ids=str)
def test_is_the_papers_algorithm(pattern: Pattern, options: dict[str, float]) -> None:
    weight, gram = problem(columns=160)
    expected, mask = alps_algorithm_1(weight, gram, **options)  # type: ignore[arg-type]
    solution = sc.alps(weight, gram, pattern)
    assert solution.note == ""
    assert pattern.violation(solution.mask) is None
    # float32 breaks near-ties differently from float64, and later masks follow from them
    assert float((solution.mask == mask).float().mean()) > 0.99
    ours, papers = (output_error(weight, w, hessian(gram)) for w in (solution.weight, expected))
    assert ours == pytest.approx(papers, rel=0.01)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_loses_less_than_sparsegpt_where_inputs_are_correlated(pattern: Pattern) -> None:
    for seed in range(3):
        weight, gram = problem(rows=16, columns=160, seed=seed)
        found, sparsegpt = sc.alps(weight, gram, pattern), sc.sparsegpt(weight, gram, pattern)
        same_refit = refitted(weight, sparsegpt.mask, gram)
        errors = [output_error(weight, s.weight, gram) for s in (found, same_refit, sparsegpt)]
        assert errors[0] < errors[1] < errors[2]
        assert pattern.violation(found.mask) is None
        assert not found.weight[~found.mask].any()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(PATTERNS))
def test_any_pattern_holds_and_the_weight_is_the_masks_refit(seed: int, pattern: Pattern) -> None:
    weight, gram = problem(rows=8, columns=32, seed=seed)
    solution = sc.alps(weight, gram, pattern)
    assert pattern.violation(solution.mask) is None
    assert torch.equal(solution.weight, refitted(weight, solution.mask, gram).weight)


def test_a_pattern_without_zeros_changes_nothing() -> None:
    weight, gram = problem(columns=32)
    solution = sc.alps(weight, gram, sc.Unstructured(0.0))
    assert torch.equal(solution.weight, weight)


@pytest.mark.parametrize("size", [1.0, 0.25])
def test_uncorrelated_inputs_give_all_but_the_best_mask(size: float) -> None:
    """No weight can make up for another, so it is Wanda's mask, or magnitude's for equal inputs.

    ADMM stops when the support rests, which may be just before: the error is 1.4 % above.
    """
    weight, _ = problem(columns=64)
    sizes = torch.tensor([1.0, size]).repeat(32)
    gram = torch.diag(sizes.square())
    solution = sc.alps(weight, gram, sc.NM(2, 4), damping=1e-6)
    assert torch.equal(solution.weight, weight.masked_fill(~solution.mask, 0))
    mask = sc.NM(2, 4).mask(weight.abs() * sizes)
    assert float((solution.mask == mask).float().mean()) > 0.95
    best = output_error(weight, weight.masked_fill(~mask, 0), gram)
    assert best <= output_error(weight, solution.weight, gram) < 1.02 * best


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, gram = problem(columns=160)
    one, other = (sc.alps(weight, gram * scale, sc.NM(2, 4)) for scale in (1, 2**-12))
    assert torch.equal(one.mask, other.mask) and torch.equal(one.weight, other.weight)


def test_inputs_that_were_never_active_are_dropped_first_and_reported() -> None:
    for damping in (0.0, 0.01):
        weight, gram = problem(columns=64)
        gram[:, 5] = gram[5, :] = 0
        solution = sc.alps(weight, gram, sc.NM(2, 4), damping=damping)
        assert solution.mask[:, 5].float().mean() < 0.2
        assert solution.weight.isfinite().all()
        assert solution.note == "1 inputs were never active"


def test_a_bfloat16_weight_stays_one() -> None:
    weight, gram = problem(columns=64)
    solution = sc.alps(weight.bfloat16(), gram, sc.NM(2, 4))
    wide = sc.alps(weight.bfloat16().float(), gram, sc.NM(2, 4))
    assert torch.equal(solution.weight, wide.weight.bfloat16())
    assert torch.equal(solution.mask, wide.mask)


def test_arguments_are_not_changed() -> None:
    weight, gram = problem(columns=64)
    copies = weight.clone(), gram.clone()
    sc.alps(weight, gram, sc.NM(2, 4))
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])


def test_bad_input_is_refused_with_the_layer() -> None:
    weight, gram = problem(columns=8)
    gram[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"a Gram matrix is finite .* has 1 entries .* check the"):
        sc.alps(weight, gram, sc.NM(2, 4))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"layer 0: damping must be .* at least 0, got -1: 0.01"):
        damped = functools.partial(sc.alps, damping=-1.0)
        sc.reconstruct_(model, "2:4", damped, [torch.eye(8)])


def test_a_mask_that_never_rests_is_told_in_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(columns=64)
    module = importlib.import_module("secateur.reconstruct.alps")  # not the function of that name
    monkeypatch.setattr(module, "ITERATIONS", 6)
    solution = sc.alps(weight, gram, sc.NM(2, 4))
    assert solution.note == "the mask still changed after 6 iterations"
    assert sc.NM(2, 4).violation(solution.mask) is None


# --- eigenvectors --------------------------------------------------------------------------------


def in_float64(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """The weight from eigenvectors found in float64."""
    module = importlib.import_module("secateur.reconstruct.alps")  # not the function of that name

    def once(function, *arguments):  # type: ignore[no-untyped-def]
        assert function is module._eigenvectors
        A, _ = normalised(*arguments, torch.float64)
        return tuple(part.float() for part in torch.linalg.eigh(A))

    return sc.alps(weight, gram, pattern, memo=once).weight


def spread(gram: Tensor) -> Tensor:
    """Inputs of sizes from 1 to 1000, like outlier channels."""
    sizes = torch.logspace(0, 3, len(gram))
    return gram * sizes * sizes[:, None]


def few_directions(gram: Tensor) -> Tensor:
    """A Gram matrix of rank 8: all but its 8 largest eigenvalues come from the damping."""
    L, Q = torch.linalg.eigh(gram)
    return Q[:, -8:] * L[-8:] @ Q[:, -8:].T


@pytest.mark.parametrize("make", [torch.clone, spread, few_directions])
@pytest.mark.parametrize("pattern", [sc.NM(2, 4), sc.Unstructured(0.7)], ids=str)
def test_eigenvectors_in_float32_find_masks_as_good(pattern: Pattern, make) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        weight, gram = problem(columns=160, seed=seed)
        H = hessian(make(gram))
        found = output_error(weight, sc.alps(weight, make(gram), pattern).weight, H)
        assert found == pytest.approx(
            output_error(weight, in_float64(weight, make(gram), pattern), H), rel=0.01
        )


@pytest.mark.parametrize("wrong", ["raises", "inaccurate", "nan"])
def test_where_float32_fails_they_are_found_in_float64(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(columns=64)
    expected = in_float64(weight, gram, sc.NM(2, 4))
    eigh = torch.linalg.eigh

    def fails(A: Tensor) -> tuple[Tensor, Tensor]:
        L, Q = eigh(A)
        if A.dtype == torch.float64:
            return L, Q
        if wrong == "raises":
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return L * (1.01 if wrong == "inaccurate" else torch.nan), Q

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert torch.equal(sc.alps(weight, gram, sc.NM(2, 4)).weight, expected)


@pytest.mark.parametrize("method", [sc.alps, sc.refit(sc.alps, damping=0.1)], ids=name_of)
def test_layers_with_the_same_input_share_them(  # type: ignore[no-untyped-def]
    method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks with four inputs each, q, k and v sharing one; each result is as if alone."""
    torch.manual_seed(0)
    model = Decoder()
    apart = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(20, (2, 6), generator=generator) for _ in range(3)]
    eigh, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(1) or eigh(A))
    sc.reconstruct_(model, "2:4", method, batches)
    assert len(calls) == 12
    monkeypatch.setattr("secateur.prune.passes.functools.cache", lambda function: function)
    sc.reconstruct_(apart, "2:4", method, batches)
    assert len(calls) == 12 + 18
    for a, b in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_weight_whose_zeros_meet_the_pattern_is_left_as_it_is() -> None:
    weight, gram = problem()
    sparse = weight * sc.NM(1, 4).mask(weight.abs())

    def never(*_: object) -> Tensor:
        raise AssertionError("there is nothing to choose, so no eigenvectors are needed")

    found = sc.alps(sparse, gram, sc.NM(2, 4), memo=never)
    assert torch.equal(found.weight, sparse)


def test_where_hardly_a_weight_can_change_the_others_stay() -> None:
    """rho fell without end there, until the division by it left no weight."""
    weight, gram = problem()
    zeros = ~sc.Unstructured(0.497, "layer").mask(torch.rand_like(weight))
    pattern = KeepingZeros(sc.Unstructured(0.5, "layer"), zeros)
    found = sc.alps(weight.masked_fill(zeros, 0), gram, pattern)
    assert int((found.weight == 0).sum()) == weight.numel() // 2
    lost = output_error(weight.masked_fill(zeros, 0), found.weight, gram)
    assert lost < 0.01 * output_error(weight, torch.zeros_like(weight), gram)
