"""Cases and launch configs: the figures that the launch and the compiled kernel agree on."""

from dataclasses import replace

import pytest
import torch

from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import Case, LaunchConfig, bucket


def case(kind: Kind = Kind.INT4, tokens: int = 1, columns: int = 4096, rows: int = 4096) -> Case:
    return Case(kind, kind is Kind.INT4, torch.bfloat16, rows, columns, tokens)


RESIDENT = LaunchConfig(2, 4, 2, 1, 1, 4, 1)
STREAMED = LaunchConfig(2, 8, 1, 1, 1, 3, 1, x_stages=3, warpgroup=1)


@pytest.mark.parametrize(
    ("tokens", "most", "tiles", "pairs"),
    [
        *((1, 2, 1, 1), (2, 2, 1, 1), (3, 8, 1, 4), (8, 8, 1, 4), (9, 16, 2, 4), (16, 16, 2, 4)),
        *((17, 32, 4, 4), (32, 32, 4, 4), (33, 64, 8, 4), (64, 64, 8, 4)),
    ],
)
def test_tokens_share_a_kernel_in_buckets(tokens: int, most: int, tiles: int, pairs: int) -> None:
    assert bucket(tokens) == most
    assert (case(tokens=tokens).token_tiles, case(tokens=tokens).pairs) == (tiles, pairs)
    assert case(tokens=tokens).widest == case(tokens=most) == case(tokens=most).widest


def test_a_case_counts_tiles_and_units_and_has_a_name() -> None:
    padded = Case(Kind.FP8, False, torch.float16, 48, 320, 1)
    assert (padded.row_tiles, padded.units, padded.unit_bytes) == (3, 3, 1024 + 256)
    assert (case().row_tiles, case().units, case().unit_bytes) == (256, 32, 512 + 256 + 32)
    assert case(Kind.W16).unit_bytes == 2048 + 256
    assert padded.weight == "fp8 48x320"
    assert case(rows=4096, columns=14336).weight == "int4/128 4096x14336"
    assert replace(case(), grouped=False).weight == "int4 4096x4096"


def test_a_launch_config_is_written_and_read_again() -> None:
    config = LaunchConfig(1, 2, 3, 4, 5, 6, 0, 8, 1, 1, 7)
    assert str(config) == "1,2,3,4,5,6,0,8,1,1,7"
    assert LaunchConfig.parse(str(config)) == config
    assert LaunchConfig.parse(str(RESIDENT)) == RESIDENT
    for text in ("1,2,3", "1,2,3,4,5,6,0,8,1,1,1,1"):
        with pytest.raises(ValueError, match=f"a launch config needs 11 numbers, got '{text}'"):
            LaunchConfig.parse(text)
    with pytest.raises(ValueError, match="invalid literal"):
        LaunchConfig.parse("a,2,3,4,5,6,0,8,1,1,0")


def test_about_how_long_ctas_in_excess_stay() -> None:
    """20 of a CTA's bytes in a cycle, at most 4000 cycles; 2000 where the next come early."""
    config = LaunchConfig(4, 10, 1, 1, 2, 3, 3)
    assert config.with_stay(case()) == replace(
        config, stay=3
    )  # 32 / 4 units x 10 tiles x 800 bytes
    assert config.with_stay(case(Kind.W16)) == replace(config, stay=4)
    assert replace(config, cluster=8, stay=1).with_stay(case()) == replace(
        config, cluster=8, stay=2
    )
    assert replace(config, trigger=0).with_stay(case(Kind.W16)).stay == 2


def test_a_launch_config_counts_warps_clusters_and_steps() -> None:
    config = LaunchConfig(2, 4, 2, 3, 2, 4, 1)
    assert (config.warps, config.threads, config.tiles_of_cluster) == (8, 256, 12)
    assert config.clusters(case()) == 22  # 256 tiles of rows, 12 to each cluster
    assert config.steps(case()) == 4  # 32 units, in four slices, two at a time
    assert config.steps(case(columns=4160)) == 5  # 33 units: one slice has nine


def test_shared_memory_of_a_resident_launch_config() -> None:
    """Slack 128, the activations, eight rings of four stages, the sums of two parts."""
    ring = 8 * 4 * 896  # 800 bytes of a unit, aligned to 128
    sums = 2 * (2 * 2) * 16 * 2 * 4  # parts x slices x rows x two tokens in float32
    assert RESIDENT.shared_bytes(case(tokens=1)) == 128 + 4224 + ring + sums  # 16 x 256 + 16
    assert RESIDENT.shared_bytes(case(tokens=2)) == 128 + 8320 + ring + sums
    eight = 8 * (16 * 256 + 16)
    assert RESIDENT.shared_bytes(case(tokens=8)) == 128 + eight + ring + 2 * 4 * 18 * 8 * 4


def test_shared_memory_of_a_streamed_launch_config() -> None:
    """Slack 1024, three stages of 64 tokens x 128 columns, eight rings; sums take their place."""
    wide = case(Kind.W16, tokens=64)
    activations, ring = 3 * 64 * 256, 8 * 3 * 2304
    assert STREAMED.shared_bytes(wide) == 1024 + activations + ring
    shallow = replace(STREAMED, stages=1, x_stages=2, tiles=2)
    sums = (16 * 4 // 2) * 2 * 18 * 16 * 4  # a CTA's parts, two slices, 18 rows of 16 floats
    assert 2 * 64 * 256 + 8 * 2 * 2304 < sums  # two stages, and eight rings of one
    assert shallow.shared_bytes(wide) == 1024 + sums
    whole = replace(STREAMED, x_stages=0)  # resident and by warpgroups: 16 units, not padded
    assert whole.shared_bytes(wide) == 1024 + 16 * 64 * 256 + ring + 16 * 2 * 18 * 16 * 4


def test_two_blocks_where_memory_and_registers_allow() -> None:
    one = case(tokens=1)
    assert RESIDENT.registers(one) == 12 + (4 + 7) + 16
    assert RESIDENT.blocks(one) == 2
    assert replace(RESIDENT, ahead=1).registers(one) == 12 + (4 + 14) + 16
    assert replace(RESIDENT, warp_rows=8, tiles=5, stages=1).blocks(one) == 1  # 87 registers
    assert replace(RESIDENT, stages=16).blocks(one) == 1  # 119 KB
    wide = case(Kind.W16, tokens=64)
    assert STREAMED.registers(wide) == 12 + (32 + 19) + 48
    assert STREAMED.registers(case(tokens=64)) == 12 + (32 + 7) + 48 + 32  # a unit's own sums


def test_the_macros() -> None:
    macros = dict(RESIDENT.defines(case(tokens=2), portable=False))
    assert macros == {
        "INPUT": 0,
        "GATE": 0,
        "ADD": 0,
        "KIND": 3,
        "STRUCTURE": 0,
        "GROUP_SCALES": 1,
        "HALF": 0,
        "TOKEN_TILES": 1,
        "TOKEN_PAIRS": 1,
        "CLUSTER": 2,
        "WARP_ROWS": 4,
        "WARP_SPLITS": 2,
        "WARP_TILES": 1,
        "STEP_UNITS": 1,
        "STAGES": 4,
        "TRIGGER": 1,
        "STREAM": 0,
        "X_STAGES": 2,
        "WHOLE_STEPS": 1,
        "REFILL": 1,
        "CTAS_PER_SM": 2,
        "WGMMA": 0,
        "READ_AHEAD": 0,
        "STAY_KILOCYCLES": 0,
        "PORTABLE": 0,
    }
    half = replace(case(Kind.W16, tokens=64), dtype=torch.float16)
    macros = dict(STREAMED.defines(half, portable=True))
    found = {
        name: macros[name]
        for name in ("KIND", "GROUP_SCALES", "HALF", "TOKEN_TILES", "TOKEN_PAIRS")
    }
    assert found == {"KIND": 0, "GROUP_SCALES": 0, "HALF": 1, "TOKEN_TILES": 8, "TOKEN_PAIRS": 4}
    found = {name: macros[name] for name in ("STREAM", "X_STAGES", "WGMMA", "PORTABLE")}
    assert found == {"STREAM": 1, "X_STAGES": 3, "WGMMA": 1, "PORTABLE": 1}


def test_the_macros_of_a_part_that_is_not_whole() -> None:
    """33 units in four slices; and a weight so narrow that its ring is filled once."""
    assert dict(RESIDENT.defines(case(columns=4160), False))["WHOLE_STEPS"] == 0
    narrow = dict(RESIDENT.defines(case(columns=2048), False))
    assert (narrow["WHOLE_STEPS"], narrow["REFILL"]) == (1, 0)
