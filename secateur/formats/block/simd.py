"""Block-sparse linear by the kernels for a CPU: for every stored block, a product in registers.

A block lies transposed, so that a column of it is one run of memory: a vector of outputs. Sums of
some tokens by some vectors of outputs stay in registers while a block's columns pass, and blocks
of one row add to the same outputs, which stay in the nearest caches.
"""

from jaxtyping import Float
from torch import Tensor

from secateur.formats import simd as on_cpu
from secateur.formats.contract import NO_LIMIT, Arrangement, Bound, Packed
from secateur.formats.kernels import simd


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer, or None."""
    return on_cpu.why_not(packed, str(packed.format))


def arrange(packed: Packed) -> dict[str, Tensor]:
    """Each block transposed."""
    return {"by_column": packed["values"].transpose(1, 2).contiguous()}


def restore(packed: Packed) -> dict[str, Tensor]:
    """What is stored again."""
    values = packed["by_column"].transpose(1, 2).contiguous()
    return {
        "values": values,
        "crow_indices": packed["crow_indices"],
        "col_indices": packed["col_indices"],
    }


BY_COLUMN = Arrangement(("by_column", "crow_indices", "col_indices"), arrange, restore)


def bind(packed: Packed, bias: Float[Tensor, " out"] | None) -> Bound:
    """The linear of these tensors, for any number of tokens."""
    parts = packed["by_column"], packed["crow_indices"], packed["col_indices"]
    return Bound(simd.blocks(packed.shape, *parts, bias, packed.dtype), NO_LIMIT)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ weight.T + bias`, from the stored blocks alone, summed in float32 and rounded once."""
    return bind(*on_cpu.contiguous(packed, bias)).run(x)
