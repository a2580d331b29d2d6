"""The prefill kernels' sources, compiled for Hopper: sparse products of codes, and no spills."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.nvrtc import Source, compile_cubin
from secateur.formats.kernels.prefill24 import multiply
from secateur.formats.kernels.prefill24.arrange import COLUMNS, ROWS, TILE_BYTES
from secateur.formats.kernels.prefill24.multiply import (
    CLUSTER,
    MULTIPLY,
    QUANTISE,
    SHARED_BYTES,
    STAGES,
    THREADS,
    TOKENS,
    items_of,
)
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, CubinInfo, info

HOPPER = "sm_90a"
CODES = {torch.int8: "IGMMA.SP.64x256x64.S8.S8", torch.float8_e4m3fn: "QGMMA.SP.64x256x64.F32"}
DTYPES = (torch.bfloat16, torch.float16)
SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts
MOST_BYTES = 227 * 1024  # of shared memory, that a CTA may ask for
MOST_REGISTERS = 65536 // THREADS // 8 * 8  # 168: all of an SM's, in eights
BOTH = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("codes", CODES, ids=str),
]


def both(test: object) -> object:
    """A test of int8 and fp8 codes for bfloat16 and float16 layers."""
    for mark in BOTH:
        test = mark(test)
    return NEEDS_NVRTC(test)


KEY_OPCODES = ("MMA.", "STSM", "MEMBAR.ALL.GPU")


def compiled(
    source: Source, codes: torch.dtype, dtype: torch.dtype, folder: Path, **more: int
) -> CubinInfo:
    defines = (*multiply._defines(codes, dtype), *more.items())
    return info(compile_cubin(source, defines, HOPPER), folder)


@both
@pytest.mark.parametrize("activation", range(1 + len(multiply.ACTIVATIONS)))
def test_the_product_is_sparse_and_of_codes(
    activation: int, codes: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    more = {"CLUSTER": CLUSTER, "STAGES": STAGES, "ACTIVATION": activation}
    found = compiled(MULTIPLY, codes, dtype, tmp_path, **more)
    products = {opcode for opcode in found.opcodes if "MMA." in opcode}
    assert len(products) == 1 and all(opcode.startswith(CODES[codes]) for opcode in products)
    assert any(o.startswith("UTMALDG.2D.MULTICAST") for o in found.opcodes)
    assert found.stack_bytes == 0 and found.registers <= MOST_REGISTERS
    assert found.shared_bytes - SYSTEM_BYTES + SHARED_BYTES <= MOST_BYTES
    # A fence of the whole GPU comes with each release to another CTA, and would be waited for in
    # every step: there may be one, where all leave, behind the last multiplications and stores.
    order = {word: [n for n, o in enumerate(found.opcodes) if word in o] for word in KEY_OPCODES}
    assert len(order["MEMBAR.ALL.GPU"]) <= 1 and max(order["MMA."]) < max(order["STSM"])
    assert all(n > max(order["STSM"]) for n in order["MEMBAR.ALL.GPU"])
    exponentials = sum(opcode.startswith("MUFU.EX2") for opcode in found.opcodes)
    assert bool(exponentials) == (activation in (1, 2, 3))


@both
@pytest.mark.parametrize("width", [4096, multiply.LARGEST_WIDTH])
def test_a_token_is_held_in_registers(
    width: int, codes: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled(QUANTISE, codes, dtype, tmp_path, ITEMS=items_of(width))
    assert found.stack_bytes == 0
    read = [opcode for opcode in found.opcodes if opcode.startswith("LDG.E.128")]
    assert len(read) == items_of(width)  # once


@NEEDS_NVRTC
def test_sizes_on_both_sides_are_the_same(tmp_path: Path) -> None:
    """The constants of Python, asserted in the kernel's own source."""
    wanted = {
        "1023 + STAGES * STAGE_BYTES + 2 * CONSUMERS * OUT_BYTES": SHARED_BYTES,
        "ROWS": ROWS,
        "TOKENS": TOKENS,
        "COLUMNS": COLUMNS,
        "A_BYTES": TILE_BYTES,
        "THREADS": THREADS,
    }
    lines = [f"static_assert({name} == {value});" for name, value in wanted.items()]
    path = tmp_path / "kernel.cu"
    ring = (("CLUSTER", CLUSTER), ("STAGES", STAGES), ("ACTIVATION", 0))
    defines = (*multiply._defines(torch.int8, DTYPES[0]), *ring)
    path.write_text("\n".join((MULTIPLY.text(), *lines)))
    compile_cubin(replace(MULTIPLY, file=str(path)), defines, HOPPER)
    lines = [
        f"static_assert(THREADS == {multiply.QUANTISE_THREADS} && RUN == {multiply.RUN});",
    ]
    path.write_text("\n".join((QUANTISE.text(), *lines)))
    defines = (*multiply._defines(torch.int8, DTYPES[0]), ("ITEMS", 1))
    compile_cubin(replace(QUANTISE, file=str(path)), defines, HOPPER)
