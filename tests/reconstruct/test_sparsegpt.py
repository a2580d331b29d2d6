"""SparseGPT: compared with the paper's algorithm in float64, and held to its own laws."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import secateur as sc
from bench.lib.paper import sparsegpt_algorithm_1
from secateur.model.statistics import call
from secateur.patterns import Pattern
from secateur.patterns.grids import Grid
from secateur.reconstruct import Solution
from tests.models import Decoder
from tests.reconstruct.problems import PAPER_PATTERNS, output_error, problem

# By name: `secateur.reconstruct.sparsegpt` is the function.
walks = importlib.import_module("secateur.reconstruct.sparsegpt")


@pytest.mark.parametrize(("pattern", "options"), PAPER_PATTERNS, ids=str)
def test_is_the_papers_algorithm_1(pattern: Pattern, options: dict[str, float]) -> None:
    weight, gram = problem()
    solution = sc.sparsegpt(weight, gram, pattern)
    assert_is_the_papers(solution, weight, gram, options)


def assert_is_the_papers(
    solution: Solution, weight: Tensor, gram: Tensor, options: dict[str, float]
) -> None:
    expected, mask = sparsegpt_algorithm_1(weight, gram, **options)
    agreed = float((solution.mask == mask).float().mean())
    assert agreed > 0.999  # float32 breaks near-ties differently from float64
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
    """Inputs 0 and 1 are equal: dropping one loses nothing, and the other gets their sum."""
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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the size of each matrix factorised from now on."""
    sizes: list[int] = []
    cholesky = torch.linalg.cholesky_ex

    def counting(H: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(H))
        found: tuple[Tensor, Tensor] = cholesky(H)
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    return sizes


def test_queries_keys_and_values_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    factorised = counted(monkeypatch)
    batch = torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(0))
    report = sc.reconstruct_(Decoder(blocks=2), "2:4", sc.sparsegpt, [batch])
    assert len(report.layers) == 12
    assert factorised == [16, 16, 16, 32] * 2


def test_the_factor_is_found_once_for_layers_with_the_same_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, gram = problem(columns=64)
    gram[:, 5] = gram[5, :] = 0
    alone = [sc.sparsegpt(w, gram, sc.NM(2, 4)) for w in (weight, -2 * weight)]
    factorised = counted(monkeypatch)
    once = functools.cache(call)
    together = [sc.sparsegpt(w, gram, sc.NM(2, 4), memo=once) for w in (weight, -2 * weight)]
    assert len(factorised) == 1
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.weight, other.weight) and one.note == other.note
    sc.sparsegpt(weight, gram, sc.NM(2, 4), damping=0.1, memo=once)
    sc.sparsegpt(weight, gram.clone(), sc.NM(2, 4), memo=once)
    assert len(factorised) == 3


def launched(run: Callable[[], None], stream: object) -> Callable[[], None]:
    """A stand-in for a capture: the same work on the same buffers, launch by launch."""
    return run


class Stream(NamedTuple):
    device: torch.device


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Iterator[Callable[[], None]]:
    """A function after whose call walks on the CPU take the path that a GPU captures."""

    def let() -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(walks, "_can_capture", lambda W: True)
        monkeypatch.setattr(walks, "captured", launched)

    walks._chunk.cache_clear()
    yield let
    walks._chunk.cache_clear()


@pytest.mark.parametrize("grid", [None, sc.Int4(), sc.Int4(64), sc.Fp8()], ids=repr)
@pytest.mark.parametrize(
    "pattern",
    [
        sc.NM(2, 4),
        sc.NM(3, 5, "dense"),
        sc.NM(8, 32, "pad"),
        sc.NM(2, 4, channels=68),
        sc.Unstructured(0.5),
        sc.Unstructured(0.6, "group", 100),
        sc.Block(4, 8, 0.5),
        sc.Channel(0.25, "in"),
    ],
    ids=str,
)
def test_a_walk_in_chunks_is_the_walk(
    pattern: Pattern, grid: Grid | None, in_chunks: Callable[[], None]
) -> None:
    """No bit differs, and no chunk sees what another left behind."""
    weight, gram = problem(rows=24, columns=408)
    expected = sc.sparsegpt(weight, gram, pattern, grid=grid)
    in_chunks()
    solution = sc.sparsegpt(weight, gram, pattern, grid=grid)
    used = walks._chunk.cache_info()
    assert torch.equal(solution.mask, expected.mask)
    assert torch.equal(solution.weight, expected.weight)
    assert used.misses + used.hits >= 408 // walks.CHUNK
    assert used.hits > 0 or grid is not None  # with a grid the walk goes group by group


def test_chunks_that_were_made_in_inference_mode_serve_outside_of_it(
    in_chunks: Callable[[], None],
) -> None:
    weight, gram = problem()
    expected = sc.sparsegpt(weight, gram, sc.NM(2, 4)).weight
    in_chunks()
    with torch.inference_mode():
        inside = sc.sparsegpt(weight, gram, sc.NM(2, 4)).weight
    outside = sc.sparsegpt(weight, gram, sc.NM(2, 4)).weight
    assert torch.equal(inside, expected) and torch.equal(outside, expected)


def test_a_chunk_takes_the_memory_that_is_documented(in_chunks: Callable[[], None]) -> None:
    in_chunks()
    walk, _ = walks._chunk(walks.CHUNK, 40, (), None, Stream(torch.device("cpu")), "none")
    assert sum(buffer.nbytes for buffer in (walk.W, walk.E, walk.M)) == 1152 * 40


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("columns", [96, 300, 640])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (sc.NM(2, 4), {"n": 2, "m": 4}),
        (sc.NM(4, 8, "dense"), {"n": 4, "m": 8}),
        (sc.Unstructured(0.5, "layer"), {"p": 0.5}),
    ],
    ids=str,
)
def test_on_a_gpu_graphs_compute_what_launches_do(
    pattern: Pattern, options: dict[str, float], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs twice, so that graphs are replayed on weights they were not captured with."""
    monkeypatch.setattr(walks, "FEWEST", 1)
    problems = [problem(rows=160, columns=columns, seed=seed) for seed in range(2)]

    def solutions() -> list[Solution]:
        walks._chunk.cache_clear()
        found = [sc.sparsegpt(w.cuda(), g.cuda(), pattern) for w, g in problems]
        assert walks._chunk.cache_info().hits > 0
        walks._chunk.cache_clear()
        return [Solution(s.weight.cpu(), s.mask.cpu(), s.note) for s in found]

    in_graphs = solutions()
    monkeypatch.setattr(walks, "captured", launched)
    for (weight, gram), found, other in zip(problems, in_graphs, solutions(), strict=True):
        assert torch.equal(found.mask, other.mask)
        assert torch.equal(found.weight, other.weight)
        if columns % options.get("m", 1) == 0:
            assert_is_the_papers(found, weight, gram, options)
    monkeypatch.setattr(walks, "_can_capture", lambda W: False)
    weight, gram = problems[0]
    whole = sc.sparsegpt(weight.cuda(), gram.cuda(), pattern)
    assert (whole.mask.cpu() == in_graphs[0].mask).float().mean() > 0.999


@pytest.mark.gpu
@needs_gpu
def test_a_graph_is_used_on_its_own_stream_and_in_any_mode() -> None:
    weight, gram = (t.cuda() for t in problem(rows=160, columns=640))
    walks._chunk.cache_clear()
    with torch.inference_mode():
        again = sc.sparsegpt(weight, gram, sc.NM(2, 4))
    expected = sc.sparsegpt(weight, gram, sc.NM(2, 4))
    kinds = walks._chunk.cache_info().misses
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        elsewhere = sc.sparsegpt(weight, gram, sc.NM(2, 4))
    torch.cuda.current_stream().wait_stream(other)
    assert torch.equal(again.weight, expected.weight)
    assert torch.equal(elsewhere.weight, expected.weight)
    assert walks._chunk.cache_info().misses == 2 * kinds
    walks._chunk.cache_clear()
