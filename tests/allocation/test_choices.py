"""Choices: read, applied, and sorted into the passes that make them."""

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.allocation.choices import (
    NO_ZEROS,
    as_choice,
    parse_choice,
    patterns_by_grid,
    patterns_of,
)
from secateur.patterns import Grid, Pattern

WEIGHT = torch.tensor([[7.0, 0.4, -3.4, 1.0], [0.1, -7.0, 2.6, 0.0]])


def applied(text: str, weight: Tensor = WEIGHT) -> Tensor:
    choice = parse_choice(text)
    return choice.applied(weight, choice.mask(weight.abs()))


def nearest(weight: Tensor) -> Tensor:
    """The weight on the grid of 4 bits with groups of 128."""
    grid = sc.Int4()
    scales = grid.scales(weight)
    return grid.dequantised(grid.codes(weight, scales), scales)


def test_a_choice_is_zeros_and_numbers() -> None:
    assert torch.equal(applied("dense"), WEIGHT)
    kept = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert torch.equal(applied("2:4"), WEIGHT * kept)
    assert torch.equal(applied("2:4+int4"), nearest(WEIGHT * kept))
    assert torch.equal(applied("dense+int4"), nearest(WEIGHT))
    assert not torch.equal(nearest(WEIGHT), WEIGHT)


def test_zeros_are_chosen_before_numbers_are_rounded() -> None:
    """0.4 is kept beside 0.3 and becomes zero; it frees no place."""
    weight = torch.tensor([[7.0, 0.4, 0.3, 0.0]])
    assert applied("2:4+int4", weight).tolist() == [[7, 0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "pattern", "grid", "sparsity"),
    [
        ("dense", None, None, 0.0),
        ("4:8", sc.NM(4, 8), None, 0.5),
        ("dense+int4", None, sc.Int4(), 0.0),
        ("2:4+int4:channel", sc.NM(2, 4), sc.Int4(None), 0.5),
        ("block:64x64@0.8+int8", sc.Block(64, 64, 0.8), sc.Int8(), 0.8),
    ],
)
def test_strings(text: str, pattern: Pattern | None, grid: Grid | None, sparsity: float) -> None:
    found = parse_choice(text)
    assert (found.pattern, found.grid, found.sparsity) == (pattern, grid, sparsity)
    if text != "dense":
        assert as_choice(text) == found


def test_kinds_differ_by_grid_and_not_by_sparsity() -> None:
    kinds = [
        parse_choice(text).kind
        for text in ("unstructured:0.5", "unstructured:0.7", "unstructured:0.5+int4", "dense+int4")
    ]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3


def test_what_is_no_choice(unchecked: None) -> None:
    with pytest.raises(ValueError, match="unknown pattern '3of4'"):
        as_choice("3of4+int4")
    with pytest.raises(ValueError, match="a grid is int4, int3, int2, int8 or fp8, got 'int5'"):
        as_choice("2:4+int5")
    with pytest.raises(ValueError, match="a pattern is text or an instance of one, got int"):
        as_choice(3)
    reason = parse_choice("2:4+int4").why_not((4, 8), torch.float64)
    assert reason is not None and reason.endswith("needs float32 or 16 bits, got torch.float64")
    assert parse_choice("2:4+int4").why_not((4, 6), torch.float32) is not None
    assert parse_choice("dense+int4").why_not((4, 6), torch.float32) is None


def test_passes_by_grid() -> None:
    choices = {"a": "2:4", "b": "dense", "c": "dense+int4", "d": "2:4+int4", "e": "4:8"}
    assert patterns_of(choices) == {"a": sc.NM(2, 4), "d": sc.NM(2, 4), "e": sc.NM(4, 8)}
    assert patterns_by_grid(choices) == {
        None: {"a": sc.NM(2, 4), "e": sc.NM(4, 8)},
        sc.Int4(): {"c": NO_ZEROS, "d": sc.NM(2, 4)},
    }
