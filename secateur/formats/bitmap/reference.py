"""The bitmap linear that defines what is correct: dense, on the unpacked weight."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.bitmap.packed import PackedBitmap, unpack


def why_not(packed: PackedBitmap, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedBitmap, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ unpack(packed).T + bias`.

    Cost: unpacks the weight at every call.
    """
    return dense_linear(x, unpack(packed), bias)
