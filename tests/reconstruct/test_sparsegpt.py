"""SparseGPT: held to the paper's algorithm in float64, and to laws of its own."""

import pytest
import torch
from torch import Tensor

import secateur as sc
from bench.paper import sparsegpt_algorithm_1
from secateur.patterns import Pattern


def problem(rows: int = 24, columns: int = 320, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix *= torch.arange(1, columns + 1).pow(-0.5)[:, None]
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    difference = (weight - other).double()
    return float(((difference @ gram.double()) * difference).sum())


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (sc.NM(2, 4), {"n": 2, "m": 4}),
        (sc.NM(4, 8), {"n": 4, "m": 8}),
        (sc.NM(1, 4), {"n": 1, "m": 4}),
        (sc.Unstructured(0.5, "layer"), {"p": 0.5}),
        (sc.Unstructured(0.75, "layer"), {"p": 0.75}),
    ],
    ids=str,
)
def test_is_the_papers_algorithm_1(pattern: Pattern, options: dict[str, float]) -> None:
    weight, gram = problem()
    expected, mask = sparsegpt_algorithm_1(weight, gram, **options)
    solution = sc.sparsegpt(weight, gram, pattern)
    agreed = float((solution.mask == mask).float().mean())
    assert agreed > 0.999  # float32 against float64 decides near-ties otherwise
    same_rows = (solution.mask == mask).all(1)
    assert same_rows.float().mean() > 0.7
    torch.testing.assert_close(
        solution.weight[same_rows].double(), expected[same_rows], rtol=1e-3, atol=1e-3
    )
    ours, papers = (output_error(weight, w, gram) for w in (solution.weight, expected))
    assert ours == pytest.approx(papers, rel=0.01)


@pytest.mark.parametrize(
    "pattern",
    [
        sc.NM(2, 4),
        sc.NM(3, 5),
        sc.Unstructured(0.7),
        sc.Block(4, 8, 0.5),
        sc.Channel(0.25, "in"),
    ],
    ids=str,
)
def test_loses_less_output_than_zeroing_the_same_weights(pattern: Pattern) -> None:
    for seed in range(5):
        weight, gram = problem(rows=16, columns=160, seed=seed)
        solution = sc.sparsegpt(weight, gram, pattern)
        zeroed = weight.masked_fill(~solution.mask, 0)
        moved, pruned = (output_error(weight, w, gram) for w in (solution.weight, zeroed))
        assert moved < 0.8 * pruned
        assert pattern.violation(solution.mask) is None
        assert not solution.weight[~solution.mask].any()


def test_whole_outputs_have_nothing_to_make_up_with() -> None:
    weight, gram = problem()
    solution = sc.sparsegpt(weight, gram, sc.Channel(0.25))
    kept = solution.mask.all(1)
    assert int(kept.sum()) == 18
    assert torch.equal(solution.weight[kept], weight[kept])
    assert not solution.weight[~kept].any()


def test_uncorrelated_inputs_of_one_size_give_magnitude_pruning() -> None:
    weight, _ = problem()
    solution = sc.sparsegpt(weight, torch.eye(320), sc.NM(2, 4))
    mask = sc.NM(2, 4).mask(weight.abs())
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, weight * mask)


def test_an_input_repeated_takes_over_the_whole_weight_of_its_copy() -> None:
    """Inputs 0 and 1 are equal: dropping one loses nothing, the other carries their sum."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[0.5, 3.0], [2.0, 1.0]])
    solution = sc.sparsegpt(weight, gram, sc.NM(1, 2), damping=1e-4)
    assert solution.mask.sum(1).tolist() == [1, 1]
    torch.testing.assert_close(solution.weight.sum(1), weight.sum(1), rtol=1e-3, atol=0)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, gram = problem()
    one, other = (sc.sparsegpt(weight, gram * scale, sc.NM(2, 4)) for scale in (1, 2**-12))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight)


def test_inputs_that_were_never_active_cost_nothing_and_are_reported() -> None:
    weight, gram = problem(columns=64)
    gram[:, 5] = gram[5, :] = 0
    solution = sc.sparsegpt(weight, gram, sc.NM(2, 4))
    assert not solution.weight[:, 5].any()
    assert solution.weight.isfinite().all()
    assert solution.note == "1 inputs were never active"


def test_damping_is_raised_and_reported_when_there_is_no_factor() -> None:
    """Fewer tokens than inputs and no damping: the Hessian is singular."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator)
    solution = sc.sparsegpt(torch.randn(4, 64), x.T @ x, sc.NM(2, 4), damping=1e-12)
    assert solution.note.startswith("damping raised from 1e-12 to 1e-")
    assert solution.weight.isfinite().all()


def test_a_hessian_that_cannot_be_factorised_is_an_error_and_never_the_identity() -> None:
    gram = torch.eye(8)
    gram[0, 0] = -1e12
    with pytest.raises(ValueError, match="needs a Hessian that can be factorised"):
        sc.sparsegpt(torch.randn(4, 8), gram, sc.NM(2, 4))


def test_arguments_are_not_changed() -> None:
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    sc.sparsegpt(weight, gram, sc.NM(2, 4))
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
