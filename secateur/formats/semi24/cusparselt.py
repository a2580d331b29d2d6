"""2:4 weights at many tokens on a GPU: cuSPARSELt, with a searched and checked algorithm."""

from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Arrangement, Packed
from secateur.formats.kernels import cusparselt, cusparselt_settings


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the library cannot run this layer here, or None.

    Any number of tokens will do: measurements decide where another implementation is faster.
    """
    return cusparselt.why_not(packed.shape, packed.dtype, packed.device)


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The weight as the library reads it; opaque, so it is made on load and never saved.

    Cost: 0.5625 of the dense weight's bytes, beside as many that are stored; for a moment the
        dense weight, too.
    """
    return {"blob": cusparselt.compress(packed.dense())}


BLOB = Arrangement(("blob",), arrange)  # opaque: nothing can be restored from it


def linear(
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32.

    The first call for a shape and a power of two of tokens has an algorithm searched, in a child
    process, unless one is remembered on this machine. Repeated calls may differ in the last bits if
    its sums are split.

    Cost: see `secateur.formats.kernels.cusparselt_child.searched` for the first call.
    Raises: RuntimeError if a search is needed inside a CUDA graph capture, or finds nothing right.
    """
    return cusparselt_settings.product(packed["blob"], x, packed.shape[0], bias)
