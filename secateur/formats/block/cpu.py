"""Block-sparse linear in plain torch: gather, batched matmul, scatter.

    y[:, rows of block b] += x[:, columns of block b] @ values[b].T        for every stored block b

Stored blocks become one `bmm`, fed by one `index_select` that gathers the columns of x they meet,
and followed by one `index_add_` into the rows of y they belong to:

    values [blocks, rows, cols]        x as [column of blocks, ...]       y as [row of blocks, ...]
      block 0  (row 0, col 2)    <---    gathered[0] = x[2]       --->      y[0] += product[0]
      block 1  (row 0, col 5)    <---    gathered[1] = x[5]       --->      y[0] += product[1]
      block 2  (row 1, col 0)    <---    gathered[2] = x[0]       --->      y[1] += product[2]

Why it is fast: only stored blocks are read and multiplied, and each multiplication is a dense tile
that the BLAS library does well. Three choices carry the speed:

- Blocks are taken in runs whose gathered columns and products fit the caches together
  (`RUN_BYTES`). Without runs, memory grows with blocks x tokens and the time goes into fresh
  pages: at 512 tokens and 80 % zeros 0.6x of dense without, 2-3x with.
- For a few tokens x stands on the left of the product (rows of x are contiguous), for more on the
  right (x transposed once, so that a block multiplies contiguous columns): 2x apart at 1 token, and
  1.3x the other way at 16.
- 16-bit weights are widened to float32 run by run where the processor has no units for them:
  emulation runs at a sixth to a fifteenth of the speed. Where it has (`NATIVE`), multiplying them
  as they are is up to 2x faster than widening. Sums over blocks are float32 in both cases.

Determinism: a run adds its blocks to a row of y in stored order, whatever the number of threads.
Known limits: three operators a run, so a layer below a million weights gains little; and with more
threads than free cores each of them waits for the slowest.
How it was measured, and what lost: docs/log/2026-11-22-cpu-block.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.compressed_rows import rows_of, starts_of
from secateur.formats.contract import Arrangement, Packed

RUN_BYTES = 2 * 2**20  # gathered columns of one run; 1-4 MiB measure alike, 8 MiB and more lose
FEW_TOKENS = 12  # x on the left up to here; measured crossover between 8 and 16
NATIVE = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}  # measured with both


def why_not(packed: Packed, tokens: int) -> str | None:
    """The device that it does not serve, or None on a CPU."""
    device = packed.device.type
    return None if device == "cpu" else f"block cpu needs a weight on the CPU, got {device}"


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The row of blocks of each stored block: `crow_indices` spelt out once, not per call."""
    return {"block_rows": rows_of(packed["crow_indices"], len(packed["values"]))}


def restore(packed: Packed) -> dict[str, Tensor]:
    """What is stored again: the number of blocks above each row of blocks."""
    row_blocks = packed.shape[0] // packed["values"].shape[1]
    return {
        "values": packed["values"],
        "crow_indices": starts_of(packed["block_rows"], row_blocks),
        "col_indices": packed["col_indices"],
    }


BLOCK_ROWS = Arrangement(("values", "col_indices", "block_rows"), arrange, restore)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`x @ weight.T + bias`, from the stored blocks alone.

    Cost: density x dense operations; beside x and y, three times `RUN_BYTES`.
    """
    blocks = packed["values"]
    tokens, (_, rows, cols) = x.shape[0], blocks.shape
    few = tokens <= FEW_TOKENS
    wide = torch.promote_types(x.dtype, torch.float32)  # of the sums
    narrow = x.dtype if _multiplies(x.dtype) else wide  # of the products
    columns = x.to(narrow).unflatten(1, (-1, cols))
    columns = columns.transpose(0, 1) if few else columns.permute(1, 2, 0).contiguous()
    sums = _start(packed, bias, wide, tokens, few)
    largest = max(tokens * cols, tokens * rows, rows * cols if narrow != x.dtype else 0)
    run = max(1, RUN_BYTES // (largest * wide.itemsize))
    for values, column, row in zip(
        blocks.split(run),
        packed["col_indices"].split(run),
        packed["block_rows"].split(run),
        strict=True,
    ):
        met = columns.index_select(0, column)
        tile = values.to(narrow)
        product = torch.bmm(met, tile.transpose(1, 2)) if few else torch.bmm(tile, met)
        sums.index_add_(0, row, product.to(wide))
    result = sums.transpose(0, 1).flatten(1) if few else sums.flatten(0, 1).t()
    return result.to(x.dtype).contiguous()


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies the dtype in hardware."""
    return dtype not in NATIVE or bool(torch.cpu.get_capabilities().get(NATIVE[dtype]))


def _start(
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
    tokens: int,
    few: bool,
) -> Float[Tensor, "row_blocks a b"]:
    """The sums before the first block: the bias or zeros, as [row of blocks, tokens, rows] or
    [row of blocks, rows, tokens].
    """
    rows = packed["values"].shape[1]
    row_blocks = packed.shape[0] // rows
    shape = (row_blocks, tokens, rows) if few else (row_blocks, rows, tokens)
    if bias is None:
        return torch.zeros(shape, dtype=dtype, device=packed.device)
    start = bias.to(dtype).view(row_blocks, rows).unsqueeze(1 if few else 2)
    # a copy even where the bias is already of this shape and dtype: the sums are added to in place
    return start.expand(shape).clone(memory_format=torch.contiguous_format)
