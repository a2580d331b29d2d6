"""2:4 weights at few tokens on a GPU: the sparse tensor cores, fed by a stream of weights."""

from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Arrangement, Packed
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24 import Kind


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return decode24.why_not(packed.shape, packed.dtype, packed.device, tokens)


def arrange(packed: Packed) -> dict[str, Tensor]:
    """Values and metadata in the order that the kernel's lanes read them."""
    values, metadata = packed["values"], packed["metadata"]
    return {"units": decode24.arrange(Kind.W16, values, metadata, None, packed.dtype)}


def restore(packed: Packed) -> dict[str, Tensor]:
    """Values and metadata again, bit for bit."""
    columns = packed.shape[1]
    values, metadata, _ = decode24.restore(Kind.W16, packed["units"], False, columns, packed.dtype)
    return {"values": values, "metadata": metadata}


UNITS = Arrangement(("units",), arrange, restore)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32."""
    return decode24.multiply(x, packed["units"], None, bias, Kind.W16, False, packed.shape[0])
