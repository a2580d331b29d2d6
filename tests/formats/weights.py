"""Weights that fit each format, and the error that a correct linear may make."""

import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, parse_format

FORMATS = ("semi24", "block:4x8", "block:2x1", "bitmap", "csr")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fitting_weight(
    format: str, out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A weight with zeros that the format can hold and gains from (at least 70 % zeros or 2:4)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    rows, cols = parse_format(format).block or (1, 1)
    if format == "semi24":
        rank = torch.rand(out, width // 4, 4, generator=generator).argsort(-1)
        keep = (rank < 2).flatten(1)
    else:
        tiles = torch.rand(out // rows, 1, width // cols, 1, generator=generator) < 0.3
        keep = tiles.expand(-1, rows, -1, cols).reshape(out, width)
    return (weight * keep).to(dtype)


def sparse_linear(
    format: str,
    out: int = 16,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> SparseLinear:
    """A packed layer of a fitting weight."""
    weight = fitting_weight(format, out, width, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    offset = nn.Parameter(torch.randn(out, generator=generator).to(dtype)) if bias else None
    return SparseLinear(parse_format(format).pack(weight), offset, "layer")


def tokens_in(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Random inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear in float64."""
    offset = None if bias is None else bias.detach().double()
    return nn.functional.linear(x.detach().double(), weight.double(), offset)


def allowed_error(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """2 x (error of the dense layer in x's dtype + one rounding band).

    The band is one rounding of the largest result to x's dtype, and one of the largest sum of
    magnitudes to the type that sums are taken in: float32, or float64 for float64.
    """
    exact = exact_linear(x, weight, bias)
    offset = None if bias is None else bias.detach()
    dense = nn.functional.linear(x, weight, offset)
    summed = torch.promote_types(x.dtype, torch.float32)
    magnitude = (x.double().abs() @ weight.double().abs().t()).max()
    band = torch.finfo(x.dtype).eps * exact.abs().max() + torch.finfo(summed).eps * magnitude
    return 2 * float((dense - exact).abs().max() + band)
