"""Inputs rounded token by token on a GPU, and the pass that scales the product of their codes.

The kernels are Triton's and lie in `quantise_kernels.py`, which is imported at the first call: this
module needs no Triton. Both are bound by memory: a token is read once and written as codes, a
product is read once and written as the result.
"""

from importlib.util import find_spec

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.formats.kernels.gpu import on, why_no_gpu

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # magnitude of a code
LEAST_SCALE = 2.0**-126  # the least normal float32: a token of zeros divides by it
HELD = 16384  # inputs of a token that fit into the registers of one program
CHUNK = 4096  # inputs at a time where they do not
ROWS, COLUMNS = 4, 1024  # of the product, for one program
VALUES_A_WARP = 1024  # 32 in each thread


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if find_spec("triton") is None:
        return "quantising tokens needs Triton, got a Python without it: pip install triton"
    return None


def quantise(
    x: Float[Tensor, "tokens in"], codes: torch.dtype, rows: int
) -> tuple[Shaped[Tensor, "rows in"], Float[Tensor, " tokens"]]:
    """Codes of the tokens, filled up with zeros to `rows`, and the scale of each, in float32.

    scale = max(max |x| / largest code, 2^-126); code = x (1 / scale), rounded to the nearest, ties
    to even. A token with a number that is not finite has codes 0 and the scale NaN.

    Cost: reads x once (twice beyond 16,384 inputs, the second time from the cache); writes a byte
        for each number.
    """
    from secateur.formats.kernels.quantise_kernels import quantise_rows

    tokens, width = x.shape
    assert rows >= tokens, "no token is dropped"
    x = x.contiguous()
    result = torch.empty(rows, width, dtype=codes, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    is_held = width <= HELD
    block = _power_of_two(width) if is_held else CHUNK
    with on(x.device):
        quantise_rows[(rows,)](
            *(x, result, scales, tokens, width),
            largest=LARGEST[codes],
            least=LEAST_SCALE,
            is_integer=codes == torch.int8,
            is_held=is_held,
            block=block,
            num_warps=_warps(block),
        )
    return result, scales


def scale_bias(
    product: Shaped[Tensor, "rows out"],
    token_scales: Float[Tensor, " tokens"],
    row_scales: Float[Tensor, " out"] | None,
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> Float[Tensor, "tokens out"]:
    """`product * factor * token_scales * row_scales + bias` in float32, rounded once to `dtype`.

    Rows of the product beyond the tokens are left out. A product of that dtype is overwritten.

    Cost: reads and writes each number once.
    """
    from secateur.formats.kernels.quantise_kernels import scale_rows

    tokens, width = len(token_scales), product.shape[1]
    product = product.contiguous()
    in_place = product.dtype == dtype
    result = product[:tokens] if in_place else product.new_empty((tokens, width), dtype=dtype)
    with on(product.device):
        scale_rows[(-(-tokens // ROWS), -(-width // COLUMNS))](
            *(product, token_scales),
            *(token_scales if row_scales is None else row_scales.contiguous(),),
            *(token_scales if bias is None else bias.contiguous(),),
            *(result, tokens, width, factor),
            has_row_scales=row_scales is not None,
            has_bias=bias is not None,
            rows=ROWS,
            columns=COLUMNS,
            num_warps=ROWS * COLUMNS // VALUES_A_WARP,
        )
    return result


def _power_of_two(count: int) -> int:
    """The least power of two that is not below the count."""
    return 1 << max(0, count - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(1, block // VALUES_A_WARP))
