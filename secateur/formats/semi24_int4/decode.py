"""2:4 weights of 4-bit integers at few tokens on a GPU; activations stay 16-bit floats."""

from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.decode24 import Kind, arrange, multiply
from secateur.formats.kernels.decode24 import why_not as why_not_here
from secateur.formats.semi24_int4.packed import PackedSemi24Int4, codes_of


def why_not(packed: PackedSemi24Int4, tokens: int) -> str | None:
    """None if the kernel can run this layer here, else the reason."""
    return why_not_here(packed.shape, packed.dtype, packed.values.device, tokens)


def arranged(packed: PackedSemi24Int4) -> tuple[UInt8[Tensor, "tiles units bytes"]]:
    """Codes, metadata and the groups' scales in the order that the kernel's lanes read them."""
    scales = packed.scales if packed.group_size else None
    return (arrange(Kind.INT4, codes_of(packed), packed.metadata, scales, packed.dtype),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Int4,
    bias: Float[Tensor, " out"] | None,
    units: UInt8[Tensor, "tiles units bytes"],
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32; scales multiply the sums of their group."""
    grouped = packed.group_size is not None
    scales = None if grouped else packed.scales
    return multiply(x, units, scales, bias, Kind.INT4, grouped, packed.shape[0])
