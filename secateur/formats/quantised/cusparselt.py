"""Products of int8 codes with a 2:4 weight on a GPU: cuSPARSELt between two Triton passes.

There is none of float8 codes: the library takes no scales of the outputs with them, and all of its
algorithms missed the error allowed at every shape that was tried (docs/log).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.kernels import cusparselt, cusparselt_settings, quantise
from secateur.formats.quantised.codes import codes_of
from secateur.patterns import NM
from secateur.patterns.grids import Grid, Int8

# A power of two not below the largest code: products of codes and row scales, divided by it, are
# y / max |x|, which fits float16 where x and y do, with room for sums.
HEADROOM = 128.0
GRID, PATTERN = Int8(), NM(2, 4)


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 weights of 8-bit integers, inputs rounded to the same."""
    if pattern != PATTERN or grid != GRID or not rounds_inputs:
        return None
    blob = Arrangement(("blob", "alpha"), arrange)
    return Implementation("cusparselt", linear, why_not, blob, searches=True)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the library cannot run this layer here, or None."""
    device = packed.device
    problem = cusparselt.why_not(packed.shape, torch.int8, device)
    if problem is None and packed.dtype not in (torch.bfloat16, torch.float16):
        problem = (
            f"cuSPARSELt on codes needs bfloat16 or float16, got {packed.dtype}: cast the layer"
        )
    return problem or dynamic.why_not(torch.int8, device)


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The codes and the scales as the library reads them; made on load and never saved.

    The scales are bytes, since casting a module casts every floating buffer.

    Cost: 0.625 bytes a weight, and for a moment one byte a weight.
    """
    alpha = packed["scales"][:, 0].float() / HEADROOM
    blob = cusparselt.compress(codes_of(GRID, PATTERN, packed))
    return {"blob": blob.view(torch.uint8), "alpha": alpha.view(torch.uint8)}


def linear(
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """The definition's result through cuSPARSELt.

    The product applies the scales of the outputs and is written in 16 bits; one pass then applies
    the tokens' scales and the bias, in place. That is 2 bytes written, 2 read and 2 written for
    each output, where a product in int32 takes 4 + 4 + 2.

    Error: as the definition, and one rounding more: with u half an eps of the layer's dtype,
        u |y - bias| on top of the rounding of y. Rounding x costs some 1 % of y, u is at most
        0.4 %.
    Cost: see `secateur.formats.kernels.cusparselt_child.searched` for the first call.
    Raises: RuntimeError if a search is needed inside a CUDA graph capture, or finds nothing right.
    """
    step = cusparselt.STEPS[torch.int8]
    tokens, token_scales = quantise.quantise(x, torch.int8, -(-len(x) // step) * step)
    row_scales, weight = packed["alpha"].view(torch.float32), packed["blob"].view(torch.int8)
    out = packed.shape[0]

    product = cusparselt_settings.product(weight, tokens, out, None, row_scales, x.dtype)
    return quantise.scale_bias(product, token_scales, None, bias, x.dtype, HEADROOM)
