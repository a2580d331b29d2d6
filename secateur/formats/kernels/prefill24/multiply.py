"""The prefill kernels, launched: one rounds the tokens, one multiplies, scales and stores.

The second one can apply an activation to its results.

Source of the layouts: `kernel.cu`.
"""

from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.gpu import (
    check_bias,
    on,
    why_no_bindings,
    why_no_multiple,
    why_not_16_bits,
    why_not_capability,
)
from secateur.formats.kernels.launch import Launch, address, load, prepare, readable, tensor_map
from secateur.formats.kernels.nvrtc import Source
from secateur.formats.kernels.prefill24.arrange import COLUMNS, ROWS

NAME = "the prefill kernel"  # in messages
QUANTISE = Source("prefill24/quantise.cu", "quantise", ("ptx.cuh",))
MULTIPLY = Source("prefill24/kernel.cu", "prefill", ("ptx.cuh", "activation.cuh", "tiles.cuh"))
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")  # numbered from 1 in `activation.cuh`
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
    """Why the kernels cannot run this layer here and what to do, or None."""
    columns = shape[1]
    if (problem := why_not_16_bits(NAME, dtype, device)) is not None:
        return problem
    if (problem := why_no_multiple(NAME, shape, STEP)) is not None:
        return problem
    if columns > LARGEST_WIDTH:
        return f"the prefill kernel takes at most {LARGEST_WIDTH} in_features, got {columns}"
    remedy = "cuSPARSELt and dense layers still work"
    problem = why_not_capability(NAME, device, CAPABILITY, remedy, alone=True)
    return problem or why_no_bindings(NAME)


def linear(
    x: Float[Tensor, "tokens in"],
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    row_scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
    codes: torch.dtype,
    activation: str = "",
) -> Float[Tensor, "tokens out"]:
    """Inputs rounded to `codes` token by token, times the weight of these tiles, scaled once.

    The activation, one of `ACTIVATIONS`, is applied to sums that are not yet rounded.

    Error: int8 sums are exact integers; float8 sums keep 14 bits on sm_90. Scales, bias and
        activation are applied in float32, and the result is rounded once.
    Cost: a byte for each input while it runs.
    Raises: RuntimeError if a kernel has to be compiled while a graph is captured; ValueError if the
        bias has another dtype.
    """
    (tokens, columns), rows = x.shape, len(row_scales)
    check_bias(NAME, bias, x.dtype)
    y = x.new_empty(tokens, rows)
    if not tokens:
        return y
    x, device = readable(x), x.device
    rounded = x.new_empty(tokens, columns, dtype=codes)
    scales = x.new_empty(tokens, dtype=torch.float32)
    quantise = _quantise(device, codes, x.dtype, items_of(columns), tokens)
    multiply = _multiply(device, codes, x.dtype, activation)
    with on(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        quantise(stream, x.data_ptr(), rounded.data_ptr(), scales.data_ptr(), columns)
        multiply(
            stream,
            tensor_map(rounded.data_ptr(), tokens, columns, TOKENS // CLUSTER, COLUMNS),
            *(scales.data_ptr(), tiles.data_ptr(), row_scales.data_ptr()),
            *(address(bias), y.data_ptr()),
            *(tokens, rows, tiles.shape[1]),
        )
    return y


def items_of(columns: int) -> int:
    """Loads of each thread, so that one CTA holds a token."""
    return ceil(columns / RUN / QUANTISE_THREADS)


def _defines(codes: torch.dtype, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The macros that both kernels share."""
    return (
        ("FP8", int(codes == torch.float8_e4m3fn)),
        ("HALF", int(dtype == torch.float16)),
    )


@lru_cache(maxsize=256)
def _quantise(
    device: torch.device, codes: torch.dtype, dtype: torch.dtype, items: int, tokens: int
) -> Launch:
    kernel = load(QUANTISE, (*_defines(codes, dtype), ("ITEMS", items)), device)
    return prepare(kernel, tokens, 1, QUANTISE_THREADS, 0, True, "PPPi")


@lru_cache(maxsize=64)
def _multiply(
    device: torch.device, codes: torch.dtype, dtype: torch.dtype, activation: str = ""
) -> Launch:
    which = ACTIVATIONS.index(activation) + 1 if activation else 0
    ring = (("CLUSTER", CLUSTER), ("STAGES", STAGES))
    defines = (*_defines(codes, dtype), *ring, ("ACTIVATION", which))
    kernel = load(MULTIPLY, defines, device)
    clusters = kernel.most_clusters(CLUSTER, THREADS, SHARED_BYTES)
    return prepare(kernel, clusters * CLUSTER, CLUSTER, THREADS, SHARED_BYTES, True, "TPPPPPiii")
