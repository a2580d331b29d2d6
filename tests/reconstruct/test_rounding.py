"""Rounding with the zeros given: compared with loops in float64; what no single change betters."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.patterns import Int2, Int3, Pattern
from secateur.patterns.grids import Grid
from secateur.reconstruct import refitted, rounding
from secateur.reconstruct.rounding import rounded
from secateur.reconstruct.sparsegpt import walked
from tests.captures import Stream
from tests.reconstruct.problems import model_and_batches, output_error, problem
from tests.reconstruct.test_sparsegpt_grid import FORMATS, GRIDS, PACKED

DENSE = sc.Unstructured(0.0)
PATTERNS = (
    sc.NM(2, 4),
    sc.NM(3, 5),
    sc.Unstructured(0.7),
    sc.Block(4, 8, 0.5),
    sc.Channel(0.25, "in"),
    DENSE,
)


def refit_of(pattern: Pattern, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A weight refitted on its mask by magnitude, the mask, and the Gram matrix."""
    weight, gram = problem(rows, columns, seed)
    mask = pattern.mask(weight.abs())
    return refitted(weight, mask, gram, damping=0.01).weight, mask, gram


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def nearest(grid: Grid, weight: Tensor) -> Tensor:
    scales = grid.scales(weight)
    return grid.dequantised(grid.codes(weight, scales), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_weights_lie_on_the_grid_and_zeros_stay(
    grid: Grid, pattern: Pattern, dtype: torch.dtype
) -> None:
    weight, mask, gram = refit_of(pattern, 16, 320)
    found = rounded(weight, mask, gram, grid, dtype=dtype)
    assert found.weight.dtype == torch.float32 and found.scales.dtype == dtype
    assert not found.weight[~mask].any()
    stored = found.weight.to(dtype)
    assert torch.equal(stored.float(), found.weight)
    assert torch.equal(nearest(grid, stored).to(dtype), stored)
    for of in (found.weight, found.latent):  # latent weights are nearest to the codes
        on_grid = grid.dequantised(grid.codes(of, found.scales), found.scales).to(dtype)
        assert torch.equal(on_grid.float(), found.weight)
    assert not found.latent[~mask].any()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    grid=st.sampled_from(GRIDS),
    pattern=st.sampled_from([sc.NM(2, 4), sc.Unstructured(0.5), DENSE]),
)
def test_loses_no_more_than_the_walk_and_less_than_rounding_to_nearest(
    seed: int, grid: Grid, pattern: Pattern
) -> None:
    weight, mask, gram = refit_of(pattern, 12, 192, seed)
    found = rounded(weight, mask, gram, grid).weight
    walk, _ = walked(weight, mask, gram, grid, damping=0.01, dtype=torch.float32)
    own, of_walk, of_nearest = (
        output_error(weight, w, damped(gram)) for w in (found, walk, nearest(grid, weight))
    )
    assert own <= of_walk * (1 + 1e-5)
    assert own < of_nearest


@pytest.mark.parametrize(("bits", "most"), [(4, 0.9), (3, 0.95), (2, 0.9)])
@pytest.mark.parametrize("pattern", [sc.NM(2, 4), DENSE], ids=str)
def test_descent_takes_a_share_off_the_walks_error(
    bits: int, most: float, pattern: Pattern
) -> None:
    """The error of rounding alone, beside what the zeros cost anyway."""
    grid = {4: sc.Int4(), 3: Int3(), 2: Int2()}[bits]
    weight, mask, gram = refit_of(pattern, 48, 256)
    walk, _ = walked(weight, mask, gram, grid, damping=0.01, dtype=torch.float32)
    found = rounded(weight, mask, gram, grid).weight
    own, of_walk = (output_error(weight, w, damped(gram)) for w in (found, walk))
    assert own < most * of_walk


@pytest.mark.parametrize("grid", [sc.Int4(32), Int3(32), sc.Int4(None), sc.Fp8()], ids=repr)
def test_at_the_end_no_other_code_loses_less(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the kept weights, moved to the code above or below, in float64."""
    monkeypatch.setattr(rounding, "ROUNDS", 200)
    monkeypatch.setattr(rounding, "WORTH", 0.0)
    weight, mask, gram = refit_of(sc.NM(2, 4), 6, 64)
    found = rounded(weight, mask, gram, grid)
    H, Q, W = damped(gram).double(), found.weight.double(), weight.double()
    P = (W - Q) @ H
    ratios = found.weight / found.scales.repeat_interleave(64 // found.scales.shape[1], 1)
    codes = grid.nearest(ratios).double()
    scales = (Q / codes.masked_fill(codes == 0, 1)).abs()
    kept = mask & (codes != 0)
    for other in (grid.nearest((codes * 1.07).float()), grid.nearest((codes * 0.93).float())):
        for step in (1.0, -1.0):
            tried = other.double() if grid.code_dtype.is_floating_point else codes + step
            moved = (tried.clamp(-grid.largest, grid.largest) * scales - Q).masked_fill(~kept, 0)
            lost = moved.square() * H.diagonal() - 2 * moved * P  # of one weight at a time
            assert float(lost.min()) >= -1e-6 * float((Q.square() * H.diagonal()).max())


def test_independent_inputs_are_rounded_to_nearest() -> None:
    """With a diagonal Gram matrix no weight can make up for another; the scale is the best one."""
    weight = torch.tensor([[0.9, -2.1, 4.2, 6.8], [7.0, 3.1, 0.2, -6.9]])
    found = rounded(weight, torch.ones(2, 4, dtype=torch.bool), torch.eye(4), sc.Int4())
    codes = torch.tensor([[1.0, -2.0, 4.0, 7.0], [7.0, 3.0, 0.0, -7.0]])
    scales = (weight * codes).sum(1) / codes.square().sum(1)
    torch.testing.assert_close(found.scales, scales[:, None])
    torch.testing.assert_close(found.weight, scales[:, None] * codes)
    torch.testing.assert_close(found.latent, weight)


def test_it_is_the_best_of_all_where_all_can_be_tried() -> None:
    """Four weights of three codes each at the scale that was found; two inputs are alike."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 4, generator=generator)
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    gram, weight = x.T @ x / 64, torch.randn(5, 4, generator=generator)
    found = rounded(weight, torch.ones(5, 4, dtype=torch.bool), gram, Int2())
    codes = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=4)))
    H = damped(gram)
    for w, scale, q in zip(weight, found.scales, found.weight, strict=True):
        difference = w - scale * codes
        all_lost = ((difference @ H) * difference).sum(1)
        own = float((w - q) @ H @ (w - q))
        assert own <= 1.05 * float(all_lost.min())


def test_inputs_that_were_never_active_are_rounded_by_themselves() -> None:
    weight, gram = problem(8, 128)
    gram[:, 64:] = gram[64:] = 0
    found = rounded(weight, torch.ones_like(weight, dtype=torch.bool), gram, sc.Int4(64)).weight
    off = (found - weight)[:, 64:].abs() / weight[:, 64:].abs().amax(1, keepdim=True)
    assert float(off.max()) < 0.5  # 1 / 14 without clipping
    dead = torch.zeros_like(gram)
    assert rounded(weight, weight != 0, dead, sc.Int4(64)).weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "format"), list(zip(PACKED, FORMATS, strict=True)), ids=str)
@pytest.mark.parametrize(
    "algorithm",
    [sc.alps, sc.refit(sc.wanda), "fixed damping"],
    ids=["alps", "refit", "fixed damping"],
)
def test_packing_finds_the_grid_of_refits_and_loses_nothing(
    algorithm: object, grid: Grid, format: str, dtype: torch.dtype
) -> None:
    model, batches = model_and_batches()
    model, batches = model.to(dtype), [batch.to(dtype) for batch in batches]
    made, name = functools.partial(sc.alps, grid=grid), f"alps(grid={grid!r})"
    if algorithm == "fixed damping":
        made = sc.refit(sc.wanda, damping=0.1, grid=grid)
        name = f"refit(wanda, damping=0.1, grid={grid!r})"
    elif algorithm is not sc.alps:
        made, name = sc.refit(sc.wanda, grid=grid), f"refit(wanda, grid={grid!r})"
    report = sc.reconstruct_(model, "2:4", made, batches)
    assert report.method == name
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    packed = sc.pack_(model, format)
    assert packed.weight_error <= torch.finfo(dtype).eps  # the products' rounding alone
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), weights, strict=True))


def test_alps_on_a_grid_loses_less_than_rounding_it_afterwards() -> None:
    joint = after = 0.0
    for seed in range(3):
        weight, gram = problem(32, 256, seed)
        plain = sc.alps(weight, gram, sc.NM(2, 4))
        on_grid = sc.alps(weight, gram, sc.NM(2, 4), grid=sc.Int4(), dtype=torch.bfloat16)
        assert torch.equal(plain.mask, on_grid.mask)
        least = output_error(weight, plain.weight, gram)
        joint += output_error(weight, on_grid.weight, gram) - least
        after += output_error(weight, nearest(sc.Int4(), plain.weight.bfloat16()), gram) - least
    assert joint < 0.5 * after


@pytest.mark.parametrize("grid", [sc.Int4(), sc.Int4(96), sc.Fp8()], ids=repr)
def test_codes_chosen_in_a_graph_are_those_of_launches(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """To the bit, on memory that other columns have used before; launches stand in for a graph."""
    weight, gram = problem(rows=24, columns=320)
    mask = sc.NM(2, 4).mask(weight.abs())
    expected = rounding.rounded(weight, mask, gram, grid)
    taken: list[tuple[int, ...]] = []
    replayed, init = rounding._Descent.replayed, rounding._Descent.__init__

    def counted(self: Any, given: list[Tensor]) -> Tensor:
        taken.append(tuple(given[0].shape))
        return replayed(self, given)

    def in_graphs(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.in_graphs = True

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(rounding, "captured", lambda run, stream: run)
    monkeypatch.setattr(rounding._Descent, "replayed", counted)
    monkeypatch.setattr(rounding._Descent, "__init__", in_graphs)
    rounding._graph.cache_clear()
    found = rounding.rounded(weight, mask, gram, grid)
    rounding._graph.cache_clear()
    assert all(map(torch.equal, found, expected))
    assert len(taken) > len(set(taken)) > 1
