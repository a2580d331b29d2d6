"""A weight in blocks times tokens on a GPU, its transpose times gradients, and its own gradient.

The kernels are Triton's and lie in `blocks_kernels.py`, which is imported at the first call: this
module needs no Triton. What limits them is told where the sizes of tiles are chosen (`config_for`).
Nothing is tuned at a call: a size of tiles is a rule, so a call can be captured in a CUDA graph
once the same one has been compiled.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from secateur.formats.kernels.gpu import on, why_not_16_bits, why_not_capability
from secateur.formats.kernels.launch import readable

STEP = 16  # the least depth of a tensor core's product: sides of blocks are multiples
JOINED_SIDE = 64  # rows of a tile: fewer join, and share what is read; so many does wgmma take
DENSE_JOINED_SIDE = 128  # where more than this share of the blocks is there:
DENSE = 0.3  # measured with two rows of 64: 0.5 gains, 0.2 does not
BOXED = (64, 64)  # the size of blocks for which copies of boxes were measured, and gain
FEW_TOKENS = 64
MOST_SPLITS = 8
BUSY = 1.5  # programs a processor from which splitting lines gains nothing; measured: 2 and 3.4
SAMPLING = 13  # programs a processor that share the gradient of blocks; measured best of 3.4 to 27
PROCESSORS = 132  # of an H200; another GPU's are asked for
ADDED = 1024  # sums of a program of `add_parts`


@dataclass(frozen=True)
class Lines:
    """Rows of blocks of a weight, or columns of blocks of its transpose, some joined to a line.

    Joined are those that have blocks at the same places, so that inputs read for one serve others.
    Line `i` has the entries `starts[i]..starts[i + 1]`, where any of its `members` has a block:
    `across` is the place along the line, and `places` which of the stored blocks each member has
    there, -1 for none. The fullest lines come first, so that none of them is left for the end.
    """

    starts: Int32[Tensor, " lines_and_1"]
    across: Int32[Tensor, " entries"]
    places: Int32[Tensor, "entries joined"]
    members: Int32[Tensor, "lines joined"]


@dataclass(frozen=True)
class Config:
    """Sizes of one program's tile, and how programs share the work; see `blocks_kernels.py`."""

    tile_rows: int
    tile_tokens: int
    tile_k: int
    warps: int
    stages: int
    group: int = 1
    splits: int = 1
    tokens_first: bool = False
    boxes: bool = False


def why_not(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot multiply by a weight in such blocks, or None."""
    if (problem := why_not_16_bits("block on a GPU", dtype, device)) is not None:
        return problem
    rows, cols = block
    if rows % STEP or cols % STEP:
        return (
            f"block on a GPU needs rows and columns that are multiples of {STEP}, "
            f"got {rows}x{cols}: prune larger blocks"
        )
    if find_spec("triton") is None:
        return "block on a GPU needs Triton, got a Python without it: pip install triton"
    return why_not_capability("block on a GPU", device, (8, 0), "it stays dense")


def lines_of(
    numbers: Int32[Tensor, "rows columns"], side: int, joined_side: int = JOINED_SIDE
) -> Lines:
    """The lines of rows of blocks of this side; `numbers` are those of stored blocks, -1 for none.

    Rows join until a line has `joined_side` rows of the weight, if sides and their number allow it.

    Cost: the square of the number of rows, some milliseconds, on the CPU.
    """
    keep = (numbers >= 0).cpu()
    lines = [[row] for row in range(len(keep))]
    while 2 * len(lines[0]) * side <= joined_side and side & -side == side and len(lines) % 2 == 0:
        lines = _paired(lines, keep)
    met = torch.stack([keep[line].any(0) for line in lines])
    order = met.sum(1).argsort(descending=True, stable=True)
    members = torch.tensor(lines, device="cpu")[order].to(numbers.device)
    line, across = met[order].nonzero(as_tuple=True)
    starts = torch.zeros(len(lines) + 1, dtype=torch.int32, device="cpu")
    starts[1:] = met[order].sum(1).cumsum(0)
    line, across = line.to(numbers.device), across.to(numbers.device)
    return Lines(
        starts.to(numbers.device),
        across.to(torch.int32),
        numbers[members[line], across[:, None]].contiguous(),
        members.to(torch.int32),
    )


def _paired(lines: list[list[int]], keep: Bool[Tensor, "rows columns"]) -> list[list[int]]:
    """Pairs of lines that meet at most places: the fullest takes the one that is most like it."""
    met = torch.stack([keep[line].any(0) for line in lines]).float()
    alike, pairs = met @ met.t(), list[list[int]]()
    for one in met.sum(1).argsort(descending=True, stable=True).tolist():
        if alike[one, one] < 0:
            continue  # it is taken
        alike[:, one] = -1
        other = int(alike[one].argmax())
        alike[:, other] = -1
        pairs.append(lines[one] + lines[other])
    return pairs


def config_for(
    block: tuple[int, int], lines: Lines, tokens: int, processors: int, has_boxes: bool
) -> Config:
    """The tile sizes for blocks of this size in these lines, and this number of tokens.

    Few tokens wait for weights: as many programs as keep the memory busy, and no more, since their
    sums have to be added. More wait for inputs from the L2 cache. What was measured, and on what:
    docs/log/2026-12-01-gpu-blocks.md.
    """
    (rows, cols), (count, joined) = block, lines.members.shape
    tile_rows = joined * rows if joined > 1 else min(128, rows & -rows)
    tile_k = min(64, cols & -cols) if joined > 1 else 64
    if tokens <= FEW_TOKENS:
        tile_tokens = max(16, 1 << (tokens - 1).bit_length())
        programs, splits = count * (joined * rows // tile_rows), 1
        while splits < MOST_SPLITS and splits * programs < BUSY * processors:
            splits *= 2
        return Config(tile_rows, tile_tokens, tile_k, 4, 4, splits=splits)
    if has_boxes and block == BOXED and joined == 1:
        return Config(tile_rows, 128, cols, 4, 3, group=8, tokens_first=True, boxes=True)
    if has_boxes and block == BOXED and joined == 2:
        return Config(tile_rows, 256, cols, 8, 3, group=8, boxes=True)
    warps, stages = 8 if tile_rows == 128 else 4, 3 if tile_k == 64 else 4
    return Config(tile_rows, 128, tile_k, warps, stages, group=8, tokens_first=tile_rows < 64)


def multiply(
    x: Float[Tensor, "tokens width"],
    values: Float[Tensor, "blocks rows cols"],
    lines: Lines,
    is_transposed: bool,
    bias: Float[Tensor, " out"] | None,
    config: Config | None = None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, W in these lines of blocks; `x @ W` where they are columns of W's.

    Sums are float32, rounded once to x's dtype. The same bits every time.

    Cost: reads a weight's blocks once for every tile of tokens, and a tile of x once for every
        entry of a line; with `splits`, writes and reads that many float32 results.
    """
    rows, cols = values.shape[:0:-1] if is_transposed else values.shape[1:]
    if config is None:
        has_boxes = _has_boxes(x.device) and len(values) > 0 and not is_transposed
        config = config_for((rows, cols), lines, len(x), _processors(x.device), has_boxes)
    count, joined = lines.members.shape
    x, values = readable(x), readable(values)
    result = x.new_empty(len(x), count * joined * rows)
    with on(x.device):
        if config.boxes:
            _multiply_boxes(x, values, lines, bias, result, config)
        elif config.splits == 1:
            _multiply_blocks(x, values, lines, is_transposed, bias, result, config)
        else:
            parts = x.new_empty(config.splits, *result.shape, dtype=torch.float32)
            _multiply_blocks(x, values, lines, is_transposed, None, parts, config)
            _add(parts, bias, result)
    return result


def _multiply_blocks(
    x: Float[Tensor, "tokens width"],
    values: Float[Tensor, "blocks rows cols"],
    lines: Lines,
    is_transposed: bool,
    bias: Float[Tensor, " out"] | None,
    result: Float[Tensor, "*splits tokens out"],
    config: Config,
) -> None:
    from secateur.formats.kernels.blocks_kernels import multiply_blocks

    rows, cols = values.shape[:0:-1] if is_transposed else values.shape[1:]
    (count, joined), (tokens, width), out = lines.members.shape, x.shape, result.shape[-1]
    row_tiles = count * (joined * rows // config.tile_rows)
    multiply_blocks[(row_tiles * -(-tokens // config.tile_tokens), config.splits)](
        *(x, values, lines.starts, lines.across, lines.places, lines.members),
        *(x if bias is None else bias, result, tokens, width, out, row_tiles),
        rows=rows,
        cols=cols,
        joined=joined,
        is_transposed=is_transposed,
        has_bias=bias is not None,
        splits=config.splits,
        tokens_first=config.tokens_first,
        tile_rows=config.tile_rows,
        tile_tokens=config.tile_tokens,
        tile_k=config.tile_k,
        group=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _multiply_boxes(
    x: Float[Tensor, "tokens width"],
    values: Float[Tensor, "blocks rows cols"],
    lines: Lines,
    bias: Float[Tensor, " out"] | None,
    result: Float[Tensor, "tokens out"],
    config: Config,
) -> None:
    from secateur.formats.kernels.blocks_kernels import TensorDescriptor, multiply_boxes

    _, rows, cols = values.shape
    (count, joined), (tokens, out) = lines.members.shape, result.shape
    multiply_boxes[(count * -(-tokens // config.tile_tokens),)](
        TensorDescriptor.from_tensor(x, [config.tile_tokens, cols]),
        TensorDescriptor.from_tensor(values.view(-1, cols), [rows, cols]),
        *(lines.starts, lines.across, lines.places, lines.members),
        *(x if bias is None else bias, result, tokens, out, count),
        rows=rows,
        cols=cols,
        joined=joined,
        has_bias=bias is not None,
        tokens_first=config.tokens_first,
        tile_tokens=config.tile_tokens,
        group=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _add(
    parts: Float[Tensor, "splits tokens out"],
    bias: Float[Tensor, " out"] | None,
    result: Float[Tensor, "tokens out"],
) -> None:
    from secateur.formats.kernels.blocks_kernels import add_parts

    add_parts[(-(-result.numel() // ADDED),)](
        *(parts, result if bias is None else bias, result, result.numel(), result.shape[1]),
        has_bias=bias is not None,
        splits=len(parts),
        tile=ADDED,
    )


def sampled(
    grads: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens width"],
    starts: Int32[Tensor, " rows_and_1"],
    columns: Int32[Tensor, " blocks"],
    values: Float[Tensor, "blocks rows cols"],
) -> Float[Tensor, "blocks rows cols"]:
    """The gradient of the kept blocks: `grads.T @ x` where a block is, summed in float32."""
    from secateur.formats.kernels.blocks_kernels import sample_products

    _, rows, cols = values.shape
    tile_rows, (tokens, width) = min(64, rows & -rows), x.shape
    wide = tile_rows == 64 and _has_boxes(x.device)  # and so room for four stages of it
    tile_cols, warps, stages = (256, 8, 4) if wide else (128, 4, 3)
    grads, x, result = grads.contiguous(), x.contiguous(), torch.empty_like(values)
    row_tiles = (len(starts) - 1) * (rows // tile_rows)
    spans = -(-SAMPLING * _processors(x.device) // max(1, row_tiles))
    spans = max(1, min(spans, -(-width // tile_cols)))
    with on(x.device):
        sample_products[(row_tiles * spans,)](
            *(grads, x, starts, columns, result, tokens, grads.shape[1], width, row_tiles),
            rows=rows,
            cols=cols,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            tile_tokens=64,
            spans=spans,
            num_warps=warps,
            num_stages=stages,
        )
    return result


def _has_boxes(device: torch.device) -> bool:
    """Whether the GPU is a Hopper: an engine that copies boxes, and the shared memory for them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
