"""The decode kernel's source, compiled for every architecture: its products, and no spills.

Not all combinations: every kind, dtype, number of tokens and way of feeding meets every
architecture's form at least once, in about a hundred kernels of a second each.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.choose import PACKAGED, STEP
from secateur.formats.kernels.decode24.config import (
    BUCKETS,
    PLAIN,
    Case,
    Fusion,
    LaunchConfig,
)
from secateur.formats.kernels.decode24.cost_model import by_cost_model
from secateur.formats.kernels.decode24.launch_configs import MOST_BYTES, PORTABLE
from secateur.formats.kernels.decode24.multiply import SOURCE
from secateur.formats.kernels.nvrtc import ARCHS, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, CubinInfo, info

BF16, HALF = torch.bfloat16, torch.float16
HOPPER = "sm_90a"
WITHOUT_CLUSTERS = ("sm_80", "sm_86", "sm_89")
KINDS = (
    *((Kind.W16, False), (Kind.INT8, False), (Kind.FP8, False), (Kind.INT4, True)),
    *((Kind.W16_48, False), (Kind.INT4_48, True), (Kind.INT8_ALL, False), (Kind.INT4_ALL, True)),
)
# A unit's multiplications by one token tile, and the permutations that put its numbers at columns.
MMA_OF_EIGHT, PERMUTES_OF_EIGHT = 8, {Kind.INT4_48: 32, Kind.W16_48: 64}
SAMPLE = 6
SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts
ALLOCATED_AT_ONCE = 128  # shared memory is rounded up to it


def layer(kind: Kind, grouped: bool, dtype: torch.dtype, tokens: int, columns: int = 4096) -> Case:
    return Case(kind, grouped, dtype, 4096, columns, tokens)


def ruled(arch: str) -> list[Case]:
    """Cases for an architecture: all kinds and buckets for Hopper, a diagonal for the others."""
    table = [
        layer(kind, grouped, (BF16, HALF)[(row + column) % 2], tokens)
        for row, (kind, grouped) in enumerate(KINDS)
        for column, tokens in enumerate(BUCKETS)
    ]
    start = ARCHS.index(arch)
    return table if arch == HOPPER else table[start :: len(BUCKETS) + 1]


COMPILED = [(arch, case) for arch in ARCHS for case in ruled(arch)]

# What a rule may never choose: by hand, for Hopper.
FED = {
    "resident, one CTA": (layer(Kind.W16, False, BF16, 8), LaunchConfig(1, 2, 4, 2, 1, 2, 2)),
    "resident, ahead": (
        layer(Kind.INT4, True, BF16, 2),
        LaunchConfig(2, 4, 2, 1, 2, 3, 0, ahead=1),
    ),
    "resident, ahead, fp8": (
        layer(Kind.FP8, False, HALF, 2),
        LaunchConfig(4, 4, 1, 2, 1, 4, 0, ahead=1),
    ),
    "resident, one scale": (layer(Kind.INT4, False, HALF, 16), LaunchConfig(2, 4, 2, 1, 1, 3, 1)),
    "resident, ragged": (layer(Kind.INT4, True, BF16, 16, 4160), LaunchConfig(2, 4, 2, 2, 2, 3, 1)),
    "streamed": (layer(Kind.FP8, False, BF16, 16), LaunchConfig(2, 4, 2, 1, 1, 3, 1, x_stages=3)),
    "streamed, ragged": (
        layer(Kind.INT8, False, HALF, 32, 4160),
        LaunchConfig(4, 4, 1, 2, 1, 3, 2, 3),
    ),
    "4:8, resident, ahead": (
        layer(Kind.INT4_48, True, BF16, 2),
        LaunchConfig(2, 4, 2, 1, 2, 3, 0, ahead=1),
    ),
    "4:8, one scale, ragged": (
        layer(Kind.INT4_48, False, HALF, 16, 4160),
        LaunchConfig(2, 4, 2, 1, 2, 3, 1),
    ),
    "4:8, streamed": (
        layer(Kind.INT4_48, True, BF16, 16),
        LaunchConfig(2, 4, 2, 1, 1, 3, 1, x_stages=3),
    ),
    "4:8, streamed, ragged": (
        layer(Kind.W16_48, False, HALF, 32, 4160),
        LaunchConfig(4, 4, 2, 1, 1, 3, 2, 3),
    ),
    "dense, resident, ahead": (
        layer(Kind.INT4_ALL, True, BF16, 2),
        LaunchConfig(2, 4, 2, 1, 2, 3, 0, ahead=1),
    ),
    "dense, one scale, ragged": (
        layer(Kind.INT4_ALL, False, HALF, 16, 4160),
        LaunchConfig(2, 4, 2, 1, 2, 3, 1),
    ),
    "dense, streamed, ragged": (
        layer(Kind.INT8_ALL, False, BF16, 32, 4160),
        LaunchConfig(4, 4, 2, 1, 1, 3, 2, 3),
    ),
    "warpgroup": (
        layer(Kind.INT8, False, BF16, 16),
        LaunchConfig(2, 4, 2, 1, 2, 3, 1, 0, warpgroup=1),
    ),
    "warpgroup, streamed": (
        layer(Kind.INT4, True, HALF, 64),
        LaunchConfig(8, 8, 1, 1, 1, 3, 1, 4, 1),
    ),
}


def compiled(case: Case, config: LaunchConfig, arch: str, folder: Path) -> CubinInfo:
    defines = config.defines(case, portable=arch in WITHOUT_CLUSTERS)
    return info(compile_cubin(SOURCE, defines, arch), folder)


def cut_for(case: Case, arch: str) -> LaunchConfig:
    """What `choose` takes without a table."""
    if arch in WITHOUT_CLUSTERS:
        return PORTABLE
    return by_cost_model(case, 132, warpgroups=arch == HOPPER)


def products(found: CubinInfo) -> set[str]:
    """The kinds of matrix instruction, without their types and shapes: `HMMA.SP`."""
    return {".".join(o.split(".")[:2]) for o in found.opcodes if re.match(r"[A-Z]+MMA\.", o)}


def expected(case: Case, config: LaunchConfig) -> set[str]:
    """Sparse products, by warps or warpgroups as the config says; dense ones of other kinds."""
    if case.kind.on_dense_cores:
        return {"HMMA.16816"}
    return {"HGMMA.SP" if config.warpgroup else "HMMA.SP"}


def check_hopper(case: Case, config: LaunchConfig, found: CubinInfo) -> None:
    """Only the products that the case is for; bulk copies; no spills."""
    assert products(found) == expected(case, config)
    assert any(opcode.startswith("UBLKCP") for opcode in found.opcodes)
    assert found.stack_bytes == 0
    assert found.shared_bytes <= SYSTEM_BYTES + config.static_bytes + ALLOCATED_AT_ONCE


def test_the_cases_cover_what_they_should() -> None:
    assert len(COMPILED) + len(FED) + SAMPLE < 100
    for kinds in (KINDS, [(kind, dtype) for kind, _ in KINDS for dtype in (BF16, HALF)]):
        assert len(kinds) == len(set(kinds))
    assert {(case.kind, case.dtype) for arch, case in COMPILED if arch == HOPPER} == {
        (kind, dtype) for kind in Kind for dtype in (BF16, HALF)
    }
    others = [case for arch, case in COMPILED if arch != HOPPER]
    assert {case.kind for case in others} == set(Kind)
    assert {case.dtype for case in others} == {BF16, HALF}
    assert {case.tokens for case in others} == set(BUCKETS)
    assert {arch for arch, _ in COMPILED} == set(ARCHS)


@NEEDS_NVRTC
@pytest.mark.parametrize(("arch", "case"), COMPILED, ids=lambda value: _name(value))
def test_it_compiles_to_its_products(arch: str, case: Case, tmp_path: Path) -> None:
    config = cut_for(case, arch)
    found = compiled(case, config, arch, tmp_path)
    assert found.sparse_mma != case.kind.on_dense_cores
    if arch == HOPPER:
        check_hopper(case, config, found)
    else:
        assert products(found) == expected(case, config)
        bulk = any(opcode.startswith("UBLKCP") for opcode in found.opcodes)
        assert bulk == (arch not in WITHOUT_CLUSTERS)


@NEEDS_NVRTC
@pytest.mark.parametrize("name", FED)
def test_every_way_of_feeding_compiles(name: str, tmp_path: Path) -> None:
    case, config = FED[name]
    assert config.shared_bytes(case) + config.static_bytes <= MOST_BYTES
    check_hopper(case, config, compiled(case, config, HOPPER, tmp_path))


@NEEDS_NVRTC
@pytest.mark.parametrize("kind", PERMUTES_OF_EIGHT)
def test_what_it_takes_to_put_numbers_at_their_columns(kind: Kind, tmp_path: Path) -> None:
    """For each multiplication of of_eight.cuh's table: no selector by other means, no shuffle."""
    case = layer(kind, kind is Kind.INT4_48, BF16, 8)
    found = compiled(case, LaunchConfig(1, 4, 1, 1, 1, 2, 1), HOPPER, tmp_path)
    count = {name: sum(o.split(".")[0] == name for o in found.opcodes) for name in ("HMMA", "PRMT")}
    units = count["HMMA"] / MMA_OF_EIGHT  # the loop is unrolled
    assert units == 2 and count["PRMT"] - units * PERMUTES_OF_EIGHT[kind] in range(8)
    assert not any(o.startswith("SHFL") for o in found.opcodes)


@NEEDS_NVRTC
def test_the_portable_form_is_checked_by_the_compiler() -> None:
    """A launch config with clusters, or one that reads ahead, is refused and not run wrongly."""
    case = layer(Kind.INT4, True, BF16, 2)
    for config in (
        LaunchConfig(2, 4, 2, 1, 1, 3, 1, 3),
        LaunchConfig(1, 4, 2, 1, 1, 3, 1, 3, ahead=1),
    ):
        with pytest.raises(RuntimeError, match=r"kernel\.cu did not compile for sm_80"):
            compile_cubin(SOURCE, config.defines(case, portable=True), "sm_80")


BEHIND = {None: "", "4:8 ": "_48", "dense ": "_ALL"}


def packaged() -> list[tuple[Case, LaunchConfig]]:
    """Every case with its launch config in the table that comes with the package."""
    if not PACKAGED.exists():
        return []
    found = []
    for weights in json.loads(PACKAGED.read_text(encoding="utf-8")).values():
        for weight, configs in weights.items():
            match = re.fullmatch(r"(4:8 |dense )?(w16|int8|fp8|int4)(/128)? (\d+)x(\d+)", weight)
            assert match is not None, weight
            kind = Kind[match[2].upper() + BEHIND[match[1]]]
            grouped = match[3] is not None
            for tokens, text in configs.items():
                most = BUCKETS[0] if tokens == STEP else int(tokens)
                case = Case(kind, grouped, BF16, int(match[4]), int(match[5]), most)
                assert case.weight == weight
                found.append((case, LaunchConfig.parse(text)))
    return found


PACKAGED_CONFIGS = packaged()
NEEDS_TABLE = pytest.mark.skipif(not PACKAGED_CONFIGS, reason="decode24/tuned.json is not here yet")


@NEEDS_TABLE
def test_every_packaged_launch_config_fits() -> None:
    for case, config in PACKAGED_CONFIGS:
        assert case == case.widest, "tables hold the most tokens of a bucket"
        assert config.shared_bytes(case) + config.static_bytes <= MOST_BYTES, (case, config)
        assert 4 <= config.warps <= 32 and not (config.warpgroup and config.warp_rows % 4), (
            case,
            config,
        )


@NEEDS_NVRTC
@NEEDS_TABLE
@pytest.mark.parametrize("number", range(SAMPLE))
def test_packaged_launch_configs_do_not_spill(number: int, tmp_path: Path) -> None:
    case, config = PACKAGED_CONFIGS[number * len(PACKAGED_CONFIGS) // SAMPLE]
    check_hopper(case, config, compiled(case, config, HOPPER, tmp_path))


# What the launches of a step of Llama-3-8B do, and two that are harder on the registers.
FUSED = {
    "q, k, v": ("int4/128 6144x4096", STEP, Fusion(normed=True)),
    "out": ("int4/128 4096x4096", STEP, Fusion(adds=True)),
    "gate, up": ("int4/128 28672x4096", STEP, Fusion(normed=True)),
    "down": ("int4/128 4096x14336", STEP, Fusion(gate="silu", adds=True)),
    "gelu": ("int4/128 4096x14336", STEP, Fusion(gate="gelu", adds=True)),
    "16 bits": ("w16 6144x4096", "2", Fusion(normed=True)),
}


@NEEDS_NVRTC
@NEEDS_TABLE
@pytest.mark.parametrize("name", FUSED)
def test_fused_launches_do_not_spill(name: str, tmp_path: Path) -> None:
    weight, key, fusion = FUSED[name]
    (table,) = json.loads(PACKAGED.read_text(encoding="utf-8")).values()
    config = LaunchConfig.parse(table[weight][key])
    (case,) = {case for case, one in PACKAGED_CONFIGS if case.weight == weight and one == config}
    assert config.why_not_fused(case, fusion) is None
    found = info(compile_cubin(SOURCE, config.defines(case, False, fusion), HOPPER), tmp_path)
    assert found.stack_bytes == 0 and found.sparse_mma


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ["sm_100a", "sm_120a"])
def test_fused_launches_spill_no_more_than_plain_ones(arch: str, tmp_path: Path) -> None:
    for kind, grouped in (KINDS[0], KINDS[3], *KINDS[4:]):
        case = layer(kind, grouped, BF16, 2)
        config = by_cost_model(case, 132, warpgroups=False)
        plain, fused = (
            info(compile_cubin(SOURCE, config.defines(case, False, fusion), arch), tmp_path)
            for fusion in (PLAIN, Fusion(gate="silu", adds=True))
        )
        assert fused.stack_bytes <= plain.stack_bytes, config


def test_fusions_that_a_config_cannot_do() -> None:
    case, config = layer(Kind.INT4, True, BF16, 2), LaunchConfig(2, 4, 2, 1, 2, 3, 0)
    normed, gated = Fusion(normed=True), Fusion(gate="silu")
    assert config.why_not_fused(case, normed) is None
    eight = layer(Kind.INT4, True, BF16, 8)
    assert config.why_not_fused(eight, gated) == "at most 2 tokens are fused, got 8"
    assert config.why_not_fused(eight, PLAIN) is None
    streamed = replace(config, x_stages=3)
    told = streamed.why_not_fused(case, gated)
    assert told == "its inputs do not lie whole in shared memory"
    half = layer(Kind.INT4, True, HALF, 2)
    told = config.why_not_fused(half, normed)
    assert told == "a stream times the norm's weight can leave float16's range"
    assert config.why_not_fused(half, gated) is None


def _name(value: object) -> str:
    if not isinstance(value, Case):
        return str(value)
    dtype = "fp16" if value.dtype == HALF else "bf16"
    return f"{value.kind.name.lower()} {dtype} {value.tokens} tokens"
