"""Dense int8 on a GPU through torch's own integer product, `torch._int_mm`.

Bytes for each output: 4 written by the product, then 4 read and the layer's 2 written by one pass
that applies both scales and the bias. torch's product has no scales of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.contract import Implementation, Packed
from secateur.formats.kernels import quantise
from secateur.formats.kernels.gpu import why_no_multiple
from secateur.formats.quantised.codes import codes_of
from secateur.patterns import NM
from secateur.patterns.grids import Grid, Int8

GRID = Int8()
MULTIPLE = 8  # of both sizes of the weight, as torch demands; tokens are padded to it
LEAST_ROWS = 24  # torch demands more than 16, and 24 is the next multiple


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 8-bit integers without zeros that are left out, inputs rounded to the same."""
    if pattern is not None or grid != GRID or not rounds_inputs:
        return None
    return Implementation("torch", linear, why_not)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why torch's integer product cannot run this layer here, or None."""
    if problem := why_no_multiple(f"{packed.format} torch", packed.shape, MULTIPLE):
        return problem
    if packed.dtype == torch.float64:
        return f"{packed.format} torch needs at most float32, got torch.float64: cast the layer"
    return dynamic.why_not(torch.int8, packed.device)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The definition's result: sums are exact integers, scaled in float32 and rounded once."""
    rows = max(LEAST_ROWS, -(-len(x) // MULTIPLE) * MULTIPLE)
    tokens, token_scales = quantise.quantise(x, torch.int8, rows)
    sums = torch._int_mm(tokens, codes_of(GRID, None, packed).t())
    return quantise.scale_bias(sums, token_scales, packed["scales"][:, 0], bias, x.dtype)
