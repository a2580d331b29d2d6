"""Dense fp8 on a GPU through torch's own scaled product, `torch._scaled_mm`, a scale for each row.

It applies both scales and the bias itself, so that the codes of the tokens are all that is written
besides the result.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.fp8_dynamic.packed import PackedFp8Dynamic, codes_of
from secateur.formats.kernels import quantise

MULTIPLE = 16  # of both sizes of the weight, as torch demands


def why_not(packed: PackedFp8Dynamic, tokens: int) -> str | None:
    """None if torch's scaled product can run this layer here, else the reason."""
    out, width = packed.shape
    if out % MULTIPLE or width % MULTIPLE or not out or not width:
        return (
            f"fp8_dynamic torch needs out_features and in_features that are multiples of "
            f"{MULTIPLE}, got {out} x {width}: pad the layer with zeros"
        )
    if packed.dtype != torch.bfloat16:
        return f"fp8_dynamic torch needs bfloat16, got {packed.dtype}: cast the layer"
    return dynamic.why_not(torch.float8_e4m3fn, packed.values.device)


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedFp8Dynamic, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`(q @ codes.T) * token scales * scales + bias`.

    Error: on Hopper the tensor cores keep about 14 bits of each partial sum (`use_fast_accum`):
        some 2^-13 of the sum of magnitudes, below what rounding the inputs to 4 bits costs.
    """
    tokens, token_scales = quantise.quantise(x, torch.float8_e4m3fn, len(x))
    result: Tensor = torch._scaled_mm(
        tokens,
        codes_of(packed).t(),
        scale_a=token_scales[:, None],
        scale_b=packed.scales.float().t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return result
