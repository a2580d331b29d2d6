"""Rules that learn masks, held to their formulas in float64 and to a budget in other dtypes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.patterns import NM, Pattern, parse
from secateur.train.dynamic import uniform
from secateur.train.straight_through import (
    Learner,
    Learnt,
    SoftThreshold,
    StraightThrough,
    Supermask,
)

PATTERNS = ("2:4", "1:4", "3:8", "2:4@dense-remainder", "2:4@pad-remainder", "2:4@channels6")
OTHERS = ("unstructured:0.6", "unstructured:0.6@layer", "block:2x3@0.5", "channels:0.5")


def matrix(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def begun(rule: Learner, weight: Tensor, pattern: Pattern) -> Learnt:
    trained, fixed = rule.begin("layer", weight, pattern)
    return Learnt(trained, pattern.mask(trained.abs()), fixed)


def groups(pattern: NM, columns: int) -> list[range]:
    """The columns of each group of m, by its definition; a dense remainder is in none."""
    width = pattern.channels or columns
    starts = [run + at for run in range(0, columns, width) for at in range(0, width, pattern.m)]
    ends = [min(start + pattern.m, start // width * width + width) for start in starts]
    whole = [range(start, end) for start, end in zip(starts, ends, strict=True)]
    return [g for g in whole if len(g) == pattern.m or pattern.remainder == "pad"]


def soft(weight: Tensor, pattern: NM) -> Tensor:
    """Element by element: each group's n largest, less the largest of the others."""
    out = weight.clone()
    for row in range(weight.shape[0]):
        for group in groups(pattern, weight.shape[1]):
            sizes = sorted((abs(float(weight[row, j])) for j in group), reverse=True)
            t = sizes[pattern.n] if len(sizes) > pattern.n else 0.0
            for j in group:
                w = float(weight[row, j])
                out[row, j] = math.copysign(max(abs(w) - t, 0.0), w)
    return out


# --- S-STE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
def test_the_soft_threshold_is_that_of_its_definition(text: str) -> None:
    pattern = parse(text)
    assert isinstance(pattern, NM)
    columns = 18 if "remainder" in text else 24
    if pattern.channels:
        pattern = NM(2, 4, "dense", 6)
    weight = matrix(columns=columns)
    S = soft(weight, pattern)
    beta = float((weight * S).sum() / S.square().sum())
    learnt = begun(SoftThreshold(), weight, pattern)
    assert learnt.fixed is not None and abs(float(learnt.fixed) - beta) < 1e-12
    found = SoftThreshold().weight(learnt, pattern)
    assert torch.allclose(found, beta * S, atol=1e-14, rtol=0)
    assert torch.equal(found == 0, S == 0)


def test_beta_makes_the_first_weight_as_near_as_it_can_be_and_stays() -> None:
    pattern, rule, weight = NM(2, 4), SoftThreshold(), matrix()
    learnt = begun(rule, weight, pattern)
    assert learnt.fixed is not None
    near = [
        float((weight - rule.weight(learnt._replace(fixed=learnt.fixed * k), pattern)).norm())
        for k in (0.99, 1.0, 1.01)
    ]
    assert near[1] == min(near)
    # One that followed W would make three times the weight of half the excess.
    other = learnt._replace(trained=3 * weight)
    assert torch.allclose(rule.weight(other, pattern), 3 * rule.weight(learnt, pattern))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.integers(0, 3))
def test_the_soft_threshold_has_no_jumps(group: list[float], place: int) -> None:
    """A small change of one weight changes no other by more, whichever masks lie between."""
    pattern, rule = NM(2, 4), SoftThreshold()
    weight, step = torch.tensor([group], dtype=torch.float64), 1e-6
    moved = weight.clone()
    moved[0, place] += step
    one, two = (
        rule.weight(Learnt(w, pattern.mask(w.abs()), torch.tensor(1.0)), pattern)
        for w in (weight, moved)
    )
    assert float((one - two).abs().max()) <= step * (1 + 1e-9)


def test_a_weight_without_an_excess_is_refused() -> None:
    with pytest.raises(ValueError, match="layer has no weight larger than those that 2:4 drops"):
        SoftThreshold().begin("layer", torch.zeros(4, 8), NM(2, 4))
    with pytest.raises(ValueError, match="give it random weights, or leave it out of the plan"):
        SoftThreshold().begin("layer", torch.ones(4, 8), NM(2, 4))


@pytest.mark.parametrize("text", OTHERS)
def test_the_soft_threshold_is_for_nm_alone(text: str) -> None:
    rule = SoftThreshold()
    with pytest.raises(ValueError, match=f"fc is planned {parse(text)}, .* is for N:M alone"):
        rule.require("fc", parse(text))
    rule.require("fc", NM(4, 8))
    for other in (StraightThrough(), Supermask()):
        other.require("fc", parse(text))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ("2:4", *OTHERS))
def test_weights_are_those_of_the_mask_and_gradients_those_of_the_papers(text: str) -> None:
    pattern, W, g = parse(text), matrix(), matrix(seed=1)
    M = pattern.mask(W.abs())
    for rule, expected in (
        (StraightThrough(), g),
        (StraightThrough(0.25), g + 0.25 * (1 - M.double()) * W),
    ):
        learnt = begun(rule, W, pattern)
        assert torch.equal(rule.weight(learnt, pattern), W * M)
        assert torch.equal(rule.gradient(g, learnt, 1, 1.0), expected)
    rule = Supermask()
    learnt = begun(rule, W, pattern)
    S = learnt.trained
    assert torch.equal(rule.weight(learnt, pattern), W * pattern.mask(S.abs()))
    assert torch.equal(rule.gradient(g, learnt, 1, 1.0), g * W * S.sign())


def test_the_soft_threshold_hands_gradients_on() -> None:
    learnt, g = begun(SoftThreshold(), matrix(), NM(2, 4)), matrix(seed=1)
    assert SoftThreshold().gradient(g, learnt, 1, 1.0) is g


def test_the_decay_rises_over_its_ramp_and_is_scaled_as_gradients_are() -> None:
    W, g, pattern = matrix(), matrix(seed=1), NM(2, 4)
    learnt = begun(StraightThrough(), W, pattern)
    pulls = [
        (StraightThrough(0.5, ramp=10).gradient(g, learnt, step, scale) - g)[~learnt.mask]
        for step, scale in ((1, 1.0), (5, 1.0), (10, 1.0), (40, 1.0), (40, torch.tensor(8.0)))
    ]
    for pull, share in zip(pulls, (0.05, 0.25, 0.5, 0.5, 4.0), strict=True):
        assert torch.allclose(pull, share * W[~learnt.mask], atol=1e-14)


def test_scores_are_uniform_and_follow_from_seed_and_name() -> None:
    weight = torch.randn(64, 256)
    scores = Supermask(3).begin("a", weight, NM(2, 4))[0]
    assert torch.equal(scores, (2 * uniform("3/a", weight) - 1) / 16)
    assert float(scores.abs().max()) < 1 / 16 and abs(float(scores.mean())) < 1e-3
    assert not torch.equal(scores, Supermask(3).begin("b", weight, NM(2, 4))[0])
    assert not torch.equal(scores, Supermask(4).begin("a", weight, NM(2, 4))[0])


def test_impossible_numbers_are_refused() -> None:
    for decay, ramp in ((-1.0, 0), (float("nan"), 0), (float("inf"), 0), (0.1, -1)):
        with pytest.raises(ValueError, match=r"StraightThrough needs a finite decay >= 0 and a"):
            StraightThrough(decay, ramp)


# --- other dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rule", [StraightThrough(0.01), SoftThreshold(), Supermask()], ids=lambda r: type(r).__name__
)
def test_low_precision_is_float64_rounded_once(rule: Learner, dtype: torch.dtype) -> None:
    """Inside float32 each of three roundings adds half of float32's unit, of the largest term."""
    pattern, W, g = NM(2, 4), matrix().to(dtype), matrix(seed=1).to(dtype)
    small = begun(rule, W, pattern)
    wide = Learnt(*(t if t is None or t.dtype == torch.bool else t.double() for t in small))
    unit = torch.finfo(dtype).eps / 2
    inside = 3 * torch.finfo(torch.float32).eps / 2
    for found, exact, largest in (
        (rule.weight(small, pattern), rule.weight(wide, pattern), W.abs().max() * 4),
        (
            rule.gradient(copy.deepcopy(g), small, 1, 1.0),
            rule.gradient(g.double(), wide, 1, 1.0),
            g.abs().max() * W.abs().max(),
        ),
    ):
        assert found.dtype == dtype
        budget = unit * exact.abs() + inside * float(largest) + torch.finfo(dtype).tiny
        assert bool(((found.double() - exact).abs() <= budget).all())
    if not isinstance(rule, SoftThreshold):
        assert torch.equal(rule.weight(small, pattern).double(), rule.weight(wide, pattern))
    assert torch.equal(rule.weight(small, pattern) == 0, rule.weight(wide, pattern) == 0)
    assert not bool(rule.weight(small, pattern).signbit()[~small.mask].any())
