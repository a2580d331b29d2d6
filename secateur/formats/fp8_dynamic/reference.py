"""The dynamic dense fp8 linear that defines what is correct: products of codes, scaled once."""

from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.fp8_dynamic.packed import PackedFp8Dynamic, codes_of


def why_not(packed: PackedFp8Dynamic, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedFp8Dynamic, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The formula of `secateur.formats.dynamic`: inputs are rounded, a scale for every token.

    Cost: multiplies in float32.
    """
    return dynamic.linear(x, codes_of(packed), packed.scales, bias)
