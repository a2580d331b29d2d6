"""Quantised 2:4 weights on a CPU, by the kernels that read codes as they are stored."""

from secateur.formats import simd as on_cpu
from secateur.formats.contract import Implementation
from secateur.formats.kernels import simd
from secateur.patterns import NM
from secateur.patterns.grids import Fp8, Grid, Int8

KINDS = {Int8(): simd.INT8, Fp8(): simd.FLOAT8}


def implementation(grid: Grid, pattern: NM | None, rounds_inputs: bool) -> Implementation | None:
    """For 2:4 weights whose inputs are not rounded."""
    kind = simd.INT4 if grid.bits == 4 else KINDS.get(grid)
    if pattern != NM(2, 4) or rounds_inputs or kind is None:
        return None
    return on_cpu.two_of_four(lambda packed: kind)
