"""The 2:4 int4 linear that defines what is correct: dense, on the exact scale x code."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.semi24_int4.packed import PackedSemi24Int4, dequantised


def why_not(packed: PackedSemi24Int4, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedSemi24Int4, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ dequantised(packed).T + bias`, in float32 and rounded once to the input's dtype.

    Cost: unpacks the weight at every call, in float32.
    """
    weight = dequantised(packed)
    offset = None if bias is None else bias.to(weight.dtype)
    return dense_linear(x.to(weight.dtype), weight, offset).to(x.dtype)
