"""Lines of bits and numbers: as the kernels' lanes read them, and back, bit for bit."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats.kernels.bits.arrange import (
    BIT_LINES,
    LANES,
    UNIT_COLUMNS,
    UNIT_ROWS,
    arrange,
    restore,
)

module = sys.modules["secateur.formats.kernels.bits.arrange"]


def weight_with_zeros(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Numbers in bfloat16, kept at random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def read_by_lanes(lines: Tensor, starts: Tensor) -> Tensor:
    """The weight as lanes.cuh says that lanes read it, one nibble after another."""
    run, (tiles, units) = lines.flatten(), (starts.shape[0], starts.shape[1] - 1)
    numbers = run.view(torch.int16).view(torch.bfloat16)
    weight = torch.zeros(tiles * UNIT_ROWS, units * UNIT_COLUMNS, dtype=torch.bfloat16)
    for tile in range(tiles):
        for unit in range(units):
            begin = int(starts[tile, unit]) * LANES
            for lane in range(LANES):
                g, t, taken = lane // 4, lane % 4, 0
                for nibble in range(8 * BIT_LINES):
                    word = int(run[begin + nibble // 8 * LANES + lane])
                    s, j, r = nibble // 4, nibble // 2 % 2, nibble % 2
                    for i in range(4):
                        if word >> (4 * (nibble % 8) + i) & 1:
                            at = begin + (BIT_LINES + taken // 2) * LANES + lane
                            row, column = 16 * tile + g + 8 * r, 32 * s + 8 * t + 4 * j + i
                            weight[row, unit * UNIT_COLUMNS + column] = numbers[2 * at + taken % 2]
                            taken += 1
    return weight


def test_lanes_find_the_weight() -> None:
    weight = weight_with_zeros(24, 300, 0.5)
    found = read_by_lanes(*arrange(weight != 0, weight[weight != 0]))
    assert found.shape == (32, 512)
    assert torch.equal(found[:24, :300], weight)
    assert not found[24:].any() and not found[:, 300:].any()


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 600),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_is_arranged_is_restored(rows: int, columns: int, density: float, seed: int) -> None:
    weight = weight_with_zeros(rows, columns, density, seed)
    keep = weight != 0
    lines, starts = arrange(keep, weight[keep])
    kept, values = restore(lines, starts, rows, columns, weight.dtype)
    assert torch.equal(kept, keep)
    assert torch.equal(values.view(torch.int16), weight[keep].view(torch.int16))
    sizes = starts.diff(dim=1)
    assert torch.equal(starts[1:, 0], starts[:-1, -1]) and starts[0, 0] == 0
    assert lines.shape[1] == LANES * int(sizes.max()) and int(sizes.min()) >= BIT_LINES
    assert lines.numel() - LANES * int(starts[-1, -1]) < lines.shape[1]


def test_rows_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_with_zeros(100, 300, 0.4)
    keep = weight != 0
    whole = arrange(keep, weight[keep])
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 32 * 300)
    parts = arrange(keep, weight[keep])
    assert all(map(torch.equal, whole, parts))
    kept, values = restore(*parts, 100, 300, weight.dtype)
    assert torch.equal(kept, keep) and torch.equal(values, weight[keep])


@pytest.mark.parametrize(("density", "bits"), [(0.5, 10.52), (0.3, 7.22), (0.2, 5.47)])
def test_the_lane_with_the_most_sets_the_lines(density: float, bits: float) -> None:
    """16 bits for each kept weight and 1 for each would be 9, 5.8 and 4.2."""
    weight = weight_with_zeros(256, 4096, density)
    lines, _ = arrange(weight != 0, weight[weight != 0])
    assert 8 * lines.nbytes / weight.numel() == pytest.approx(bits, rel=0.02)
