"""2:4 weights of codes at few tokens on a GPU; activations stay 16-bit floats."""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.contract import Implementation, Packed
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.quantised.codes import kept_codes
from secateur.patterns import NM
from secateur.patterns.grids import Grid

KINDS = {"int4": Kind.INT4, "int8": Kind.INT8, "fp8": Kind.FP8}


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 on each of its grids, inputs rounded or not: this one does not round them."""
    if pattern is None or grid.name not in KINDS:
        return None
    run, order = partial(linear, grid), partial(arrange, grid)
    return Implementation("decode", run, why_not, ("units",), order)


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return decode24.why_not(packed.shape, packed.dtype, packed.device, tokens)


def arrange(grid: Grid, packed: Packed) -> tuple[UInt8[Tensor, "tiles units bytes"]]:
    """Codes, metadata and the groups' scales in the order that the kernel's lanes read them."""
    kind, codes = KINDS[grid.name], kept_codes(grid, packed)
    if kind is Kind.FP8:
        codes = codes.view(torch.uint8)
    scales = None if grid.group_size is None else packed["scales"]
    return (decode24.arrange(kind, codes, packed["metadata"], scales, packed.dtype),)


def linear(
    grid: Grid,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
    units: UInt8[Tensor, "tiles units bytes"],
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32; scales multiply the sums of their group."""
    grouped = grid.group_size is not None
    scales = None if grouped else packed["scales"]
    return decode24.multiply(x, units, scales, bias, KINDS[grid.name], grouped, packed.shape[0])
