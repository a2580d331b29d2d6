"""The prefill kernels, launched: one rounds the tokens, one multiplies, scales and stores.

A compiler that sees `traced` rounds by itself, in one pass with what it computes before, and calls
the second kernel alone.

Source of the layouts: `kernel.cu`.
"""

from functools import lru_cache
from importlib.util import find_spec
from math import ceil

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from secateur.formats.dynamic import quantised
from secateur.formats.op import operator
from secateur.formats.prefill24.arrange import COLUMNS, ROWS
from secateur.kernels.launch import Launch, load, on, prepare, readable, tensor_map
from secateur.kernels.nvrtc import Source

QUANTISE = Source("formats/prefill24/quantise.cu", "quantise", ("kernels/ptx.cuh",))
MULTIPLY = Source("formats/prefill24/kernel.cu", "prefill", ("kernels/ptx.cuh",))
CAPABILITY = (9, 0)  # wgmma, on that generation alone
TOKENS = 256  # of a tile
STEP = 16  # both sizes of the weight are multiples of it: 16-byte loads and stores
CLUSTER, STAGES = 2, 4
THREADS, QUANTISE_THREADS = 384, 128
RUN = 8  # inputs of one load
LARGEST_WIDTH = 32768  # inputs of a token that the registers of one CTA hold
STAGE_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 8 + TOKENS * COLUMNS
RESULT_BYTES = 2 * 2 * 64 * 64 * 2  # two buffers of 64 x 64 results for each warpgroup
SHARED_BYTES = 1023 + STAGES * STAGE_BYTES + RESULT_BYTES


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """None if the kernels can run this layer here, else the reason and what to do."""
    rows, columns = shape
    if device.type != "cuda":
        return f"the prefill kernel needs a CUDA GPU, the weight is on {device.type}: move it there"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the prefill kernel needs bfloat16 or float16, got {dtype}: cast the layer"
    if rows % STEP or columns % STEP or not rows or not columns:
        return (
            f"the prefill kernel needs out_features and in_features that are multiples of {STEP}, "
            f"got {rows} x {columns}: pad the layer with zeros"
        )
    if columns > LARGEST_WIDTH:
        return f"the prefill kernel takes at most {LARGEST_WIDTH} in_features, got {columns}"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return (
            f"the prefill kernel needs compute capability 9.0, this GPU has "
            f"{capability[0]}.{capability[1]}: cuSPARSELt and dense layers still work"
        )
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the prefill kernel needs cuda-bindings: pip install 'secateur[cuda]'"
    return None


def linear(
    x: Float[Tensor, "tokens in"],
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    row_scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
    codes: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """Inputs rounded to `codes` token by token, times the weight of these tiles, scaled once.

    Error: int8 sums are exact integers; those of float8 keep 14 bits on sm_90. Scales and bias are
        applied in float32, and the result is rounded once.
    Cost: a byte for each input while it runs.
    Raises: RuntimeError if a kernel has to be compiled while a graph is captured; ValueError if the
        bias has another dtype.
    """
    tokens, columns = x.shape
    x = readable(x)
    rounded = x.new_empty(tokens, columns, dtype=codes)
    scales = x.new_empty(tokens, 1, dtype=torch.float32)
    if tokens:
        quantise = _quantise(x.device, codes, x.dtype, items_of(columns), tokens)
        with on(x.device):
            stream = torch.cuda.current_stream(x.device).cuda_stream
            quantise(stream, x.data_ptr(), rounded.data_ptr(), scales.data_ptr(), columns)
    return product(rounded, scales, tiles, row_scales, bias)


def product(
    codes: Shaped[Tensor, "tokens in"],
    scales: Float[Tensor, "tokens 1"],
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    row_scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`codes * scales` times the weight of these tiles, plus the bias, in the row scales' dtype.

    Error, Raises: those of `linear`.
    """
    (tokens, columns), rows = codes.shape, len(row_scales)
    if bias is not None and bias.dtype != row_scales.dtype:
        raise ValueError(
            f"the prefill kernel needs a bias of the layer's {row_scales.dtype}, "
            f"got {bias.dtype}: cast the whole layer with .to"
        )
    y = row_scales.new_empty(tokens, rows)
    if not tokens:
        return y
    codes, scales, device = readable(codes), scales.contiguous(), codes.device
    multiply = _multiply(device, codes.dtype, row_scales.dtype)
    with on(device):
        multiply(
            torch.cuda.current_stream(device).cuda_stream,
            tensor_map(codes.data_ptr(), tokens, columns, TOKENS // CLUSTER, COLUMNS),
            *(scales.data_ptr(), tiles.data_ptr(), row_scales.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), y.data_ptr()),
            *(tokens, rows, tiles.shape[1]),
        )
    return y


def _empty_product(
    codes: Tensor, scales: Tensor, tiles: Tensor, row_scales: Tensor, bias: Tensor | None
) -> Tensor:
    return row_scales.new_empty(codes.shape[0], row_scales.shape[0])


PRODUCT = operator(
    "prefill24_product(Tensor codes, Tensor scales, Tensor tiles, Tensor row_scales, "
    "Tensor? bias) -> Tensor",
    product,
    _empty_product,
)


def traced(
    x: Float[Tensor, "tokens in"],
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    row_scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
    codes: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """`linear` in torch's operators and one of ours: a compiler joins the former to those before.

    Error: that of `linear`; a number that lies between two codes may get the other one, since a
        compiler does not round what it computes before to 16 bits.
    """
    rounded, scales = quantised(x, codes)
    result: Tensor = PRODUCT(rounded, scales, tiles, row_scales, bias)
    return result


def items_of(columns: int) -> int:
    """Loads of each thread, so that one CTA holds a token."""
    return ceil(columns / RUN / QUANTISE_THREADS)


def _defines(codes: torch.dtype, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The macros that both kernels share."""
    return (
        ("FP8", int(codes == torch.float8_e4m3fn)),
        ("HALF", int(dtype == torch.float16)),
        ("CODES", 1),
        ("PORTABLE", 0),
        ("WGMMA", 1),
    )


@lru_cache(maxsize=256)
def _quantise(
    device: torch.device, codes: torch.dtype, dtype: torch.dtype, items: int, tokens: int
) -> Launch:
    kernel = load(QUANTISE, (*_defines(codes, dtype), ("ITEMS", items)), device)
    return prepare(kernel, tokens, 1, QUANTISE_THREADS, 0, True, "PPPi")


@lru_cache(maxsize=64)
def _multiply(device: torch.device, codes: torch.dtype, dtype: torch.dtype) -> Launch:
    defines = (*_defines(codes, dtype), ("CLUSTER", CLUSTER), ("ST", STAGES))
    kernel = load(MULTIPLY, defines, device)
    clusters = kernel.most_clusters(CLUSTER, THREADS, SHARED_BYTES)
    return prepare(kernel, clusters * CLUSTER, CLUSTER, THREADS, SHARED_BYTES, True, "TPPPPPiii")
