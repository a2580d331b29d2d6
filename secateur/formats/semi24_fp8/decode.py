"""2:4 weights of 8-bit floats at few tokens on a GPU; activations stay 16-bit floats."""

from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.decode24 import Kind, arrange, multiply
from secateur.formats.kernels.decode24 import why_not as why_not_here
from secateur.formats.semi24_fp8.packed import PackedSemi24Fp8


def why_not(packed: PackedSemi24Fp8, tokens: int) -> str | None:
    """None if the kernel can run this layer here, else the reason."""
    return why_not_here(packed.shape, packed.dtype, packed.values.device, tokens)


def arranged(packed: PackedSemi24Fp8) -> tuple[UInt8[Tensor, "tiles units bytes"]]:
    """Codes and metadata in the order that the kernel's lanes read them."""
    return (arrange(Kind.FP8, packed.values, packed.metadata, None, packed.dtype),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Fp8,
    bias: Float[Tensor, " out"] | None,
    units: UInt8[Tensor, "tiles units bytes"],
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32; scales multiply the sums."""
    return multiply(x, units, packed.scales, bias, Kind.FP8, False, packed.shape[0])
