"""Quantised 2:4 weights on a CPU, by the kernels that read codes as they are stored."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from secateur.formats import simd as on_cpu
from secateur.formats.contract import NO_LIMIT, Bound, Implementation, Packed
from secateur.formats.kernels import simd
from secateur.patterns import NM
from secateur.patterns.grids import Fp8, Grid, Int8

KINDS = {Int8(): simd.INT8, Fp8(): simd.FLOAT8}
ROUNDED = Int8()  # the grid whose codes are multiplied by codes of the inputs


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 weights: on inputs as they are, or rounded to integers."""
    if pattern != NM(2, 4) or (rounds_inputs and grid != ROUNDED):
        return None
    if rounds_inputs:
        return Implementation("simd", linear, why_not, bind=bind)
    kind = simd.INT4 if grid.bits == 4 else KINDS.get(grid)
    return None if kind is None else on_cpu.two_of_four(partial(_read_as, kind))


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel whose inputs are rounded cannot run this layer, or None."""
    if packed.shape[1] > simd.MOST_INPUTS:
        return (
            f"{packed.format} simd needs at most {simd.MOST_INPUTS} inputs, got {packed.shape[1]}"
        )
    return on_cpu.why_not(packed, str(packed.format))


def bind(packed: Packed, bias: Float[Tensor, " out"] | None) -> Bound:
    """The linear of these tensors, for any number of tokens."""
    parts = packed["values"], packed["metadata"], packed["scales"]
    return Bound(simd.rounded_two_of_four(packed.shape, *parts, bias, packed.dtype), NO_LIMIT)


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The definition's result (`secateur.formats.dynamic`), bit for bit."""
    return bind(*on_cpu.contiguous(packed, bias)).run(x)


def _read_as(kind: int, packed: Packed) -> int:
    return kind
