"""2:4 weights at few tokens on a GPU: the sparse tensor cores, fed by a stream of weights."""

from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.decode24 import Kind, arrange, multiply
from secateur.formats.kernels.decode24 import why_not as why_not_here
from secateur.formats.semi24.packed import PackedSemi24


def why_not(packed: PackedSemi24, tokens: int) -> str | None:
    """None if the kernel can run this layer here, else the reason."""
    return why_not_here(packed.shape, packed.dtype, packed.values.device, tokens)


def arranged(packed: PackedSemi24) -> tuple[UInt8[Tensor, "tiles units bytes"]]:
    """Values and metadata in the order that the kernel's lanes read them."""
    return (arrange(Kind.W16, packed.values, packed.metadata, None, packed.dtype),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24,
    bias: Float[Tensor, " out"] | None,
    units: UInt8[Tensor, "tiles units bytes"],
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32."""
    return multiply(x, units, None, bias, Kind.W16, False, packed.shape[0])
