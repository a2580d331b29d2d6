"""Inputs rounded to 8-bit codes at run time, a scale a token: what the dynamic formats share.

    s_t = max(max |x_t| / largest code, 2^-126)       in float32
    q   = x (1 / s_t), rounded to the nearest code    int8: -127 to 127; float8_e4m3fn: up to 448
    y   = (q @ codes.T) * s_t * scales + bias         rounded once, to the layer's dtype

A token with a NaN or an infinity has the scale NaN and codes 0, so all of its outputs are NaN.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from secateur.kernels import cusparselt, quantise
from secateur.kernels.quantise import LARGEST, LEAST_SCALE

CAPABILITY = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}  # the first with such products
# A power of two not below the largest int8 code: products of codes and row scales, divided by it,
# are y / max |x|, which fits float16 where x and y do, with room for sums.
HEADROOM = 128.0


def quantised(
    x: Float[Tensor, "tokens in"], codes: torch.dtype
) -> tuple[Shaped[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    """The codes of every token and its scale, which is float32 (float64 for a float64 input).

    Error: |x - s_t q| <= s_t / 2 for int8; |x| / 16 for float8, or s_t / 1024 where that is more;
        and what rounding x (1 / s_t) to float32 adds, less than a ten-thousandth of it.
    """
    wide = x.to(_wide(x))
    largest = LARGEST[codes]
    most = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    scales = (most / largest).clamp(min=LEAST_SCALE).masked_fill(~most.isfinite(), torch.nan)
    ratios = (wide * scales.reciprocal()).clamp(-largest, largest).masked_fill(scales.isnan(), 0.0)
    return (ratios.round() if codes == torch.int8 else ratios).to(codes), scales


def linear(
    x: Float[Tensor, "tokens in"],
    codes: Shaped[Tensor, "out in"],
    scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """The definition: the product of codes, exact for int8 and summed in float32 for float8.

    Cost: a product in float64 for int8, whose sums of up to 2^53 float32 could not hold.
    """
    tokens, token_scales = quantised(x, codes.dtype)
    wide = _wide(x)
    summed = torch.float64 if codes.dtype == torch.int8 else wide
    sums = (tokens.to(summed) @ codes.to(summed).t()).to(wide)
    result = sums * token_scales * scales.to(wide).t()
    return (result if bias is None else result + bias.to(wide)).to(x.dtype)


def why_not(codes: torch.dtype, device: torch.device) -> str | None:
    """None if tokens can be rounded to these codes and multiplied on this device, else why not."""
    problem = quantise.why_not(device)
    if problem is not None:
        return problem
    capability, needed = torch.cuda.get_device_capability(device), CAPABILITY[codes]
    if capability < needed:
        return (
            f"products of {codes} need compute capability {needed[0]}.{needed[1]}, this GPU has "
            f"{capability[0]}.{capability[1]}: use an int8 format, or leave the layer dense"
        )
    return None


def sparse_why_not(
    shape: tuple[int, int], dtype: torch.dtype, codes: torch.dtype, device: torch.device
) -> str | None:
    """None if `sparse_linear` can run such a layer here, else the reason."""
    problem = cusparselt.why_not(shape, codes, device)
    if problem is None and dtype not in (torch.bfloat16, torch.float16):
        problem = f"cuSPARSELt on codes needs bfloat16 or float16, got {dtype}: cast the layer"
    return problem or why_not(codes, device)


def compressed(codes: Shaped[Tensor, "out in"]) -> UInt8[Tensor, "..."]:
    """The codes as cuSPARSELt reads them; bytes, as casting a module casts every floating buffer.

    Cost: 0.625 bytes a weight, and for a moment one byte a weight.
    """
    return cusparselt.compress(codes).view(torch.uint8)


def alpha_of(scales: Float[Tensor, "out 1"]) -> UInt8[Tensor, " bytes"]:
    """The outputs' scales as the library applies them to int8 codes: over `HEADROOM`, in float32.

    They are bytes for the reason of `compressed`.
    """
    return (scales[:, 0].float() / HEADROOM).view(torch.uint8)


def sparse_linear(
    x: Float[Tensor, "tokens in"],
    blob: UInt8[Tensor, "..."],
    alpha: UInt8[Tensor, " bytes"] | None,
    scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
    codes: Callable[[], Shaped[Tensor, "out in"]],
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """`linear` through cuSPARSELt, for codes of this dtype; `codes()` gives them for a search.

    The product is written in 16 bits; one pass then applies the scales of the tokens and the bias.
    That is 2 bytes written, 2 read and 2 written for each output, where a product in int32 takes
    4 + 4 + 2. With `alpha` the product applies the outputs' scales, too. The library takes none for
    float8: there the pass applies `scales`, and the product is bfloat16, because float16 could not
    hold unscaled sums.

    Error: that of the definition and one rounding more: with u half an eps of the product's dtype,
        u |y - bias| on top of the rounding of y. Rounding x costs some 1 % of y, u is at most
        0.4 %. For float8 some 2^-13 of a sum for each 32 products on sm_90, as tensor cores sum
        there.
    Cost: see `secateur.kernels.cusparselt.search` for the first call.
    Raises: RuntimeError if a search is needed inside a CUDA graph capture, or finds nothing right.
    """
    step = cusparselt.STEPS[dtype]
    tokens, token_scales = quantise.quantise(x, dtype, -(-len(x) // step) * step)
    weight, out = blob.view(dtype), len(scales)
    if alpha is None:
        first, last, written, factor = None, scales[:, 0], torch.bfloat16, 1.0
    else:
        first, last, written, factor = alpha.view(torch.float32), None, x.dtype, HEADROOM

    def exact(random: Tensor) -> Tensor:
        return random.float() @ codes().float().t()

    case = cusparselt.case_of(tokens, out, None, first, written)
    setting = cusparselt.setting_for(case, weight, exact)
    product = cusparselt.multiply(weight, tokens, out, setting, None, first, written)
    return quantise.scale_bias(product, token_scales, last, bias, x.dtype, factor)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
