"""The prefill kernel for 16-bit inputs, launched: one call from Python for each linear layer."""

from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.decode24.arrange import UNIT_ROWS, Kind, unit_bytes, why_no_units
from secateur.formats.kernels.decode24.config import WARPGROUPS_ON, Case
from secateur.formats.kernels.gpu import check_bias, on, why_no_bindings, why_not_capability
from secateur.formats.kernels.launch import (
    Launch,
    address,
    load,
    pieces_map,
    prepare,
    readable,
    tensor_map,
)
from secateur.formats.kernels.nvrtc import Source
from secateur.formats.kernels.prefill16.config import (
    BOX_BYTES,
    OUT_ROWS,
    THREADS,
    Tile,
    choose,
)
from secateur.formats.kernels.prefill24.multiply import ACTIVATIONS

NAME = "the prefill kernel"  # in messages
SOURCE = Source(
    "prefill16/kernel.cu",
    "prefill",
    ("ptx.cuh", "activation.cuh", "tiles.cuh", "decode24/units.cuh"),
)
ARGUMENTS = "TTTPPiii"  # x, y, units, row_scales, bias, M, N, units of a row tile
MOST_PIECE_BYTES = 256 * 8  # of a unit, in one side of a box


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot run this layer here and what to do, or None."""
    if (problem := why_no_units(NAME, shape, dtype, device)) is not None:
        return problem
    remedy = "expanded and dense layers still work"
    problem = why_not_capability(NAME, device, WARPGROUPS_ON, remedy, alone=True)
    return problem or why_no_bindings(NAME)


def multiply(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    row_scales: Float[Tensor, "out 1"] | None,
    bias: Float[Tensor, " out"] | None,
    kind: Kind,
    grouped: bool,
    rows: int,
    activation: str = "",
    just_packed: bool = False,
) -> Float[Tensor, "tokens out"]:
    """`f(x @ W.T * row_scales + bias)` for the weight W of these units, summed in float32.

    f is the activation, one of `ACTIVATIONS`, applied to sums that are not yet rounded. Units that
    a kernel has `just_packed` are waited for; others are read while the kernel ahead still runs.

    Error: products are exact in float32; sums are float32 in a fixed order, so that a repeated call
        gives the same bits; one rounding of the result. Where groups have scales, the weight is
        scale x code rounded once to x's dtype, as the dense layer has it.
    Raises: RuntimeError if the kernel has to be compiled while a graph is captured; ValueError if
        the bias has another dtype.
    """
    (tokens, columns), device = x.shape, x.device
    check_bias(NAME, bias, x.dtype)
    y = x.new_empty(tokens, rows)
    if not tokens:
        return y
    x, bias = readable(x), None if bias is None else readable(bias)
    scales = None if row_scales is None else readable(row_scales)
    case = Case(kind, grouped, x.dtype, rows, columns, tokens)
    tile = _tile(case, device)
    launch = _launch(device, kind, grouped, x.dtype, tile, activation, not just_packed)
    with on(device):
        launch(
            torch.cuda.current_stream(device).cuda_stream,
            *operands(case, tile, x.data_ptr(), units.data_ptr(), y.data_ptr()),
            *(address(scales), address(bias), tokens, rows, case.units),
        )
    return y


def operands(case: Case, tile: Tile, x: int, units: int, y: int) -> tuple[bytes, bytes, bytes]:
    """Inputs, results and units at these addresses, as the copy engine is told of them."""
    pieces = ceil(case.unit_bytes / MOST_PIECE_BYTES)
    return (
        tensor_map(x, case.tokens, 2 * case.columns, min(case.tokens, tile.tokens), BOX_BYTES),
        tensor_map(y, case.tokens, 2 * case.rows, tile.out_tokens, 2 * OUT_ROWS),
        pieces_map(
            units,
            case.row_tiles,
            case.units * pieces,
            case.unit_bytes // pieces,
            tile.rows // UNIT_ROWS,
            pieces,
        ),
    )


@lru_cache(maxsize=4096)  # prompts have many lengths
def _tile(case: Case, device: torch.device) -> Tile:
    return choose(case, torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    kind: Kind,
    grouped: bool,
    dtype: torch.dtype,
    tile: Tile,
    activation: str,
    dependent: bool,
) -> Launch:
    which = ACTIVATIONS.index(activation) + 1 if activation else 0
    kernel = load(SOURCE, tile.defines(kind, grouped, dtype, which), device)
    shared_bytes = tile.shared_bytes(unit_bytes(kind, grouped))
    grid = kernel.most_clusters(tile.splits, THREADS, shared_bytes) * tile.splits
    return prepare(kernel, grid, tile.splits, THREADS, shared_bytes, dependent, ARGUMENTS)
