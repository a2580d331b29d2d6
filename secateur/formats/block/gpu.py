"""Block-sparse linear on a GPU, by the kernels of `kernels/blocks.py`.

`decode` is for few tokens, which wait for the weights: a row of blocks is cut among several
programs. `prefill` is for more, which wait for the inputs: a program has a row of blocks and a tile
of tokens. Both read blocks as they are stored; what is arranged are indices alone, those of the
transposed weight among them, by which gradients find the blocks of a column.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.compressed_rows import TENSORS, rows_of, starts_of
from secateur.formats.contract import Arrangement, Gradients, Packed
from secateur.formats.kernels import blocks
from secateur.formats.kernels.blocks import Lines

FEW_TOKENS = 64


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernels cannot run this layer, or None."""
    size: tuple[int, int] = packed.format.rows, packed.format.cols  # type: ignore[attr-defined]
    return blocks.why_not(size, packed.dtype, packed.device)


def why_not_few(packed: Packed, tokens: int) -> str | None:
    """Why they cannot run it as what waits for weights, or None."""
    if (problem := why_not(packed, tokens)) is not None:
        return problem
    if tokens > FEW_TOKENS:
        return f"block decode needs at most {FEW_TOKENS} tokens, got {tokens}: prefill runs more"
    return None


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The order of the rows of blocks, and where the blocks of each column of blocks are."""
    crow, col = packed["crow_indices"], packed["col_indices"]
    places = col.argsort(stable=True)
    starts = starts_of(col, packed.shape[1] // packed["values"].shape[2])
    return {
        "row_order": blocks.fullest_first(crow),
        "column_starts": starts,
        "column_rows": rows_of(crow, len(col))[places],
        "column_places": places.to(torch.int32),
        "column_order": blocks.fullest_first(starts),
    }


def restore(packed: Packed) -> dict[str, Tensor]:
    """What is stored, which is held as it is."""
    return {name: packed[name] for name in TENSORS}


BY_LINE = Arrangement(
    (*TENSORS, "row_order", "column_starts", "column_rows", "column_places", "column_order"),
    arrange,
    restore,
)


def rows(packed: Packed) -> Lines:
    """The rows of blocks of an arranged weight."""
    return Lines(packed["crow_indices"], packed["col_indices"], None, packed["row_order"])


def columns(packed: Packed) -> Lines:
    """The columns of blocks of an arranged weight."""
    names = "column_starts", "column_rows", "column_places", "column_order"
    return Lines(*(packed[name] for name in names))


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ weight.T + bias`, from the stored blocks alone, summed in float32 and rounded once."""
    return blocks.multiply(x, packed["values"], rows(packed), bias)


def input_gradient(grad: Float[Tensor, "tokens out"], packed: Packed) -> Float[Tensor, "tokens in"]:
    """`grad @ weight`, from the stored blocks alone."""
    return blocks.multiply(grad, packed["values"], columns(packed), None)


def values_gradient(
    grad: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], packed: Packed
) -> Float[Tensor, "blocks rows cols"]:
    """The blocks of `grad.T @ x` that are stored, and no others."""
    return blocks.sampled(grad, x, rows(packed), packed["values"])


GRADIENTS = Gradients(input_gradient, values_gradient)
