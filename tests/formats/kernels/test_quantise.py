"""The Triton kernels of `quantise`, held to the definition: in Triton's interpreter, and on a GPU.

The interpreter runs in a plain process, because it is chosen when the kernels are imported and
because shape checking wraps functions that it has to read. Run as a script, this file is that
process.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from secateur.formats.dynamic import quantised
from secateur.formats.kernels import quantise

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 24, 1000, 4096, quantise.HELD, quantise.HELD + 24)


def tokens_of(width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens of many sizes; the last ones are zeros, tiny, huge in one place, NaN and infinite."""
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    x *= 2.0 ** torch.arange(-8, 10, 2)[:, None]
    x[4], x[5] = 0, 1e-44
    x[6, -1], x[7, width // 2], x[8, 0] = 6e4, torch.nan, -torch.inf
    return x.to(dtype).to(device)


def check_codes(x: Tensor, codes: torch.dtype) -> None:
    """Codes and scales are the definition's, bit for bit; rows beyond the tokens are zeros."""
    found, scales = quantise.quantise(x, codes, len(x) + 3)
    wanted, wanted_scales = quantised(x.cpu(), codes)
    assert found.dtype == codes and found.shape == (len(x) + 3, x.shape[1])
    assert torch.equal(found[: len(x)].cpu().float(), wanted.float()), (x.shape, x.dtype, codes)
    assert not found[len(x) :].float().any()
    assert torch.equal(scales.cpu().nan_to_num(-1), wanted_scales[:, 0].float().nan_to_num(-1))


def check_scales(rows: int, width: int, product: torch.dtype, dtype: torch.dtype, dev: str) -> None:
    """One rounding of the float64 result, with and without row scales and bias, in place or not."""
    generator = torch.Generator().manual_seed(rows)
    sums = (torch.randn(rows + 2, width, generator=generator) * 100).to(product)
    token_scales = torch.rand(rows, generator=generator) + 0.1
    token_scales[0] = torch.nan
    row_scales = (torch.rand(width, generator=generator) + 0.1).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    for scales, offset in ((row_scales, bias), (None, bias), (row_scales, None), (None, None)):
        given = sums.clone().to(dev)
        there = [None if tensor is None else tensor.to(dev) for tensor in (scales, offset)]
        found = quantise.scale_bias(given, token_scales.to(dev), *there, dtype, 4.0)
        wanted = sums[:rows].double() * 4 * token_scales.double()[:, None]
        wanted = wanted if scales is None else wanted * scales.double()
        size = wanted.abs()
        wanted = wanted if offset is None else wanted + offset.double()
        assert found.shape == (rows, width) and found.dtype == dtype
        assert (found.data_ptr() == given.data_ptr()) == (product == dtype)
        assert bool(found[0].isnan().all())
        error = (found[1:].cpu().double() - wanted[1:]).abs()
        allowed = torch.finfo(dtype).eps * wanted[1:].abs() + 1e-6 * size[1:]
        assert bool((error <= allowed).all()), (rows, width, product, dtype)


def check_all(device: str) -> None:
    """Every width, dtype and kind of code, and the final pass of each kind of product."""
    for width in WIDTHS:
        for dtype in DTYPES:
            for codes in (INT8, FP8):
                check_codes(tokens_of(width, dtype, device), codes)
    for rows, width in ((1, 16), (5, 1000), (9, 1032)):
        for product, dtype in [(torch.int32, dtype) for dtype in DTYPES] + [
            (dtype, dtype) for dtype in DTYPES[1:]
        ]:
            check_scales(rows, width, product, dtype, device)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "all hold", (done.stdout + done.stderr)[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_on_a_gpu() -> None:
    check_all("cuda")


@pytest.mark.parametrize(
    ("count", "power", "warps"), [(1, 1, 1), (24, 32, 1), (4096, 4096, 4), (9000, 16384, 16)]
)
def test_a_row_is_held_by_as_many_threads_as_have_the_registers(
    count: int, power: int, warps: int
) -> None:
    assert quantise._power_of_two(count) == power and quantise._warps(power) == warps


if __name__ == "__main__":
    check_all("cpu")
    print("all hold")
