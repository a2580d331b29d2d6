"""The prefill kernel's source, compiled for Hopper: sparse products from registers, no spills."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.decode24.arrange import Kind, unit_bytes
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.nvrtc import compile_cubin
from secateur.formats.kernels.prefill16.config import MOST_BYTES, THREADS, TILES, Tile, with_stages
from secateur.formats.kernels.prefill16.multiply import SOURCE
from secateur.formats.kernels.prefill24.multiply import ACTIVATIONS
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, CubinInfo, info

BF16, HALF = torch.bfloat16, torch.float16
HOPPER = "sm_90a"
SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts
NUMBERS = [
    (kind, grouped, dtype)
    for kind, grouped in (
        (Kind.W16, False),
        (Kind.INT8, False),
        (Kind.FP8, False),
        (Kind.INT4, False),
        (Kind.INT4, True),
    )
    for dtype in (BF16, HALF)
]
# Every tile with some numbers, and the largest with all of them.
COMPILED = [(NUMBERS[3 * place % len(NUMBERS)], tile) for place, tile in enumerate(TILES)]
COMPILED += [(numbers, TILES[0]) for numbers in NUMBERS]


def full(tile: Tile, kind: Kind, grouped: bool, dtype: torch.dtype) -> Tile:
    return with_stages(tile, Case(kind, grouped, dtype, 4096, 4096, 4096))


def compiled(
    tile: Tile, numbers: tuple[Kind, bool, torch.dtype], folder: Path, activation: int = 0
) -> CubinInfo:
    code = compile_cubin(SOURCE, full(tile, *numbers).defines(*numbers, activation), HOPPER)
    return info(code, folder)


@NEEDS_NVRTC
@pytest.mark.parametrize(("numbers", "tile"), COMPILED, ids=str)
def test_it_compiles_to_sparse_products(
    numbers: tuple[Kind, bool, torch.dtype], tile: Tile, tmp_path: Path
) -> None:
    found = compiled(tile, numbers, tmp_path)
    products = {opcode for opcode in found.opcodes if re.match(r"[A-Z]+MMA\.", opcode)}
    wanted = f"HGMMA.SP.64x{tile.tokens}x32.F32"
    assert products and all(opcode.startswith(wanted) for opcode in products)
    assert found.stack_bytes == 0
    kind, grouped, _ = numbers
    dynamic = full(tile, *numbers).shared_bytes(unit_bytes(kind, grouped))
    assert found.shared_bytes - SYSTEM_BYTES + dynamic <= MOST_BYTES
    assert any(o.startswith("UTMALDG.3D") for o in found.opcodes)  # units
    assert any(o.startswith("UTMALDG.2D") for o in found.opcodes)  # tokens
    assert any(o.startswith("UTMASTG.2D") for o in found.opcodes)  # results


@NEEDS_NVRTC
@pytest.mark.parametrize("activation", range(1, 1 + len(ACTIVATIONS)))
def test_activations_do_not_spill(activation: int, tmp_path: Path) -> None:
    found = compiled(TILES[0], (Kind.INT4, True, BF16), tmp_path, activation)
    assert found.stack_bytes == 0
    exponentials = sum(opcode.startswith("MUFU.EX2") for opcode in found.opcodes)
    assert bool(exponentials) == (activation in (1, 2, 3))


@NEEDS_NVRTC
@pytest.mark.parametrize("tile", [TILES[0], TILES[2], TILES[3], Tile(2, 64, 1)], ids=str)
def test_no_multiplication_is_waited_for_alone(tile: Tile, tmp_path: Path) -> None:
    """The assembler waits for each one if it finds too few registers to keep two apart."""
    numbers = (Kind.INT4, True, BF16)
    code = compile_cubin(SOURCE, full(tile, *numbers).defines(*numbers, 0), HOPPER)
    opcodes = info(code, tmp_path).opcodes
    products = sum("GMMA" in opcode for opcode in opcodes)
    waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
    # a unit begun, two in the loop: a wait for each of their steps but the first, and one behind
    assert products == 3 * 4 * tile.blocks and waits == 3 * 4 - 1 + 1


@NEEDS_NVRTC
def test_sizes_on_both_sides_are_the_same(tmp_path: Path) -> None:
    """The constants of Python, asserted in the kernel's own source."""
    kind, grouped, _ = numbers = (Kind.W16, False, BF16)
    for bare in (TILES[1], TILES[2], Tile(1, 64, 2), Tile(1, 64, 3), Tile(2, 96, 4)):
        tile = full(bare, *numbers)
        wanted = {
            "1023 + B_STAGES * B_BYTES + A_STAGES * A_BYTES + CONSUMERS * "
            "(OUT_BUFFERS * OUT_BYTES + (SPLITS - 1) * SUM_BYTES)": tile.shared_bytes(
                unit_bytes(kind, grouped)
            ),
            "ROWS": tile.rows,
            "OUT_TOKENS": tile.out_tokens,
            "THREADS": THREADS,
            "UNIT_BYTES": unit_bytes(kind, grouped),
        }
        lines = [f"static_assert({name} == {value});" for name, value in wanted.items()]
        path = tmp_path / "kernel.cu"
        path.write_text("\n".join((SOURCE.text(), *lines)))
        compile_cubin(replace(SOURCE, file=str(path)), tile.defines(*numbers, 0), HOPPER)
