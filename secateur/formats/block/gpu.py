"""Block-sparse linear on a GPU, by the kernels of `kernels/blocks.py`.

`decode` is for few tokens, which wait for the weights: a row of blocks is cut among several
programs. `prefill` is for more, which wait for the inputs: a program has a row of blocks and a tile
of tokens. Both read blocks as they are stored; what is arranged are indices alone, those of the
transposed weight among them, by which gradients find the blocks of a column.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.compressed_rows import TENSORS, rows_of
from secateur.formats.contract import Arrangement, Gradients, Implementation, Packed
from secateur.formats.kernels import blocks
from secateur.formats.kernels.blocks import Lines


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernels cannot run this layer, or None."""
    size: tuple[int, int] = packed.format.rows, packed.format.cols  # type: ignore[attr-defined]
    return blocks.why_not(size, packed.dtype, packed.device)


def why_not_few(packed: Packed, tokens: int) -> str | None:
    """Why they cannot run it as what waits for weights, or None."""
    if (problem := why_not(packed, tokens)) is not None:
        return problem
    if tokens > blocks.FEW_TOKENS:
        most = blocks.FEW_TOKENS
        return f"block decode needs at most {most} tokens, got {tokens}: prefill runs more"
    return None


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The lines of rows of blocks, and those of columns of blocks for the gradient of the input."""
    stored, rows, cols = packed["values"].shape
    at = rows_of(packed["crow_indices"], stored).long(), packed["col_indices"].long()
    size, like = (packed.shape[0] // rows, packed.shape[1] // cols), at[0].to(torch.int32)
    numbers = like.new_full(size, -1)
    numbers[at] = torch.arange(stored, dtype=like.dtype, device=like.device)
    made: dict[tuple[str, ...], Lines] = {
        ROWS: blocks.lines_of(numbers, rows),
        COLUMNS: blocks.lines_of(numbers.t(), cols),
    }
    made[WIDE_ROWS] = made[ROWS]
    if stored > blocks.DENSE * numbers.numel():
        made[WIDE_ROWS] = blocks.lines_of(numbers, rows, blocks.DENSE_JOINED_SIDE)
    result = dict[str, Tensor]()
    for names, lines in made.items():
        parts = lines.starts, lines.across, lines.places, lines.members
        result |= dict(zip(names, parts, strict=True))
    return result


def restore(packed: Packed) -> dict[str, Tensor]:
    """What is stored, which is held as it is."""
    return {name: packed[name] for name in TENSORS}


ROWS = ("row_starts", "row_columns", "row_places", "row_members")
WIDE_ROWS = tuple(f"wide_{name}" for name in ROWS)  # those for many tokens
COLUMNS = ("column_starts", "column_rows", "column_places", "column_members")
FOR_FEW = Arrangement((*TENSORS, *ROWS, *COLUMNS), arrange, restore)
FOR_MANY = Arrangement((*TENSORS, *WIDE_ROWS, *COLUMNS), arrange, restore)


def lines(packed: Packed, names: tuple[str, ...]) -> Lines:
    """The lines of an arranged weight: `ROWS` or `COLUMNS`."""
    return Lines(*(packed[name] for name in names))


def linear_of_few(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ weight.T + bias`, from the stored blocks alone, summed in float32 and rounded once."""
    return blocks.multiply(x, packed["values"], lines(packed, ROWS), False, bias)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The same for more tokens, for which more rows of blocks may share what is read."""
    return blocks.multiply(x, packed["values"], lines(packed, WIDE_ROWS), False, bias)


def input_gradient(grad: Float[Tensor, "tokens out"], packed: Packed) -> Float[Tensor, "tokens in"]:
    """`grad @ weight`, from the stored blocks alone."""
    return blocks.multiply(grad, packed["values"], lines(packed, COLUMNS), True, None)


def values_gradient(
    grad: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], packed: Packed
) -> Float[Tensor, "blocks rows cols"]:
    """The blocks of `grad.T @ x` that are stored, and no others."""
    return blocks.sampled(grad, x, *(packed[name] for name in (*TENSORS[1:], TENSORS[0])))


GRADIENTS = Gradients(input_gradient, values_gradient)
DECODE = Implementation("decode", linear_of_few, why_not_few, FOR_FEW, gradients=GRADIENTS)
PREFILL = Implementation("prefill", linear, why_not, FOR_MANY, gradients=GRADIENTS)
