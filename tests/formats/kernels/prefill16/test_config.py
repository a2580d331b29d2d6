"""Which tile is chosen, and what of it lies in shared memory."""

import pytest
import torch

from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.prefill16.config import (
    MOST_BYTES,
    TILES,
    Tile,
    choose,
    clocks,
    with_stages,
)

SMS = 132  # of an H200


def case(tokens: int, rows: int = 4096, columns: int = 4096, kind: Kind = Kind.INT4) -> Case:
    return Case(kind, kind is Kind.INT4, torch.bfloat16, rows, columns, tokens)


def bare(tile: Tile) -> tuple[int, ...]:
    return (tile.blocks, tile.tokens, tile.splits)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_fits_with_room_to_copy_ahead(tile: Tile, kind: Kind) -> None:
    of = case(4096, kind=kind)
    full = with_stages(tile, of)
    assert bare(full) == bare(tile)
    assert full.b_stages >= 4 and full.a_stages >= 2 and full.out_buffers >= 1
    assert full.shared_bytes(of.unit_bytes) <= MOST_BYTES - 2048


def test_many_tokens_are_taken_256_at_a_time() -> None:
    for tokens in (2048, 4096, 16384):
        assert choose(case(tokens), SMS).tokens == 256


def test_few_tokens_fill_the_device_by_splitting_columns() -> None:
    chosen = choose(case(128), SMS)
    assert chosen.splits == 2 and chosen.tokens <= 128
    assert choose(case(128, rows=65536), SMS).splits == 1  # enough rows


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [(28672, 4096, (2, 64, 1)), (6144, 4096, (1, 64, 2)), (4096, 14336, (1, 64, 3))],
)
def test_64_tokens_take_the_tile_that_was_measured_fastest(
    rows: int, columns: int, tile: tuple[int, ...]
) -> None:
    """docs/log/2026-11-30-prefill-from-units.md"""
    assert bare(choose(case(64, rows, columns), SMS)) == tile


def test_clusters_of_three_leave_sms_over() -> None:
    """39 fitted an H200, not 44: with 40 tiles they work twice."""
    one, two = (clocks(Tile(1, 64, 3), case(64, rows=128 * n), SMS) for n in (39, 40))
    assert two == 2 * one


def test_a_part_is_as_large_as_leaves_each_cta_as_many() -> None:
    parts = {(1, 256, 2): 64, (1, 96, 3): 32, (1, 160, 2): 16, (1, 192, 3): 64, (2, 64, 4): 32}
    assert {key: Tile(*key).out_tokens for key in parts} == parts
    assert Tile(1, 64, 3).out_tokens == 16  # four parts for three


def test_one_unit_of_columns_is_not_split() -> None:
    assert choose(case(65, columns=64), SMS).splits == 1


def test_the_choice_is_the_least_of_the_model() -> None:
    of = case(1000, rows=6144)
    chosen = choose(of, SMS)
    least = min(clocks(tile, of, SMS) for tile in TILES)
    assert least == min(clocks(tile, of, SMS) for tile in TILES if bare(tile) == bare(chosen))


def test_time_grows_by_waves() -> None:
    """A tile more than the SMs hold costs as much as all of them did."""
    tile = TILES[0]
    one, two = (clocks(tile, case(256, rows=128 * n), SMS) for n in (SMS, SMS + 1))
    assert two == 2 * one == 2 * clocks(tile, case(256, rows=128), SMS)
