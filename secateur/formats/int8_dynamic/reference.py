"""The dynamic dense int8 linear that defines what is correct: products of codes, scaled once."""

from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.int8_dynamic.packed import PackedInt8Dynamic, codes_of


def why_not(packed: PackedInt8Dynamic, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedInt8Dynamic, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The formula of `secateur.formats.dynamic`: inputs are rounded, a scale for every token.

    Cost: multiplies in float64.
    """
    return dynamic.linear(x, codes_of(packed), packed.scales, bias)
