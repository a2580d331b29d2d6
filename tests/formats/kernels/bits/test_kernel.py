"""The sources of the kernels for bits, compiled for every architecture: products, and no spills."""

from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.bits.multiply import (
    DECODE,
    EXPAND,
    EXPAND_WARPS,
    MOST_BYTES,
    Config,
    expand_defines,
)
from secateur.formats.kernels.nvrtc import ARCHS, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, info

WITHOUT_BULK_COPIES = ("sm_80", "sm_86", "sm_89")
SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts from Hopper on
FAST = 16  # instructions for a nibble of a lane: what the kernel's speed rests on


@NEEDS_NVRTC
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_few_tokens_compile_to_products(
    arch: str, dtype: torch.dtype, tokens: int, tmp_path: Path
) -> None:
    config, portable = Config(2, 8), arch in WITHOUT_BULK_COPIES
    code = compile_cubin(DECODE, config.defines(dtype, tokens, portable), arch)
    found = info(code, tmp_path)
    letter = "BF16" if dtype == torch.bfloat16 else "F32"
    products = [opcode for opcode in found.opcodes if opcode.startswith("HMMA.16816.F32")]
    assert len(products) == (8 + 8 + 4) * tokens // 8  # two lines of a unit, and one at its end
    assert all(opcode.endswith(letter) for opcode in products)
    assert found.stack_bytes == 0 and found.registers <= 128  # 16 warps
    assert found.shared_bytes <= config.static_bytes(tokens) + SYSTEM_BYTES
    assert any(opcode.startswith("UBLKCP") for opcode in found.opcodes) == (not portable)
    assert any(opcode.startswith("ACQBULK") for opcode in found.opcodes) == (not portable)


@NEEDS_NVRTC
def test_a_nibble_takes_few_instructions(tmp_path: Path) -> None:
    code = compile_cubin(DECODE, Config(2, 8).defines(torch.bfloat16, 8, False), "sm_90a")
    opcodes = info(code, tmp_path).opcodes
    places = [place for place, opcode in enumerate(opcodes) if opcode.startswith("HMMA")]
    of_loop = places[7] - places[0]  # seven of the eight products of two lines
    assert of_loop <= FAST * 2 * 7


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ARCHS)
def test_the_dense_weight_is_stored_by_16_bytes(arch: str, tmp_path: Path) -> None:
    portable = arch in WITHOUT_BULK_COPIES
    found = info(compile_cubin(EXPAND, expand_defines(portable), arch), tmp_path)
    stores = [opcode for opcode in found.opcodes if opcode.startswith("STG")]
    assert stores and all(".128" in opcode for opcode in stores)
    assert found.stack_bytes == 0


def test_the_largest_unit_fits() -> None:
    """No zeros at all: 16 x 256 numbers and their bits."""
    stage = 2 * 16 * 256 + 16 * 256 // 8
    assert Config(1, 1).shared_bytes(stage) + Config(1, 1).static_bytes(16) < 48 * 1024
    assert EXPAND_WARPS * stage < 48 * 1024 < MOST_BYTES
