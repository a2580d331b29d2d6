"""The dynamic 2:4 fp8 linear that defines what is correct: products of codes, scaled once."""

from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.semi24_fp8.packed import codes_of
from secateur.formats.semi24_fp8_dynamic.packed import PackedSemi24Fp8Dynamic


def why_not(packed: PackedSemi24Fp8Dynamic, tokens: int) -> str | None:
    """None: it runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Fp8Dynamic,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """The formula of `secateur.formats.dynamic`: inputs are rounded, a scale for every token.

    Cost: unpacks the codes at every call, and multiplies in float32.
    """
    return dynamic.linear(x, codes_of(packed), packed.scales, bias)
