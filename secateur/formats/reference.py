"""The linear that defines what is correct: dense, on the unpacked weight."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Implementation, Packed


def anywhere(packed: Packed, tokens: int) -> str | None:
    """Always None: the definition runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ unpack(packed).T + bias`; in float32 and rounded once where the weight is quantised.

    Cost: unpacks the weight at every call.
    """
    weight = packed.format.unpack(packed)
    offset = None if bias is None else bias.to(weight.dtype)
    return dense_linear(x.to(weight.dtype), weight, offset).to(x.dtype)


REFERENCE = Implementation("reference", linear, anywhere)
