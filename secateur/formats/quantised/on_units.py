"""Weights of codes as units of the decode kernel; activations stay 16-bit floats."""

from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.formats import units
from secateur.formats.contract import Implementation, Packed
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.quantised.codes import kept_codes, stored
from secateur.patterns import NM
from secateur.patterns.grids import Grid

KINDS = {
    (NM(2, 4), "int4"): Kind.INT4,
    (NM(2, 4), "int8"): Kind.INT8,
    (NM(2, 4), "fp8"): Kind.FP8,
    (NM(4, 8), "int4"): Kind.INT4_48,
    (None, "int4"): Kind.INT4_ALL,
    (None, "int8"): Kind.INT8_ALL,
}


def implementations(
    grid: Grid, pattern: NM | None, rounds_inputs: bool
) -> tuple[Implementation, ...]:
    """For 2:4 on each of its grids, for 4:8 in 4 bits, for every weight in integers.

    More tokens than `decode` takes are for `expand` alone, but for 2:4. Where inputs are rounded,
    `decode` alone, which does not, and for 2:4.
    """
    if (pattern, grid.name) not in KINDS or (rounds_inputs and pattern is None):
        return ()
    kind, grouped = KINDS[pattern, grid.name], grid.group_size is not None
    weight = kind, grouped, partial(_codes, grid), partial(stored, grid)
    if rounds_inputs:
        return (units.decode(*weight),)
    if kind.on_dense_cores:
        return units.decode(*weight), units.expanded(*weight)
    return units.decode(*weight), units.prefill(*weight), units.expanded(*weight)


def _codes(grid: Grid, packed: Packed) -> Shaped[Tensor, "out kept"]:
    """The kept codes as the kernel takes them: of floats, the bits."""
    codes = kept_codes(grid, packed)
    return codes.view(torch.uint8) if codes.dtype.is_floating_point else codes
