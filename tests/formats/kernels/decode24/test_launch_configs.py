"""The launch configs that are offered: each can be launched, and there is one for every layer."""

from dataclasses import replace

import pytest
import torch

from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import BUCKETS, REGISTERS, Case, LaunchConfig
from secateur.formats.kernels.decode24.launch_configs import MOST_BYTES, PORTABLE, launch_configs

H200 = {1: 132, 2: 66, 4: 30, 8: 15}
SMALLER_BLOCK = 99 * 1024  # of shared memory, for a CTA on sm_86 and sm_89


def case(kind: Kind, rows: int, columns: int, tokens: int) -> Case:
    return Case(kind, kind is Kind.INT4, torch.bfloat16, rows, columns, tokens)


@pytest.mark.parametrize("warpgroups", [True, False])
@pytest.mark.parametrize("tokens", BUCKETS)
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 14336), (28672, 4096)], ids=str)
def test_every_launch_config_can_be_launched(
    shape: tuple[int, int], kind: Kind, tokens: int, warpgroups: bool
) -> None:
    layer = case(kind, *shape, tokens)
    found = launch_configs(layer, H200, warpgroups)
    assert found and len(set(found)) == len(found)
    for config in found:
        assert config.shared_bytes(layer) + config.static_bytes <= MOST_BYTES
        assert config.threads * config.registers(layer) * config.blocks(layer) <= REGISTERS
        assert 4 <= config.warps <= (20 if config.warpgroup else 16)
        assert 1 <= config.stages <= config.steps(layer)
        assert config.clusters(layer) <= H200[config.cluster], "one wave"
        assert not config.warpgroup or (warpgroups and config.warp_rows % 4 == 0)
        assert not (config.x_stages and config.ahead)


def test_tokens_decide_what_is_tried() -> None:
    """One or two: no warpgroups, no streams, weights ahead; many: warpgroups alone."""
    few = launch_configs(case(Kind.INT4, 4096, 4096, 2), H200, True)
    assert {(config.warpgroup, config.x_stages) for config in few} == {(0, 0)}
    assert {config.ahead for config in few} == {0, 1}
    assert {
        config.ahead for config in launch_configs(case(Kind.W16, 4096, 4096, 2), H200, True)
    } == {0}
    some = launch_configs(case(Kind.INT4, 4096, 4096, 16), H200, True)
    assert {config.warpgroup for config in some} == {0, 1} and {
        config.x_stages for config in some
    } == {0, 3}
    many = launch_configs(case(Kind.INT4, 4096, 4096, 64), H200, True)
    assert {config.warpgroup for config in many} == {1} and {
        config.x_stages for config in many
    } >= {3, 4}
    assert {config.ahead for config in some + many} == {0}


@pytest.mark.parametrize("tokens", (2, 16, 64))
@pytest.mark.parametrize("shape", [(16, 64), (528, 1984), (128256, 4096)], ids=str)
def test_no_layer_is_without_a_launch_config(shape: tuple[int, int], tokens: int) -> None:
    """However small, ragged or large; on a device of another size, too."""
    layer = case(Kind.W16, *shape, tokens)
    found = launch_configs(layer, {1: 84, 2: 42, 4: 20, 8: 10}, True)
    assert all(config.shared_bytes(layer) + config.static_bytes <= MOST_BYTES for config in found)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_portable_launch_config_fits_every_device(kind: Kind) -> None:
    for tokens in BUCKETS:
        layer = case(kind, 4096, 14336, tokens)
        assert PORTABLE.shared_bytes(layer) + PORTABLE.static_bytes <= SMALLER_BLOCK
    # what the kernel's portable form asserts
    assert PORTABLE.cluster == 1 and PORTABLE.x_stages == PORTABLE.stages
    assert replace(PORTABLE, warpgroup=0, ahead=0) == PORTABLE == LaunchConfig.parse(str(PORTABLE))
