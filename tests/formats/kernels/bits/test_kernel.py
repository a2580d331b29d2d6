"""The sources of the kernels for bits, compiled for every architecture: products, and no spills."""

from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.bits import CODES, FLOATS, Numbers
from secateur.formats.kernels.bits.multiply import (
    DECODE,
    EXPAND,
    EXPAND_WARPS,
    MOST_BYTES,
    MOST_BYTES_PORTABLE,
    Config,
    expand_defines,
)
from secateur.formats.kernels.nvrtc import ARCHS, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, info

WITHOUT_BULK_COPIES = ("sm_80", "sm_86", "sm_89")
SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts from Hopper on
# Instructions for the weights of a lane in one product, 4 x 2 of them: what the speed rests on.
FAST = {FLOATS: 32, CODES: 20}
NUMBERS = pytest.mark.parametrize("numbers", [FLOATS, CODES], ids=["floats", "codes"])


@NEEDS_NVRTC
@NUMBERS
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_few_tokens_compile_to_products(
    arch: str, dtype: torch.dtype, tokens: int, numbers: Numbers, tmp_path: Path
) -> None:
    config, portable = Config(2, 8), arch in WITHOUT_BULK_COPIES
    code = compile_cubin(DECODE, config.defines(numbers, dtype, tokens, portable), arch)
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
@NUMBERS
def test_a_product_takes_few_instructions(numbers: Numbers, tmp_path: Path) -> None:
    code = compile_cubin(DECODE, Config(2, 8).defines(numbers, torch.bfloat16, 8, False), "sm_90a")
    opcodes = info(code, tmp_path).opcodes
    places = [place for place, opcode in enumerate(opcodes) if opcode.startswith("HMMA")]
    of_loop = places[7] - places[0]  # seven of the eight products of two lines
    assert of_loop <= FAST[numbers] * 7


@NEEDS_NVRTC
@NUMBERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_dense_weight_is_stored_by_16_bytes(
    arch: str, dtype: torch.dtype, numbers: Numbers, tmp_path: Path
) -> None:
    portable = arch in WITHOUT_BULK_COPIES
    code = compile_cubin(EXPAND, expand_defines(numbers, dtype, portable), arch)
    found = info(code, tmp_path)
    stores = [opcode for opcode in found.opcodes if opcode.startswith("STG")]
    assert stores and all(".128" in opcode for opcode in stores)
    assert found.stack_bytes == 0


def test_the_largest_unit_fits() -> None:
    """No zeros at all: 16 x 256 numbers and their bits; 16 x 512 codes, a line of scales."""
    stage, one = 2 * 16 * 256 + 16 * 256 // 8, Config(1, 1)
    assert one.shared_bytes(FLOATS, stage) + one.static_bytes(16) < 48 * 1024
    assert EXPAND_WARPS * stage < 48 * 1024 < MOST_BYTES
    stage = 16 * 512 // 2 + 16 * 512 // 8 + 128
    assert one.shared_bytes(CODES, stage) + one.static_bytes(16) < MOST_BYTES_PORTABLE
    assert EXPAND_WARPS * stage < 48 * 1024
