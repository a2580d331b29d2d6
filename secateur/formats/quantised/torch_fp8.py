"""Dense fp8 on a GPU through torch's own scaled product, `torch._scaled_mm`, a scale for each row.

It applies both scales and the bias itself, so that the codes of the tokens are all that is written
besides the result.
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
from secateur.patterns.grids import Fp8, Grid

GRID = Fp8()
MULTIPLE = 16  # of both sizes of the weight, as torch demands


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 8-bit floats without zeros that are left out, inputs rounded to the same."""
    if pattern is not None or grid != GRID or not rounds_inputs:
        return None
    return Implementation("torch", linear, why_not)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why torch's scaled product cannot run this layer here, or None."""
    if problem := why_no_multiple(f"{packed.format} torch", packed.shape, MULTIPLE):
        return problem
    if packed.dtype != torch.bfloat16:
        return f"{packed.format} torch needs bfloat16, got {packed.dtype}: cast the layer"
    return dynamic.why_not(torch.float8_e4m3fn, packed.device)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`(q @ codes.T) * token scales * scales + bias`.

    Error: on Hopper the tensor cores keep about 14 bits of each partial sum (`use_fast_accum`):
        some 2^-13 of the sum of magnitudes, below what rounding the inputs to 4 bits costs.
    """
    tokens, token_scales = quantise.quantise(x, torch.float8_e4m3fn, len(x))
    result: Tensor = torch._scaled_mm(
        tokens,
        codes_of(GRID, None, packed).t(),
        scale_a=token_scales[:, None],
        scale_b=packed["scales"].float().t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return result
