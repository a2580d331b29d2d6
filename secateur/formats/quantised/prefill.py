"""2:4 weights of 8-bit codes at many tokens on Hopper: one pass rounds, one multiplies."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.kernels import prefill24
from secateur.formats.quantised.codes import stored
from secateur.patterns import NM
from secateur.patterns.grids import Grid


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 on the 8-bit grids, inputs rounded to the same."""
    if pattern != NM(2, 4) or grid.bits != 8 or not rounds_inputs:
        return None
    tiles = Arrangement(("tiles", "scales"), arrange, partial(restore, grid))
    return Implementation("prefill", partial(linear, grid), why_not, tiles, prefill24.ACTIVATIONS)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return prefill24.why_not(packed.shape, packed.dtype, packed.device)


def arrange(packed: Packed) -> dict[str, Tensor]:
    """Codes and metadata in the order that the kernel's lanes read them."""
    return {"tiles": prefill24.arrange(packed["values"], packed["metadata"])}


def restore(grid: Grid, packed: Packed) -> dict[str, Tensor]:
    """What is stored again, bit for bit."""
    kept, metadata = prefill24.restore(packed["tiles"], packed.shape, grid.code_dtype)
    return {"values": stored(grid, kept), "metadata": metadata, "scales": packed["scales"]}


def linear(
    grid: Grid,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
    activation: str = "",
) -> Float[Tensor, "tokens out"]:
    """The definition's result; for cost, error and what it raises see `prefill24.linear`."""
    tiles, scales = packed["tiles"], packed["scales"]
    return prefill24.linear(x, tiles, scales, bias, grid.code_dtype, activation)
