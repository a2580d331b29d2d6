"""2:4 weights of 8-bit codes at many tokens on Hopper: one pass rounds, one multiplies."""

from functools import partial

from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.contract import Implementation, Packed
from secateur.formats.kernels import prefill24
from secateur.patterns import NM
from secateur.patterns.grids import Grid


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 on the 8-bit grids, inputs rounded to the same."""
    if pattern is None or grid.bits != 8 or not rounds_inputs:
        return None
    run = partial(linear, grid)
    return Implementation("prefill", run, why_not, ("tiles",), arrange, prefill24.ACTIVATIONS)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return prefill24.why_not(packed.shape, packed.dtype, packed.device)


def arrange(packed: Packed) -> tuple[UInt8[Tensor, "tiles blocks tile_bytes"]]:
    """Codes and metadata in the order that the kernel's lanes read them."""
    return (prefill24.arrange(packed["values"], packed["metadata"]),)


def linear(
    grid: Grid,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    activation: str = "",
) -> Float[Tensor, "tokens out"]:
    """The definition's result; for cost, error and what it raises see `prefill24.linear`."""
    return prefill24.linear(x, tiles, packed["scales"], bias, grid.code_dtype, activation)
