"""2:4 weights of codes at few tokens on a GPU; activations stay 16-bit floats."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.quantised.codes import kept_codes, stored
from secateur.patterns import NM
from secateur.patterns.grids import Grid

KINDS = {"int4": Kind.INT4, "int8": Kind.INT8, "fp8": Kind.FP8}


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 on each of its grids, inputs rounded or not: this one does not round them."""
    if pattern is None or grid.name not in KINDS:
        return None
    return Implementation("decode", partial(linear, grid), why_not, units_of(grid))


def units_of(grid: Grid) -> Arrangement:
    """Codes, metadata and the groups' scales as the kernel's lanes read them, in one tensor.

    Scales of whole rows stay as they are stored, beside it.
    """
    names = ("units",) if grid.group_size is not None else ("units", "scales")
    return Arrangement(names, partial(arrange, grid), partial(restore, grid))


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the kernel cannot run this layer here, or None."""
    return decode24.why_not(packed.shape, packed.dtype, packed.device, tokens)


def arrange(grid: Grid, packed: Packed) -> dict[str, Tensor]:
    """Codes, metadata and the groups' scales in the order that the kernel's lanes read them."""
    kind, codes = KINDS[grid.name], kept_codes(grid, packed)
    if kind is Kind.FP8:
        codes = codes.view(torch.uint8)
    scales = None if grid.group_size is None else packed["scales"]
    return {"units": decode24.arrange(kind, codes, packed["metadata"], scales, packed.dtype)}


def restore(grid: Grid, packed: Packed) -> dict[str, Tensor]:
    """What is stored again, bit for bit."""
    kind, grouped, columns = KINDS[grid.name], grid.group_size is not None, packed.shape[1]
    kept, metadata, scales = decode24.restore(kind, packed["units"], grouped, columns, packed.dtype)
    values = stored(grid, kept)
    return {
        "values": values,
        "metadata": metadata,
        "scales": packed["scales"] if scales is None else scales,
    }


def linear(
    grid: Grid,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32; scales multiply the sums of their group."""
    grouped, units = grid.group_size is not None, packed["units"]
    scales = None if grouped else packed["scales"]
    return decode24.multiply(x, units, scales, bias, KINDS[grid.name], grouped, packed.shape[0])
