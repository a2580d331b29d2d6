"""Patterns as strings: what is read, and the errors for wrong strings."""

import pytest

from secateur.patterns import NM, Block, Channel, Pattern, Unstructured, parse


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("2:4@dense-remainder", NM(2, 4, "dense")),
        ("2:4@pad-remainder", NM(2, 4, "pad")),
        ("2:4@pad-remainder@channels6", NM(2, 4, "pad", 6)),
        ("unstructured:0.6", Unstructured(0.6, "row")),
        ("unstructured:60%", Unstructured(0.6, "row")),
        ("unstructured:0.6@layer", Unstructured(0.6, "layer")),
        ("unstructured:0.6@group64", Unstructured(0.6, "group", 64)),
        ("block:64x32@0.8", Block(64, 32, 0.8)),
        ("channels:0.25", Channel(0.25, "out")),
        ("channels:0.25@in", Channel(0.25, "in")),
    ],
)
def test_reads(text: str, pattern: Pattern) -> None:
    assert parse(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructured:50", "sparsity must be in [0, 1), got 50: did you mean 0.5?"),
        ("unstructured:1.7", "sparsity must be in [0, 1), got 1.7"),
        ("unstructured:-0.1", "sparsity must be in [0, 1), got -0.1"),
        ("unstructured:nan", "sparsity must be in [0, 1), got nan"),
        ("unstructured:half", "cannot read the sparsity 'half'"),
        ("unstructured:1.0", "sparsity must be in [0, 1), got 1"),
        ("blocks:64x64@0.8", "unknown pattern 'blocks:64x64@0.8': did you mean 'block'?"),
        ("block:64@0.8", "cannot read '64@0.8' in the pattern 'block:64@0.8'"),
        ("5:4", "NM(n, m) keeps n of m, needs 1 <= n <= m, got 5:4"),
        ("0:4", "needs 1 <= n <= m, got 0:4"),
        ("2:4@channels0", "channels must be at least 1, got 0"),
        ("2:4@padded", "unknown pattern '2:4@padded'"),
        ("block:0x4@0.5", "Block needs rows and cols >= 1, got 0x4"),
        ("", "unknown pattern ''"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)


def test_wrong_choices_name_the_right_ones(unchecked: None) -> None:
    with pytest.raises(ValueError, match="scope must be 'group', 'row' or 'layer', got 'model'"):
        Unstructured(0.5, "model")
    with pytest.raises(ValueError, match="side must be 'out' or 'in', got 'rows'"):
        Channel(0.5, "rows")
    with pytest.raises(ValueError, match="remainder must be 'error', 'dense' or 'pad', got 'skip'"):
        NM(2, 4, "skip")
