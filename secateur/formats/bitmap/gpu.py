"""Products by a weight with zeros anywhere on a GPU, by the lines that both implementations share.

Arranged are bits, numbers and, of codes, scales: what is stored comes back from the lines alone.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.kernels import bits

Multiply = Callable[..., Tensor]


def implementations(
    numbers: bits.Numbers, arrangement: Arrangement
) -> tuple[Implementation, Implementation]:
    """1 to 16 tokens; and any number, by cuBLAS on a dense weight that is made for each call."""
    return (
        _implementation("decode", partial(bits.multiply, numbers), bits.MOST_TOKENS, arrangement),
        _implementation("expand", partial(bits.multiply_expanded, numbers), None, arrangement),
    )


def _implementation(
    name: str, multiply: Multiply, most_tokens: int | None, arrangement: Arrangement
) -> Implementation:
    def linear(
        x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        return multiply(x, packed["lines"], packed["starts"], bias, packed.shape[0])

    def why_not(packed: Packed, tokens: int) -> str | None:
        return bits.why_not(packed.shape, packed.dtype, packed.device, tokens, most_tokens)

    return Implementation(name, linear, why_not, arrangement)
