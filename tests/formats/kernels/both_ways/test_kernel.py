"""The source of the kernel that packs both ways, compiled for every architecture, and its order."""

from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.both_ways import Selection
from secateur.formats.kernels.both_ways.pack import SOURCE, THREADS, defines
from secateur.formats.kernels.nvrtc import ARCHS, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, info

SYSTEM_BYTES = 1024  # of each CTA's shared memory, which cuobjdump counts from Hopper on
MOST_STATIC_BYTES = 48 * 1024
REGISTERS = 65536  # of an SM
LEAST_CTAS = 3  # of an SM, so that some load while others choose
FAST = 750  # instructions for a tile of 4 x 4, with what is once for four of them


@NEEDS_NVRTC
@pytest.mark.parametrize("selection", Selection, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_it_reads_and_writes_by_16_bytes_without_spills(
    arch: str, dtype: torch.dtype, stored: torch.dtype, selection: Selection, tmp_path: Path
) -> None:
    stored = dtype if stored == torch.bfloat16 else stored
    found = info(compile_cubin(SOURCE, defines(stored, dtype, selection), arch), tmp_path)
    assert found.stack_bytes == 0
    assert found.registers * THREADS * LEAST_CTAS <= REGISTERS
    assert found.shared_bytes <= MOST_STATIC_BYTES + SYSTEM_BYTES
    moves = [o for o in found.opcodes if o.startswith(("LDG", "STG"))]
    assert moves and all(".128" in opcode for opcode in moves)
    if arch == "sm_90a":
        assert len(found.opcodes) <= 2 * FAST
