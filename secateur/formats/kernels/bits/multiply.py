"""The kernels for bits, launched: a product with few tokens, and one by the dense weight."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from secateur.formats.kernels.bits.arrange import UNIT_ROWS, Numbers
from secateur.formats.kernels.gpu import (
    check_bias,
    on,
    why_no_bindings,
    why_not_16_bits,
    why_not_capability,
)
from secateur.formats.kernels.launch import Launch, address, load, prepare, readable
from secateur.formats.kernels.nvrtc import OLDEST, Source

NAME = "the kernel for bits"  # in messages
HEADERS = ("ptx.cuh", "bits/lanes.cuh", "bits/floats.cuh", "bits/codes.cuh")
DECODE = Source("bits/kernel.cu", "decode_bits", HEADERS)
EXPAND = Source("bits/expand.cu", "expand_bits", HEADERS)
DECODE_ARGUMENTS = "PPPPPiiii"  # x, lines, starts, bias, y, M, N, K, stage_bytes
EXPAND_ARGUMENTS = "PPPiii"  # lines, starts, dense, N, K, stage_bytes
EXPAND_WARPS = 4
EXPAND_BYTES_MEANT = 256 * 8  # as BYTES_MEANT, for all lanes
BULK_FROM = (9, 0)  # bulk copies, dependent launch
MULTIPLE = 8  # columns: inputs are read and weights stored by 16 bytes
MOST_TOKENS = 16
MOST_WARPS = 16
# The cost model, fitted to what docs/log/2026-12-01-gpu-bits.md has. By the bits of a number:
IDLE_WARPS = {16: 3, 4: 20}  # that an SM has time for beside those of a CTA
TURN = {16: 0, 4: 8}  # what each turn takes beside its units, as a warp's unit would
INPUTS = 0.3  # of a unit's time, for the second 8 tokens, where no other tile has just read them
STAGES = 2  # units in a warp's ring; three left less of the cache for inputs, and were slower
MOST_BYTES = 227 * 1024  # of shared memory, that a CTA may ask for
MOST_BYTES_PORTABLE = 99 * 1024
BYTES_MEANT = 256 * 8 * 32  # of codes: what each byte of bits does with them, for each lane
BEYOND = 512  # bytes behind the rings: they start at a whole line, and a lane reads two lines ahead


@dataclass(frozen=True)
class Config:
    """How a CTA is made: `group` tiles at a time, the columns of each split over `splits` warps."""

    group: int
    splits: int

    @property
    def warps(self) -> int:
        return self.group * self.splits

    def defines(
        self, numbers: Numbers, dtype: torch.dtype, tokens: int, portable: bool
    ) -> tuple[tuple[str, int], ...]:
        """The macros of `kernel.cu`, whose head says what each means."""
        return (
            ("NUMBER_BITS", numbers.bits),
            ("HALF", int(dtype == torch.float16)),
            ("TOKEN_TILES", ceil(tokens / 8)),
            ("GROUP", self.group),
            ("SPLITS", self.splits),
            ("UNIT_COLUMNS", numbers.unit_columns),
            ("PORTABLE", int(portable)),
        )

    def shared_bytes(self, numbers: Numbers, stage_bytes: int) -> int:
        """Dynamic shared memory of a CTA."""
        table = BYTES_MEANT if numbers.bits == 4 else 0
        return table + self.warps * STAGES * stage_bytes + BEYOND

    def static_bytes(self, tokens: int) -> int:
        """About the rest: sums of a tile, barriers, and what nibbles mean."""
        return self.warps * 8 * ceil(tokens / 8) * 20 * 4 + 1024


def choose(
    numbers: Numbers,
    tiles: int,
    units: int,
    tokens: int,
    stage_bytes: int,
    multiprocessors: int,
    most_bytes: int,
) -> Config:
    """The config with the least modelled time.

    In the end a warp has had `steps` units, and an SM is the slower for each the more warps share
    it. Inputs are read again for each group.

    Raises: ValueError if not even one warp fits.
    """
    able = dict[Config, float]()
    for group in range(1, MOST_WARPS + 1):
        turns = ceil(ceil(tiles / group) / multiprocessors)
        for splits in range(1, min(MOST_WARPS // group, units) + 1):
            one = Config(group, splits)
            if one.shared_bytes(numbers, stage_bytes) + one.static_bytes(tokens) <= most_bytes:
                steps = ceil(turns * units / splits)
                inputs = INPUTS * (tokens / 8 - 1) / group
                work = steps * (one.warps + IDLE_WARPS[numbers.bits]) * (1 + inputs)
                able[one] = work + turns * TURN[numbers.bits]
    if not able:
        raise ValueError(f"{NAME} has no room for two units of {stage_bytes} bytes")
    return min(able, key=lambda one: (able[one], -one.group))


def why_not(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    most_tokens: int | None,
) -> str | None:
    """Why a kernel for that many tokens cannot run this layer here and what to do, or None."""
    if (problem := why_not_16_bits(NAME, dtype, device)) is not None:
        return problem
    rows, columns = shape
    if columns % MULTIPLE or not rows or not columns:
        return (
            f"{NAME} needs in_features that is a multiple of {MULTIPLE}, got {rows} x {columns}: "
            "pad the layer with zeros"
        )
    if most_tokens is not None and tokens > most_tokens:
        return f"{NAME} serves at most {most_tokens} tokens, got {tokens}"
    remedy = "the reference and dense layers still work"
    return why_not_capability(NAME, device, OLDEST, remedy) or why_no_bindings(NAME)


def multiply(
    numbers: Numbers,
    x: Float[Tensor, "tokens in"],
    lines: Int32[Tensor, "stages words"],
    starts: Int32[Tensor, "tiles ends"],
    bias: Float[Tensor, " out"] | None,
    rows: int,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias` for the weight W of these lines, summed in float32.

    Error: products are exact in float32; sums are float32 in a fixed order, so that a repeated call
        gives the same bits; one rounding of the result.
    Raises: RuntimeError if the kernel has to be compiled while a graph is captured; ValueError if
        the bias has another dtype.
    """
    (tokens, columns), device = x.shape, x.device
    check_bias(NAME, bias, x.dtype)
    y = x.new_empty(tokens, rows)
    if not tokens or not rows:
        return y
    x, bias = readable(x), None if bias is None else readable(bias)
    stage_bytes = 4 * lines.shape[1]
    wide = 8 * ceil(tokens / 8)
    launch = _decode(device, numbers, x.dtype, rows, columns, wide, stage_bytes)
    with on(device):
        launch(
            torch.cuda.current_stream(device).cuda_stream,
            *(x.data_ptr(), lines.data_ptr(), starts.data_ptr(), address(bias), y.data_ptr()),
            *(tokens, rows, columns, stage_bytes),
        )
    return y


def multiply_expanded(
    numbers: Numbers,
    x: Float[Tensor, "tokens in"],
    lines: Int32[Tensor, "stages words"],
    starts: Int32[Tensor, "tiles ends"],
    bias: Float[Tensor, " out"] | None,
    rows: int,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, by cuBLAS on the dense weight, which is scratch memory of one call.

    Cost: writes and reads the dense weight once, and holds it while it runs.
    Raises: OutOfMemoryError where the dense weight does not fit; RuntimeError if the kernel has to
        be compiled while a graph is captured; ValueError if the bias has another dtype.
    """
    check_bias(NAME, bias, x.dtype)
    columns, device, stage_bytes = x.shape[1], x.device, 4 * lines.shape[1]
    dense = x.new_empty(rows, columns)
    launch = _expand(device, numbers, x.dtype, rows, columns, stage_bytes)
    with on(device):
        launch(
            torch.cuda.current_stream(device).cuda_stream,
            *(lines.data_ptr(), starts.data_ptr(), dense.data_ptr(), rows, columns, stage_bytes),
        )
    return linear(x, dense, bias)


def expand_defines(
    numbers: Numbers, dtype: torch.dtype, portable: bool
) -> tuple[tuple[str, int], ...]:
    """The macros of `expand.cu`, whose head says what each means."""
    return (
        ("NUMBER_BITS", numbers.bits),
        ("HALF", int(dtype == torch.float16)),
        ("UNIT_COLUMNS", numbers.unit_columns),
        ("PORTABLE", int(portable)),
    )


@lru_cache(maxsize=1024)
def _decode(
    device: torch.device,
    numbers: Numbers,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    tokens: int,
    stage_bytes: int,
) -> Launch:
    portable = _portable(device)
    tiles, units = ceil(rows / UNIT_ROWS), ceil(columns / numbers.unit_columns)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    most = MOST_BYTES_PORTABLE if portable else MOST_BYTES
    config = choose(numbers, tiles, units, tokens, stage_bytes, multiprocessors, most)
    kernel = load(DECODE, config.defines(numbers, dtype, tokens, portable), device)
    grid = min(ceil(tiles / config.group), multiprocessors)
    shared_bytes = config.shared_bytes(numbers, stage_bytes)
    return prepare(
        *(kernel, grid, 1, 32 * config.warps, shared_bytes, not portable, DECODE_ARGUMENTS)
    )


@lru_cache(maxsize=1024)
def _expand(
    device: torch.device,
    numbers: Numbers,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    stage_bytes: int,
) -> Launch:
    portable = _portable(device)
    kernel = load(EXPAND, expand_defines(numbers, dtype, portable), device)
    count = ceil(rows / UNIT_ROWS) * ceil(columns / numbers.unit_columns)
    table = EXPAND_BYTES_MEANT if numbers.bits == 4 else 0
    shared_bytes = table + EXPAND_WARPS * stage_bytes + BEYOND
    blocks = ceil(count / EXPAND_WARPS)
    return prepare(
        *(kernel, blocks, 1, 32 * EXPAND_WARPS, shared_bytes, not portable, EXPAND_ARGUMENTS)
    )


def _portable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) < BULK_FROM
