"""The 2:4 linear that defines what is correct: dense, on the unpacked weight."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.semi24.packed import PackedSemi24, unpack


def why_not(packed: PackedSemi24, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedSemi24, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ unpack(packed).T + bias`.

    Cost: unpacks the weight at every call.
    """
    return dense_linear(x, unpack(packed), bias)
