"""Patterns as short strings: each class reads its own, `str(pattern)` writes them."""

import difflib
import re

from secateur.patterns.block import Block
from secateur.patterns.channel import Channel
from secateur.patterns.nm import NM
from secateur.patterns.pattern import EXAMPLES, Pattern
from secateur.patterns.unstructured import Unstructured

# The patterns that `parse` knows; a new one gets a line here.
PATTERNS: tuple[type[Pattern], ...] = (NM, Unstructured, Block, Channel)


def as_pattern(given: Pattern | str) -> Pattern:
    """The pattern itself, or the one that a short string names.

    Raises:
        ValueError: if it is neither, or `parse` cannot read it.
    """
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, type) or not isinstance(given, Pattern):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise ValueError(f"a pattern is text or an instance of one, got {kind}: try {EXAMPLES}")
    return given


def parse(text: str) -> Pattern:
    """The pattern that a short string names; `parse(str(pattern)) == pattern`.

    | string | pattern |
    |---|---|
    | `2:4`, `4:8`, `...@dense-remainder`, `...@pad-remainder` | `NM(n, m, remainder)`, n kept |
    | `unstructured:0.6`, `...@layer`, `...@group128` | `Unstructured(sparsity, scope)` |
    | `block:64x64@0.8` | `Block(rows, cols, sparsity)` |
    | `channels:0.25`, `channels:0.25@in` | `Channel(sparsity, side)` |

    Raises:
        ValueError: if the string is none of these, with the part that is wrong.
    """
    for pattern in PATTERNS:
        if (found := pattern.parse(text)) is not None:
            return found
    kind = text.partition(":")[0]
    close = difflib.get_close_matches(kind, re.findall("'([a-z]+):", EXAMPLES), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown pattern {text!r}: {hint}Patterns look like {EXAMPLES}")
