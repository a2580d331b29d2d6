"""Both packs of a weight that trains in 2:4, by one kernel that reads it once."""

from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.both_ways.reference import Selection
from secateur.formats.kernels.decode24.arrange import UNIT_COLUMNS, UNIT_ROWS, Kind, unit_bytes
from secateur.formats.kernels.gpu import (
    on,
    why_no_bindings,
    why_no_gpu,
    why_no_multiple,
    why_not_capability,
)
from secateur.formats.kernels.launch import Launch, load, prepare, readable
from secateur.formats.kernels.nvrtc import OLDEST, Source

NAME = "packing both ways"  # in messages
SOURCE = Source("both_ways/kernel.cu", "pack_both_ways", ("ptx.cuh", "both_ways/selection.cuh"))
ARGUMENTS = "PPPii"  # weight, units, transposed units, N, K
SIDE = 128  # rows and columns of a CTA's block: a unit's columns, of either pack
THREADS = 256
MULTIPLE = 64  # of both sides: units have half of their columns at least
UNIT = unit_bytes(Kind.W16, grouped=False)
DTYPES = (torch.bfloat16, torch.float16)


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot pack such a weight here in this dtype and what to do, or None."""
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if dtype not in DTYPES:
        return f"{NAME} needs bfloat16 or float16, got {dtype}: train under torch.autocast"
    problem = why_no_multiple(NAME, shape, MULTIPLE)
    problem = problem or why_not_capability(NAME, device, OLDEST, "train the layer dense")
    return problem or why_no_bindings(NAME)


def pack(
    weight: Float[Tensor, "out in"], dtype: torch.dtype, selection: Selection
) -> tuple[UInt8[Tensor, "tiles units bytes"], UInt8[Tensor, "other_tiles other_units bytes"]]:
    """Units of the weight and of its transpose in this dtype, to the bit as `reference.pack`.

    The weight is float32 or of this dtype already. Of tiles that are worth the same, but for the
    rounding of a float32 sum of eight, either may stay.

    Cost: reads the weight once and writes 2.25 bytes for each of its numbers.
    Raises: RuntimeError if the kernel has to be compiled while a graph is captured.
    """
    (rows, columns), device = weight.shape, weight.device
    assert weight.dtype in (dtype, torch.float32), weight.dtype
    weight = readable(weight.detach())
    units, transposed = empty(weight)
    blocks = units.shape[1] * transposed.shape[1]
    launch = _launch(device, defines(weight.dtype, dtype, selection), blocks)
    with on(device):
        launch(
            torch.cuda.current_stream(device).cuda_stream,
            *(weight.data_ptr(), units.data_ptr(), transposed.data_ptr(), rows, columns),
        )
    return units, transposed


def empty(
    weight: Float[Tensor, "out in"],
) -> tuple[UInt8[Tensor, "tiles units bytes"], UInt8[Tensor, "other_tiles other_units bytes"]]:
    """Room for both packs of a weight of this shape."""
    rows, columns = weight.shape
    across, below = ceil(columns / UNIT_COLUMNS), ceil(rows / UNIT_COLUMNS)
    return (
        weight.new_empty(rows // UNIT_ROWS, across, UNIT, dtype=torch.uint8),
        weight.new_empty(columns // UNIT_ROWS, below, UNIT, dtype=torch.uint8),
    )


def defines(
    stored: torch.dtype, dtype: torch.dtype, selection: Selection
) -> tuple[tuple[str, int], ...]:
    """The macros of `kernel.cu`, whose head says what each means."""
    return (
        ("WIDE", int(stored == torch.float32)),
        ("HALF", int(dtype == torch.float16)),
        ("SELECTION", int(selection)),
    )


@lru_cache(maxsize=1024)
def _launch(device: torch.device, macros: tuple[tuple[str, int], ...], blocks: int) -> Launch:
    return prepare(load(SOURCE, macros, device), blocks, 1, THREADS, 0, False, ARGUMENTS)
