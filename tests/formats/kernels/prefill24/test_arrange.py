"""The arranged bytes, read as the kernel's lanes read them, are the weight again."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.kernels.prefill24.arrange import COLUMNS, ROWS, TILE_BYTES, arrange, restore
from secateur.formats.quantised.codes import codes_of
from secateur.patterns import NM, Fp8, Int8
from secateur.patterns.grids import Grid
from tests.formats.weights import fitting_weight, random_metadata

FORMATS = {"semi24_int8_dynamic": Int8(), "semi24_fp8_dynamic": Fp8()}
SHAPES = ((16, 16), (128, 128), (144, 240), (272, 128), (128, 272), (400, 1296))


def read_back(tiles: Tensor) -> Tensor:
    """The dense codes as bytes: every lane's registers, placed by the metadata of its quad."""
    data = tiles.numpy()
    count, blocks, _ = data.shape
    dense = np.zeros((count, ROWS, blocks, COLUMNS), dtype=np.uint8)
    tile, block = np.ogrid[:count, :blocks]
    for group, step, warp, lane, i in product(range(2), range(2), range(4), range(32), range(4)):
        g, t = lane // 4, lane % 4
        register = 4096 * group + 2048 * step + 512 * warp + 16 * lane + 4 * i
        row = 64 * group + 16 * warp + g + 8 * (i % 2)
        for byte in range(4):
            kept = 16 * (i // 2) + 4 * t + byte  # of the 32 of this step's 64 columns
            four = kept // 2  # of the step's 16 groups of four columns
            holder = 4 * g + i % 2 + 2 * (four // 8)  # the lane that has these nibbles
            word = 8192 + 1024 * group + 256 * warp + 8 * holder + 4 * step
            nibble = data[:, :, word + four % 8 // 2] >> 4 * (four % 2) & 15
            assert ((nibble & 3) < nibble >> 2).all(), "two places that ascend"
            place = nibble >> 2 * (kept % 2) & 3
            column = 64 * step + 4 * four + place
            assert not dense[tile, row, block, column].any(), "nothing is there yet"
            dense[tile, row, block, column] = data[:, :, register + byte]
    return torch.from_numpy(dense.reshape(count * ROWS, blocks * COLUMNS))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_lanes_read_the_weight(format: str, shape: tuple[int, int]) -> None:
    """Beyond its rows and columns they read zeros."""
    rows, columns = shape
    packed = parse_format(format).pack(fitting_weight(format, rows, columns, torch.bfloat16))
    entries = parse_format(format).implementations
    tiles = next(entry for entry in entries if entry.name == "prefill").arranged(packed)["tiles"]
    assert tiles.shape == (-(-rows // ROWS), -(-columns // COLUMNS), TILE_BYTES)
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
    expected = codes_of(FORMATS[format], NM(2, 4), packed).view(torch.uint8)
    assert 2 * int(expected.count_nonzero()) > 0.9 * expected.numel()
    dense = read_back(tiles)
    assert torch.equal(dense[:rows, :columns], expected)
    assert not dense[rows:].any() and not dense[:, columns:].any()


def test_tiles_of_one_row_of_tiles_lie_together() -> None:
    """A CTA reads the blocks of its rows one after another."""
    codes = torch.arange(1, 5, dtype=torch.int8).view(2, 1, 2, 1).expand(2, ROWS, 2, COLUMNS // 2)
    metadata = torch.full((2 * ROWS, 2 * COLUMNS // 8), 0b1110_1110, dtype=torch.uint8)
    tiles = arrange(codes.reshape(2 * ROWS, COLUMNS), metadata)
    values = ROWS * COLUMNS // 2
    assert [[set(b.tolist()) for b in t] for t in tiles[:, :, :values]] == [[{1}, {2}], [{3}, {4}]]
    assert set(tiles[:, :, values:].flatten().tolist()) == {0b1110_1110}


def held_to_the_weight(grid: Grid, shape: tuple[int, int], seed: int, device: str) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (rows, columns // 2), generator=generator).to(torch.uint8)
    codes = bits.view(grid.code_dtype).to(device)
    metadata = random_metadata(rows, columns, seed).to(device)
    tiles = arrange(codes, metadata)
    found, places = restore(tiles, shape, grid.code_dtype)
    assert found.dtype == grid.code_dtype and found.is_contiguous() and places.is_contiguous()
    assert torch.equal(found.view(torch.uint8).cpu(), bits)
    assert torch.equal(places, metadata)


@given(
    grid=st.sampled_from((Int8(), Fp8())),
    rows=st.integers(1, 300),
    groups=st.integers(1, 100),  # of four columns
    seed=st.integers(0, 2**16),
)
def test_what_was_arranged_is_restored(grid: Grid, rows: int, groups: int, seed: int) -> None:
    """Bit for bit, whatever the size: the metadata's last byte may be half a byte."""
    held_to_the_weight(grid, (rows, 4 * groups), seed, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_arranged_is_restored_on_a_gpu(format: str) -> None:
    held_to_the_weight(FORMATS[format], (400, 1296), 0, "cuda")
