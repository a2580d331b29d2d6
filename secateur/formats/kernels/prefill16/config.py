"""The tile that a CTA of the prefill kernel computes, for a layer and a number of tokens."""

from dataclasses import dataclass, replace
from itertools import product
from math import ceil

import torch

from secateur.formats.kernels.decode24.arrange import UNIT_ROWS, Kind
from secateur.formats.kernels.decode24.config import Case

BOX_BYTES = 128  # of a token in a copy: 64 columns; copies start at multiples of it
ATOM_BYTES = 1024  # wgmma's swizzled operand starts at a multiple of it
CONSUMERS = 2  # warpgroups that multiply
THREADS = 128 * (CONSUMERS + 1)
OUT_ROWS = 64  # of results that are stored at a time
MOST_BYTES = 227 * 1024  # of shared memory, that a CTA may ask for
STATIC_BYTES = 2048  # of it: scales, biases and barriers, and what the system reserves


@dataclass(frozen=True)
class Tile:
    """What a CTA computes: two warpgroups, each `blocks` x 64 rows, by `tokens` tokens.

    A cluster of `splits` CTAs has one tile, of which each takes a part of the columns. `a_stages`
    units of each row and `b_stages` boxes of 64 columns of tokens lie in shared memory, and
    `out_buffers` parts of each warpgroup's results.
    """

    blocks: int
    tokens: int
    splits: int
    a_stages: int = 0
    b_stages: int = 0
    out_buffers: int = 0

    @property
    def rows(self) -> int:
        return 64 * CONSUMERS * self.blocks

    @property
    def out_tokens(self) -> int:
        """Tokens that are stored at a time: the most of which each CTA stores as many."""

        def even(n: int) -> bool:
            return not self.tokens % n and not self.blocks * self.tokens // n % self.splits

        return next(filter(even, (64, 32)), 16)

    def shared_bytes(self, unit: int) -> int:
        """Dynamic shared memory of a CTA, as `kernel.cu` lays it out, for units of these bytes."""
        boxes = self.b_stages * self.tokens * BOX_BYTES
        stage = self.rows // UNIT_ROWS * unit
        units = self.a_stages * ceil(stage / BOX_BYTES) * BOX_BYTES
        part = OUT_ROWS * self.out_tokens
        results = 2 * part * CONSUMERS * self.out_buffers
        sums = 4 * part * CONSUMERS * (self.splits - 1)
        return ATOM_BYTES - 1 + boxes + units + results + sums

    def defines(
        self, kind: Kind, grouped: bool, dtype: torch.dtype, activation: int
    ) -> tuple[tuple[str, int], ...]:
        """The macros of `kernel.cu`, whose head says what each means."""
        return (
            ("KIND", int(kind.numbers)),
            ("STRUCTURE", int(kind.structure)),
            ("GROUP_SCALES", int(grouped)),
            ("HALF", int(dtype == torch.float16)),
            ("ROW_BLOCKS", self.blocks),
            ("TOKENS", self.tokens),
            ("SPLITS", self.splits),
            ("A_STAGES", self.a_stages),
            ("B_STAGES", self.b_stages),
            ("OUT_BUFFERS", self.out_buffers),
            ("ACTIVATION", activation),
        )


# Those that were the fastest of some layer at some number of tokens, without what lies in memory.
TILES = (
    Tile(1, 256, 1),
    Tile(1, 256, 2),
    Tile(2, 128, 1),
    Tile(1, 128, 1),
    Tile(1, 128, 2),
    Tile(1, 128, 3),
    Tile(1, 64, 1),
    Tile(1, 64, 2),
    Tile(1, 64, 3),
    Tile(2, 64, 1),
    Tile(1, 96, 1),
    Tile(1, 96, 2),
    Tile(1, 96, 3),
    Tile(1, 160, 1),
    Tile(1, 160, 2),
    Tile(1, 192, 1),
    Tile(1, 192, 2),
    Tile(1, 192, 3),
    Tile(1, 224, 1),
    Tile(1, 224, 2),
    Tile(2, 96, 1),
)

# The cost model, in clock cycles, fitted to the rows of docs/log/2026-11-30-prefill-from-units.md.
STEP_CLOCKS = 0.5  # of one token in a multiplication of 64 rows x 32 columns
UNIT_CLOCKS = 270  # a unit's waits, whatever the tile
SHARED_BYTES_A_CLOCK = 115  # weights that are written to shared memory and read from it
L2_BYTES_A_CLOCK = 115  # what a CTA is sent
LARGE_CLUSTERS = 0.89  # of 3 CTAs and more, on as many SMs: 39 of 44 on an H200, 30 of 33 of 4 CTAs
RESULTS_A_CLOCK = 6.5  # scaled and stored
SUMS_A_CLOCK = 10.5  # sent and added, where columns are split


def choose(case: Case, multiprocessors: int) -> Tile:
    """The tile with the least modelled time, with as much of the operands in memory as fits."""
    able = [tile for tile in TILES if tile.splits <= case.units]
    return with_stages(min(able, key=lambda tile: clocks(tile, case, multiprocessors)), case)


def clocks(tile: Tile, case: Case, multiprocessors: int) -> float:
    """About how long the kernel runs with this tile: waves of tiles x the time of one."""
    tiles = ceil(case.rows / tile.rows) * ceil(case.tokens / tile.tokens)
    clusters = multiprocessors // tile.splits
    if tile.splits > 2:  # they lie within a part of the device, and leave SMs over
        clusters = int(LARGE_CLUSTERS * clusters)
    waves = ceil(tiles / clusters)
    weights = tile.rows // UNIT_ROWS * case.unit_bytes
    tokens = 2 * BOX_BYTES * tile.tokens
    multiplied = 4 * tile.rows // 64 * STEP_CLOCKS * tile.tokens + weights / SHARED_BYTES_A_CLOCK
    unit = max(multiplied, (weights + tokens) / L2_BYTES_A_CLOCK) + UNIT_CLOCKS
    results = tile.rows * tile.tokens
    after = results / RESULTS_A_CLOCK + (results / SUMS_A_CLOCK if tile.splits > 1 else 0)
    return waves * (case.units / tile.splits * unit + after)


def with_stages(tile: Tile, case: Case) -> Tile:
    """The tile with as much in shared memory as fits.

    Four boxes of tokens come first, then two buffers of results, then units.
    """
    for buffers, units in product((2, 1), (4, 3, 2)):
        for boxes in range(8, 3, -1):
            full = replace(tile, a_stages=units, b_stages=boxes, out_buffers=buffers)
            if full.shared_bytes(case.unit_bytes) + STATIC_BYTES <= MOST_BYTES:
                return full
    raise AssertionError(f"{tile} does not fit for {case}")
