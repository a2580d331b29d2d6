"""Inputs rounded to 8-bit codes at run time, a scale a token: what the dynamic formats share.

    s_t = max(max |x_t| / largest code, 2^-126)       in float32
    q   = x (1 / s_t), rounded to the nearest code    int8: -127 to 127; float8_e4m3fn: up to 448
    y   = (q @ codes.T) * s_t * scales + bias         rounded once, to the layer's dtype

A token with a NaN or an infinity has the scale NaN and codes 0, so all of its outputs are NaN.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.core.float64 import float64_device
from secateur.formats.kernels import quantise
from secateur.formats.kernels.gpu import why_not_capability
from secateur.formats.kernels.quantise import LARGEST, LEAST_SCALE

CAPABILITY = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}  # the first with such products


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
    # divided by a tensor: by a number a GPU multiplies with the reciprocal, which is not the same
    scales = most / torch.full_like(most, largest)
    scales = scales.clamp(min=LEAST_SCALE).masked_fill(~most.isfinite(), torch.nan)
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
    at = float64_device(x.device) if summed == torch.float64 else x.device
    sums = (tokens.to(at).to(summed) @ codes.to(at).to(summed).t()).to(x.device, wide)
    result = sums * token_scales * scales.to(wide).t()
    return (result if bias is None else result + bias.to(wide)).to(x.dtype)


def why_not(codes: torch.dtype, device: torch.device) -> str | None:
    """Why tokens cannot be rounded to these codes and multiplied on this device, or None."""
    remedy = "use an int8 format, or leave the layer dense"
    return quantise.why_not(device) or why_not_capability(
        f"a product of {codes}", device, CAPABILITY[codes], remedy
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
