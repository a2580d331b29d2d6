"""The kernels between the linear layers, compiled for every architecture that can run them."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from secateur.formats.kernels.decode_step.append import SOURCE as APPEND
from secateur.formats.kernels.decode_step.append import defines as append_defines
from secateur.formats.kernels.decode_step.attention import (
    NUMBERS,
    SOURCE,
    STAGE_BYTES,
    STAGES,
    Attention,
    defines,
    shares,
)
from secateur.formats.kernels.decode_step.between import FILE, HEADERS
from secateur.formats.kernels.nvrtc import Source, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, _output, info

ARCHS = ("sm_90a", "sm_100a", "sm_120a")  # those with clusters and dependent launch
HALF_AN_SM = 114 * 1024
REGISTERS = 65536  # of an SM


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", [64, 128, 256])
def test_attention_leaves_room_for_the_kernel_behind(arch: str, head: int, tmp_path: Path) -> None:
    kinds = ((1, False, 0.0), (8, True, 30.0), (4, False, 0.0))
    for (queries, normed, cap), cluster in product(kinds, (1, 8)):
        what = Attention(2 * queries, 2, head, 0.1, cap=cap, normed=normed)
        dtype = torch.bfloat16 if cluster == 8 else torch.float16
        code = compile_cubin(SOURCE, defines(what, queries, cluster, dtype), arch)
        found = info(code, tmp_path)
        beside = REGISTERS // 2 // (NUMBERS // head)  # of a thread, where two CTAs share an SM
        assert found.stack_bytes == 0 and found.registers <= beside, (what, cluster)
        assert found.shared_bytes + STAGES * STAGE_BYTES <= 2 * HALF_AN_SM


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("entry", ["add_norm", "gated", "choose"])
def test_the_others_do_not_spill(arch: str, entry: str, tmp_path: Path) -> None:
    for half, gate in ((0, 0), (1, 2)):
        code = compile_cubin(Source(FILE, entry, HEADERS), (("HALF", half), ("GATE", gate)), arch)
        assert stack_of(code, entry, tmp_path) == 0


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", [64, 128, 256])
def test_append_does_not_spill(arch: str, head: int, tmp_path: Path) -> None:
    for normed, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        what = Attention(4, 2, head, 0.1, normed=normed)
        code = compile_cubin(APPEND, append_defines(what, dtype), arch)
        assert info(code, tmp_path).stack_bytes == 0


def stack_of(code: bytes, entry: str, folder: Path) -> int:
    """Spilled bytes of one of the functions of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    usage = _output("cuobjdump", "-res-usage", str(path))
    (found,) = re.findall(rf"Function {entry}:\s+REG:\d+ STACK:(\d+)", usage)
    return int(found)


def test_a_device_is_filled_by_splitting_keys_and_then_heads() -> None:
    llama = Attention(32, 8, 128, 0.1)
    assert shares(llama, 1, 132) == (2, 8)  # one sequence: 128 CTAs
    assert shares(llama, 2, 132) == (4, 8) and shares(llama, 8, 132) == (4, 2)
    assert shares(llama, 17, 132) == shares(llama, 512, 132) == (4, 1)
    seven = Attention(28, 4, 128, 0.1)
    assert shares(seven, 1, 132) == (2, 8) and shares(seven, 16, 132) == (8, 2)
    assert shares(Attention(64, 64, 64, 0.1), 1, 132) == (1, 2)
    assert shares(Attention(24, 2, 128, 0.1), 64, 132) == (8, 1)
