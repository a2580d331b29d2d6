"""Patterns as short strings, read in this one place; `str(pattern)` writes them."""

import difflib
import re

from secateur.patterns.block import Block
from secateur.patterns.channel import Channel
from secateur.patterns.nm import NM, Remainder
from secateur.patterns.pattern import Pattern
from secateur.patterns.unstructured import Unstructured

EXAMPLES = "'2:4', '4:8', 'unstructured:0.6', 'block:64x64@0.8' or 'channels:0.25'"


def as_pattern(given: Pattern | str) -> Pattern:
    """The pattern itself, or the one that a short string names.

    Raises:
        ValueError: if it is neither, or as `parse`.
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
    if match := re.fullmatch(r"(\d+):(\d+)(?:@(dense|pad)-remainder)?(?:@channels(\d+))?", text):
        n, m, rest, channels = match.groups()
        remainder: Remainder = "dense" if rest == "dense" else "pad" if rest == "pad" else "error"
        return NM(int(n), int(m), remainder, int(channels) if channels else None)
    kind, _, rest = text.partition(":")
    if kind == "unstructured":
        if match := re.fullmatch(r"([^@]+)(?:@(row|layer|group(\d+)))?", rest):
            sparsity, scope, size = match.groups()
            if size:
                return Unstructured(_fraction(sparsity, text), "group", int(size))
            return Unstructured(_fraction(sparsity, text), "layer" if scope == "layer" else "row")
    elif kind == "block":
        if match := re.fullmatch(r"(\d+)x(\d+)@([^@]+)", rest):
            rows, cols, sparsity = match.groups()
            return Block(int(rows), int(cols), _fraction(sparsity, text))
    elif kind == "channels":
        if match := re.fullmatch(r"([^@]+)(@(?:in|out))?", rest):
            sparsity, side = match.groups()
            return Channel(_fraction(sparsity, text), "in" if side == "@in" else "out")
    else:
        close = difflib.get_close_matches(kind, ["unstructured", "block", "channels"], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown pattern {text!r}: {hint}Patterns look like {EXAMPLES}")
    raise ValueError(f"cannot read {rest!r} in the pattern {text!r}: patterns look like {EXAMPLES}")


def _fraction(number: str, text: str) -> float:
    try:
        if number.endswith("%"):
            return float(number[:-1]) / 100
        return float(number)
    except ValueError:
        raise ValueError(f"cannot read the sparsity {number!r} in the pattern {text!r}") from None
