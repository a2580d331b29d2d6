"""Lines of bits and numbers: as the kernels' lanes read them, and back, bit for bit."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats.kernels.bits.arrange import (
    CODES,
    FLOATS,
    GROUP,
    LANES,
    UNIT_ROWS,
    Numbers,
    arrange,
    restore,
)

module = sys.modules["secateur.formats.kernels.bits.arrange"]


def weight_with_zeros(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Numbers in bfloat16, kept at random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def codes_with_zeros(
    rows: int, columns: int, density: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits, int8, kept at random, and scales of their groups."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 8, (rows, columns), generator=generator)
    codes *= 1 - 2 * torch.randint(2, (rows, columns), generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < density
    scales = torch.rand(rows, -(-columns // GROUP), generator=generator).bfloat16()
    return (codes * keep).to(torch.int8), scales


def read_by_lanes(numbers: Numbers, lines: Tensor, starts: Tensor) -> Tensor:
    """The weight as lanes.cuh says that lanes read it, one nibble after another: numbers' bits."""
    run, (tiles, units) = lines.flatten().tolist(), (starts.shape[0], starts.shape[1] - 1)
    weight = torch.zeros(tiles * UNIT_ROWS, units * numbers.unit_columns, dtype=torch.int64)
    for tile in range(tiles):
        for unit in range(units):
            begin = int(starts[tile, unit]) * LANES
            for lane in range(LANES):
                g, t, taken = lane // 4, lane % 4, 0
                for nibble in range(8 * numbers.bit_lines):
                    word = run[begin + nibble // 8 * LANES + lane]
                    s, j, r = nibble // 4, nibble // 2 % 2, nibble % 2
                    for i in range(4):
                        if word >> (4 * (nibble % 8) + i) & 1:
                            line, place = divmod(taken, numbers.per_word)
                            word_of_it = run[begin + (numbers.head + line) * LANES + lane]
                            row, column = 16 * tile + g + 8 * r, 32 * s + 8 * t + 4 * j + i
                            column += unit * numbers.unit_columns
                            own = word_of_it >> numbers.bits * place & (2**numbers.bits - 1)
                            weight[row, column] = own
                            taken += 1
    return weight


def test_lanes_find_the_weight() -> None:
    weight = weight_with_zeros(24, 300, 0.5)
    found = read_by_lanes(FLOATS, *arrange(FLOATS, weight != 0, weight[weight != 0]))
    assert found.shape == (32, 512)
    assert torch.equal(found[:24, :300].to(torch.int16).view(torch.bfloat16), weight)
    assert not found[24:].any() and not found[:, 300:].any()


def test_lanes_find_the_codes_and_their_scales() -> None:
    """codes.cuh: word (g, q) of the line behind the bits has the scales of rows g and g + 8."""
    codes, scales = codes_with_zeros(24, 600, 0.5)
    lines, starts = arrange(CODES, codes != 0, codes[codes != 0], scales)
    found = read_by_lanes(CODES, lines, starts)
    assert found.shape == (32, 1024)
    assert torch.equal((found[:24, :600] ^ 8) - 8, codes.long())
    assert not found[24:].any() and not found[:, 600:].any()
    pairs = lines.view(-1, LANES, 1).view(torch.bfloat16)
    for tile, unit, g, q, r in ((0, 0, 3, 2, 1), (0, 1, 7, 0, 0), (1, 1, 2, 0, 0), (1, 0, 0, 3, 0)):
        pair = pairs[int(starts[tile, unit]) + CODES.bit_lines, 4 * g + q]
        assert pair[r] == scales[16 * tile + g + 8 * r, 4 * unit + q]
    assert not pairs[int(starts[1, 0]) + CODES.bit_lines, :, 1].any()  # rows 24 to 31


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 600),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_is_arranged_is_restored(rows: int, columns: int, density: float, seed: int) -> None:
    weight = weight_with_zeros(rows, columns, density, seed)
    keep = weight != 0
    lines, starts = arrange(FLOATS, keep, weight[keep])
    kept, values, none = restore(FLOATS, lines, starts, rows, columns, weight.dtype)
    assert torch.equal(kept, keep) and none is None
    assert torch.equal(values.view(torch.int16), weight[keep].view(torch.int16))
    sizes = starts.diff(dim=1)
    assert torch.equal(starts[1:, 0], starts[:-1, -1]) and starts[0, 0] == 0
    assert lines.shape[1] == LANES * int(sizes.max()) and int(sizes.min()) >= FLOATS.head
    assert lines.numel() - LANES * int(starts[-1, -1]) < lines.shape[1]


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 600),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 99),
    of_rows=st.booleans(),
)
def test_codes_that_are_arranged_are_restored(
    rows: int, columns: int, density: float, seed: int, of_rows: bool
) -> None:
    codes, scales = codes_with_zeros(rows, columns, density, seed)
    given_ = scales[:, :1] if of_rows else scales
    lines, starts = arrange(CODES, codes != 0, codes[codes != 0], given_)
    kept, values, found = restore(CODES, lines, starts, rows, columns, scales.dtype)
    assert torch.equal(kept, codes != 0) and torch.equal(values, codes[kept])
    assert found is not None and torch.equal(found, given_.expand_as(scales))


def test_rows_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_with_zeros(100, 300, 0.4)
    keep = weight != 0
    codes, scales = codes_with_zeros(100, 300, 0.4)
    whole = arrange(FLOATS, keep, weight[keep])
    whole_codes = arrange(CODES, codes != 0, codes[codes != 0], scales)
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 32 * 300)
    parts = arrange(FLOATS, keep, weight[keep])
    assert all(map(torch.equal, whole, parts))
    kept, values, _ = restore(FLOATS, *parts, 100, 300, weight.dtype)
    assert torch.equal(kept, keep) and torch.equal(values, weight[keep])
    parts = arrange(CODES, codes != 0, codes[codes != 0], scales)
    assert all(map(torch.equal, whole_codes, parts))
    kept, values, found = restore(CODES, *parts, 100, 300, scales.dtype)
    assert torch.equal(values, codes[kept]) and found is not None and torch.equal(found, scales)


@pytest.mark.parametrize(("density", "bits"), [(0.5, 10.52), (0.3, 7.22), (0.2, 5.47)])
def test_the_lane_with_the_most_sets_the_lines(density: float, bits: float) -> None:
    """16 bits for each kept weight and 1 for each would be 9, 5.8 and 4.2."""
    weight = weight_with_zeros(256, 4096, density)
    lines, _ = arrange(FLOATS, weight != 0, weight[weight != 0])
    assert 8 * lines.nbytes / weight.numel() == pytest.approx(bits, rel=0.02)


@pytest.mark.parametrize(("density", "bits"), [(0.5, 3.455), (0.3, 2.62), (0.2, 2.21)])
def test_codes_take_this_many_bits(density: float, bits: float) -> None:
    """4 bits for each kept weight, 1 for each and 16 for 128 would be 3.125, 2.325 and 1.925."""
    codes, scales = codes_with_zeros(256, 4096, density)
    lines, _ = arrange(CODES, codes != 0, codes[codes != 0], scales)
    assert 8 * lines.nbytes / codes.numel() == pytest.approx(bits, rel=0.01)
