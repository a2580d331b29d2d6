"""The Triton kernels of `quantise.py`, in a module of their own because importing it needs Triton.

Every step is IEEE arithmetic with one rounding (`/` would be Triton's approximate division), so
that codes and scales equal the definition's in plain torch, bit for bit. A maximum of floats drops
NaN; a maximum of their bits does not, since NaN has the largest.
"""

from typing import no_type_check

import triton
import triton.language as tl

ROUNDING = tl.constexpr(1.5 * 2**23)  # x + this - this is x rounded to an integer, ties to even
INFINITE = tl.constexpr(0x7F800000)  # the bits of +inf; NaN has larger ones


@triton.jit
@no_type_check
def _magnitude(values):
    """The bits of |x|, which order as the magnitudes do."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
@no_type_check
def _scale(bits, largest: tl.constexpr, least: tl.constexpr):
    """The scale of a token whose largest magnitude has these bits; NaN if it is not finite."""
    scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), largest), least)
    return tl.where(bits < INFINITE, scale, float("nan"))


@triton.jit
@no_type_check
def _codes(values, scale, largest: tl.constexpr, is_integer: tl.constexpr):
    """Nearest codes; 0 where the scale is NaN, whose product is NaN all the same."""
    ratios = values * tl.div_rn(1.0, scale)
    ratios = tl.minimum(tl.maximum(ratios, -largest), largest)
    ratios = tl.where(scale == scale, ratios, 0.0)
    if is_integer:
        return ((ratios + ROUNDING) - ROUNDING).to(tl.int8)
    else:
        return ratios.to(tl.float8e4nv)


@triton.jit
@no_type_check
def quantise_rows(
    x,
    codes,
    scales,
    tokens,
    width,
    largest: tl.constexpr,
    least: tl.constexpr,
    is_integer: tl.constexpr,
    is_held: tl.constexpr,
    block: tl.constexpr,
):
    """One token a program: its largest magnitude, then its codes; rows beyond the tokens are 0."""
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    columns = tl.arange(0, block)
    if is_held:
        inside = columns < width
        read = inside & (row < tokens)
        values = tl.load(x + start + columns, mask=read, other=0.0).to(tl.float32)
        scale = _scale(tl.max(_magnitude(values), axis=0), largest, least)
        tl.store(codes + start + columns, _codes(values, scale, largest, is_integer), mask=inside)
    else:
        most = tl.zeros([block], dtype=tl.int32)
        for first in range(0, width, block):
            read = (first + columns < width) & (row < tokens)
            values = tl.load(x + start + first + columns, mask=read, other=0.0).to(tl.float32)
            most = tl.maximum(most, _magnitude(values))
        scale = _scale(tl.max(most, axis=0), largest, least)
        for first in range(0, width, block):
            inside = first + columns < width
            read = inside & (row < tokens)
            values = tl.load(x + start + first + columns, mask=read, other=0.0).to(tl.float32)
            found = _codes(values, scale, largest, is_integer)
            tl.store(codes + start + first + columns, found, mask=inside)
    tl.store(scales + row, scale, mask=row < tokens)


@triton.jit
@no_type_check
def scale_rows(
    product,
    token_scales,
    row_scales,
    bias,
    result,
    tokens,
    width,
    factor,
    has_row_scales: tl.constexpr,
    has_bias: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """A tile of the product a program; `result` may be `product`."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    is_column = column < width
    inside = (row < tokens)[:, None] & is_column[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(product + place, mask=inside, other=0).to(tl.float32)
    values *= (tl.load(token_scales + row, mask=row < tokens, other=0.0) * factor)[:, None]
    if has_row_scales:
        scales = tl.load(row_scales + column, mask=is_column, other=0.0).to(tl.float32)
        values *= scales[None, :]
    if has_bias:
        offsets = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
        values += offsets[None, :]
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)
