"""Weights that fit each format, and the error that a correct linear may make."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, four_of_eight, parse_format, two_of_four
from secateur.formats.block import Blocks
from secateur.formats.contract import Packed
from secateur.formats.dynamic import quantised
from secateur.formats.format import dequantised
from secateur.formats.kernels.decode24.arrange import Structure
from secateur.formats.linear import Table
from secateur.formats.pack import packed_linear

EXACT = ("semi24", "semi48", "block:4x8", "block:2x1", "bitmap", "csr")
QUANTISED = (
    *("semi24_int4", "semi24_int8", "semi24_fp8", "semi48_int4", "bitmap_int4"),
    *("int4", "int8"),
)
DYNAMIC = ("semi24_int8_dynamic", "semi24_fp8_dynamic", "int8_dynamic", "fp8_dynamic")
WITHOUT_ZEROS = ("int4", "int8")  # of QUANTISED
FORMATS = EXACT + QUANTISED + DYNAMIC
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fitting_weight(
    format: str, out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A weight with zeros that the format can hold and gains from (70 % zeros, 2:4 or 4:8).

    Of `int4` and `int8`, which gain by none, it has no more than rounding makes. For a quantised
    format it lies on the format's grid; in float64 on that of bfloat16 scales.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    chosen = parse_format(format)
    rows, cols = (chosen.rows, chosen.cols) if isinstance(chosen, Blocks) else (1, 1)
    if format.startswith("semi"):
        keep = half_kept(format, out, width, generator)
    elif format.startswith(WITHOUT_ZEROS) and format not in DYNAMIC:
        keep = torch.ones(out, width, dtype=torch.bool)
    else:
        tiles = torch.rand(out // rows, 1, width // cols, 1, generator=generator) < 0.3
        keep = tiles.expand(-1, rows, -1, cols).reshape(out, width)
    weight = weight * keep
    if chosen.is_exact:
        return weight.to(dtype)
    grid = torch.bfloat16 if dtype == torch.float64 else dtype
    return dequantised(chosen.pack(weight.to(grid))).to(dtype)


def half_kept(format: str, out: int, width: int, generator: torch.Generator) -> Tensor:
    """The mask of a random 2:4 or 4:8 weight, on the generator's device."""
    group = 8 if format.startswith("semi48") else 4
    draws = torch.rand(out, width // group, group, generator=generator, device=generator.device)
    return (draws.argsort(-1) < group // 2).flatten(1)


def random_metadata(
    rows: int, columns: int, seed: int, structure: Structure = Structure.TWO_OF_FOUR
) -> Tensor | None:
    """Random metadata of a weight of this shape and structure, if that has any."""
    if structure is Structure.ALL:
        return None
    generator = torch.Generator().manual_seed(seed)
    if structure is Structure.FOUR_OF_EIGHT:
        masks = torch.tensor(sorted({*four_of_eight.MASKS} - {0}), dtype=torch.uint8)
        return masks[torch.randint(len(masks), (rows, columns // 8), generator=generator)]
    pairs = torch.tensor(sorted({*two_of_four.NIBBLES} - {two_of_four.MISFIT}), dtype=torch.uint8)
    return two_of_four.pack_nibbles(
        pairs[torch.randint(len(pairs), (rows, columns // 4), generator=generator)]
    )


def packed_weight(format: str, weight: Tensor) -> Packed:
    """The packed weight; a quantised one of a float64 `fitting_weight` has its scales widened."""
    chosen = parse_format(format)
    if chosen.is_exact or weight.dtype != torch.float64:
        return chosen.pack(weight)
    packed = chosen.pack(weight.bfloat16())
    tensors = dict(packed.tensors)
    tensors["scales"] = tensors["scales"].double()
    return replace(packed, tensors=tensors)


def changed(packed: Packed, **tensors: Tensor) -> Packed:
    """The packed weight with other tensors of these names."""
    return replace(packed, tensors={**packed.tensors, **tensors})


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
    return SparseLinear(packed_weight(format, weight), offset, "layer")


def layer_on_gpu(
    format: str, dtype: torch.dtype, shape: tuple[int, int], bias: bool, table: Table
) -> SparseLinear:
    """A packed layer of random weights on the GPU that runs by this table, frozen."""
    generator = torch.Generator("cuda").manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, device="cuda", dtype=dtype)
    weight = torch.randn(shape, device="cuda", generator=generator) / shape[1] ** 0.5
    if not format.startswith(WITHOUT_ZEROS):
        weight *= half_kept(format, *shape, generator)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias:
        linear.bias.data.normal_(generator=generator)
    layer = packed_linear("layer", linear, parse_format(format))
    layer.use(table)
    return layer.requires_grad_(False)


def tokens_on_gpu(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random inputs on the GPU, seeded by their number."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)


def tokens_in(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Random inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def used_inputs(format: str, x: Tensor) -> Tensor:
    """The inputs `[tokens, in]` as the format's linear multiplies them: some are rounded first."""
    if format not in DYNAMIC:
        return x
    codes, scales = quantised(x, torch.int8 if "int8" in format else torch.float8_e4m3fn)
    return codes.to(scales.dtype) * scales


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear in float64."""
    offset = None if bias is None else bias.detach().double()
    return nn.functional.linear(x.detach().double(), weight.double(), offset)


def allowed_error(
    x: Tensor, weight: Tensor, bias: Tensor | None, meant: Tensor | None = None
) -> float:
    """2 x (error of the dense layer in x's dtype + one rounding band).

    `meant` is the weight that the exact result is of, where `weight` is that rounded to x's dtype.

    The band is one rounding of the largest result to x's dtype, and one of the largest sum of
    magnitudes to the type that sums are taken in: float32, or float64 for float64.
    """
    exact = exact_linear(x, weight if meant is None else meant, bias)
    offset = None if bias is None else bias.detach()
    dense = nn.functional.linear(x, weight, offset)
    summed = torch.promote_types(x.dtype, torch.float32)
    magnitude = (x.double().abs() @ weight.double().abs().t()).max()
    band = torch.finfo(x.dtype).eps * exact.abs().max() + torch.finfo(summed).eps * magnitude
    return 2 * float((dense - exact).abs().max() + band)
