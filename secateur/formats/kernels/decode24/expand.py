"""The dense weight of a layer's units, and a product by it: for what no kernel multiplies.

The dense weight is scratch memory of one call. PyTorch's allocator hands the same bytes to the next
layer, so that a device holds one such weight whatever the number of layers, in captured graphs too.
"""

from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import linear

from secateur.formats.kernels.decode24.arrange import Kind, why_no_units
from secateur.formats.kernels.decode24.config import CLUSTERS_FROM
from secateur.formats.kernels.gpu import check_bias, on, why_no_bindings, why_not_capability
from secateur.formats.kernels.launch import Launch, address, load, prepare
from secateur.formats.kernels.nvrtc import OLDEST, Source

NAME = "the expanded product"  # in messages
HEADERS = ("ptx.cuh", "decode24/units.cuh", "decode24/of_eight.cuh")
SOURCE = Source("decode24/expand.cu", "expand_units", HEADERS)
ARGUMENTS = "PPPiii"  # units, row_scales, dense, number of units, those of a row tile, K
THREADS = 128  # of a CTA: a warp for each unit


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a layer cannot be expanded here and what to do, or None."""
    if (problem := why_no_units(NAME, shape, dtype, device)) is not None:
        return problem
    remedy = "the reference and dense layers still work"
    return why_not_capability(NAME, device, OLDEST, remedy) or why_no_bindings(NAME)


def multiply_expanded(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    row_scales: Float[Tensor, "out 1"] | None,
    bias: Float[Tensor, " out"] | None,
    kind: Kind,
    grouped: bool,
    rows: int,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias` for the weight W of these units, by cuBLAS on the dense weight.

    Cost: writes and reads the dense weight once, and holds it while it runs.
    Error: that of a dense layer whose weight is W rounded once to its dtype.
    Raises: OutOfMemoryError where the dense weight does not fit; RuntimeError if the kernel has to
        be compiled while a graph is captured; ValueError if the bias has another dtype.
    """
    check_bias(NAME, bias, x.dtype)
    weight = expand(units, row_scales, kind, grouped, x.dtype, rows, x.shape[1])
    return linear(x, weight, bias)


def expand(
    units: UInt8[Tensor, "tiles units bytes"],
    row_scales: Float[Tensor, "out 1"] | None,
    kind: Kind,
    grouped: bool,
    dtype: torch.dtype,
    rows: int,
    columns: int,
) -> Float[Tensor, "out in"]:
    """The dense weight of these units: scale x code in float32, rounded once to `dtype`.

    Raises: OutOfMemoryError where it does not fit; RuntimeError if the kernel has to be compiled
        while a graph is captured.
    """
    device, count = units.device, units.shape[0] * units.shape[1]
    try:
        dense = units.new_empty(rows, columns, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{NAME} needs {rows * columns * dtype.itemsize} bytes on {device} while it runs, for "
            f"a dense weight of {rows} x {columns} in {dtype}: free memory, or split the layer"
        ) from error
    launch = _launch(device, kind, grouped, dtype, count)
    with on(device):
        launch(
            torch.cuda.current_stream(device).cuda_stream,
            *(units.data_ptr(), address(row_scales), dense.data_ptr()),
            *(count, units.shape[1], columns),
        )
    return dense


def defines(
    kind: Kind, grouped: bool, dtype: torch.dtype, portable: bool
) -> tuple[tuple[str, int], ...]:
    """The macros of `expand.cu`, whose head says what each means."""
    return (
        ("KIND", int(kind.numbers)),
        ("STRUCTURE", int(kind.structure)),
        ("GROUP_SCALES", int(grouped)),
        ("HALF", int(dtype == torch.float16)),
        ("PORTABLE", int(portable)),
    )


@lru_cache(maxsize=1024)
def _launch(
    device: torch.device, kind: Kind, grouped: bool, dtype: torch.dtype, count: int
) -> Launch:
    portable = torch.cuda.get_device_capability(device) < CLUSTERS_FROM
    kernel = load(SOURCE, defines(kind, grouped, dtype, portable), device)
    blocks = ceil(count / (THREADS // 32))
    return prepare(kernel, blocks, 1, THREADS, 0, True, ARGUMENTS)
