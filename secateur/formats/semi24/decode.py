"""2:4 weights at few tokens on a GPU: the sparse tensor cores, fed by a stream of weights."""

from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.contract import Packed
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24 import Kind


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return decode24.why_not(packed.shape, packed.dtype, packed.device, tokens)


def arrange(packed: Packed) -> tuple[UInt8[Tensor, "tiles units bytes"]]:
    """Values and metadata in the order that the kernel's lanes read them."""
    return (decode24.arrange(Kind.W16, packed["values"], packed["metadata"], None, packed.dtype),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
    units: UInt8[Tensor, "tiles units bytes"],
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32."""
    return decode24.multiply(x, units, None, bias, Kind.W16, False, packed.shape[0])
