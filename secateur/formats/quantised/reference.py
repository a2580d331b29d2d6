"""The quantised linear that defines what is correct: on scale x code, or products of codes."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.contract import Implementation, Packed
from secateur.formats.quantised.codes import codes_of
from secateur.formats.reference import REFERENCE, anywhere
from secateur.patterns import NM
from secateur.patterns.grids import Grid


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation:
    """For every quantised format."""
    if not rounds_inputs:
        return REFERENCE
    return Implementation("reference", partial(linear, grid, pattern), anywhere)


def linear(
    grid: Grid,
    pattern: NM | None,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """The formula of `secateur.formats.dynamic`: inputs are rounded, a scale for every token.

    Cost: unpacks the codes at every call, and multiplies integers in float64, floats in float32.
    """
    return dynamic.linear(x, codes_of(grid, pattern, packed), packed["scales"], bias)
