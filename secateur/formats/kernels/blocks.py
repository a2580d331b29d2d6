"""A weight in blocks times tokens on a GPU, its transpose times gradients, and its own gradient.

The kernels are Triton's and lie in `blocks_kernels.py`, which is imported at the first call: this
module needs no Triton. What limits them is told where the sizes of tiles are chosen (`config_for`).
Nothing is tuned at a call: a size of tiles is a rule, so a call can be captured in a CUDA graph
once the same one has been compiled.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from secateur.formats.kernels.gpu import on, why_not_16_bits, why_not_capability

STEP = 16  # the least depth of a tensor core's product: sides of blocks are multiples
PROCESSORS = 132  # of an H200; another GPU's are asked for
ADDED = 1024  # sums of a program of `add_parts`


@dataclass(frozen=True)
class Lines:
    """Where kept blocks are along one side of a weight: by rows of blocks, or by columns.

    Line `i` has the blocks `starts[i]..starts[i + 1]`; `across` is where each lies in its line, and
    `places` which of the stored blocks it is, None where they are stored in this order. `order`
    takes the fullest lines first, so that none of them is left for the end.
    """

    starts: Int32[Tensor, " lines_and_1"]
    across: Int32[Tensor, " blocks"]
    places: Int32[Tensor, " blocks"] | None
    order: Int32[Tensor, " lines"]


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


def fullest_first(starts: Int32[Tensor, " lines_and_1"]) -> Int32[Tensor, " lines"]:
    """The lines from that with the most blocks to that with the fewest; ties by number."""
    return starts.diff().argsort(descending=True, stable=True).to(torch.int32)


def config_for(block: tuple[int, int], lines: int, tokens: int, processors: int) -> Config:
    """The tile sizes for blocks of this size in so many lines, and this number of tokens."""
    rows, _ = block
    tile_rows = min(128, rows & -rows)
    if tokens <= 64:
        tile_tokens = max(16, 1 << (tokens - 1).bit_length())
        programs = lines * (rows // tile_rows)
        splits = max(1, min(8, 1 << (4 * processors // max(1, programs)).bit_length() >> 1))
        return Config(tile_rows, tile_tokens, 64, 4, 4, splits=splits)
    tokens_first = tile_rows < 64
    return Config(tile_rows, 128, 64, 4, 3, group=8, tokens_first=tokens_first)


def multiply(
    x: Float[Tensor, "tokens width"],
    values: Float[Tensor, "blocks rows cols"],
    lines: Lines,
    bias: Float[Tensor, " out"] | None,
    config: Config | None = None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias` for the W of these blocks; `x @ W` for lines that have places.

    Sums are float32, rounded once to x's dtype. The same bits every time.

    Cost: reads kept blocks once for every tile of tokens, and a tile of x once for every kept block
        of a row; with `splits`, writes and reads that many float32 results.
    """
    from secateur.formats.kernels.blocks_kernels import multiply_blocks

    is_transposed = lines.places is not None
    rows, cols = values.shape[:0:-1] if is_transposed else values.shape[1:]
    count, (tokens, width) = len(lines.order), x.shape
    config = config or config_for((rows, cols), count, tokens, _processors(x.device))
    x, out = x.contiguous(), count * rows
    row_tiles, splits = count * (rows // config.tile_rows), config.splits
    result = x.new_empty(tokens, out)
    parts = result if splits == 1 else x.new_empty(splits, tokens, out, dtype=torch.float32)
    programs = row_tiles * -(-tokens // config.tile_tokens)
    with on(x.device):
        multiply_blocks[(programs, splits)](
            *(x, values, lines.starts, lines.across),
            *(lines.across if lines.places is None else lines.places, lines.order),
            *(x if bias is None else bias, parts, tokens, width, out, row_tiles),
            rows=rows,
            cols=cols,
            is_transposed=is_transposed,
            has_bias=bias is not None and splits == 1,
            splits=splits,
            tokens_first=config.tokens_first,
            tile_rows=config.tile_rows,
            tile_tokens=config.tile_tokens,
            tile_k=config.tile_k,
            group=config.group,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            _add(parts, bias, result)
    return result


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
    lines: Lines,
    values: Float[Tensor, "blocks rows cols"],
) -> Float[Tensor, "blocks rows cols"]:
    """The gradient of the kept blocks: `grads.T @ x` where a block is, summed in float32."""
    from secateur.formats.kernels.blocks_kernels import sample_products

    _, rows, cols = values.shape
    tile_rows = min(64, rows & -rows)
    tile_cols = 256 if tile_rows == 64 else 128
    grads, x, result = grads.contiguous(), x.contiguous(), torch.empty_like(values)
    row_tiles = len(lines.order) * (rows // tile_rows)
    spans = max(1, min(16, 8 * _processors(x.device) // max(1, row_tiles)))
    with on(x.device):
        sample_products[(row_tiles * spans,)](
            *(grads, x, lines.starts, lines.across, lines.order, result),
            *(len(x), grads.shape[1], x.shape[1], row_tiles),
            rows=rows,
            cols=cols,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            tile_tokens=64,
            spans=spans,
            num_warps=8,
            num_stages=3,
        )
    return result


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
