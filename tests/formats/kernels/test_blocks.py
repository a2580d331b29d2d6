"""The Triton kernels of `blocks`, held to float64: in Triton's interpreter, and on a GPU.

The interpreter runs in a plain process, because it is chosen when the kernels are imported and
because shape checking wraps functions that it has to read. Run as a script, this file is that
process.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from secateur.formats.block import Blocks, gpu
from secateur.formats.contract import Packed
from secateur.formats.kernels import blocks
from secateur.formats.kernels.blocks import Config

SIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (32, 128), (128, 32), (48, 80), (64, 16))
DOWN, ACROSS = 8, 6


def weight_of(block: tuple[int, int], kept: str, dtype: torch.dtype, device: str) -> Packed:
    """A weight of 8 by 6 blocks: some kept but a row and a column of them, or none, or all."""
    generator = torch.Generator().manual_seed(sum(block))
    keep = torch.rand(DOWN, ACROSS, generator=generator) < 0.5
    keep[2], keep[:, 3] = False, False
    keep = keep.fill_(kept == "all") if kept != "some" else keep
    spread = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = torch.randn(spread.shape, generator=generator) * spread
    packed = Blocks(*block).pack(weight.to(dtype).to(device))
    return replace(packed, tensors={**packed.tensors, **gpu.arrange(packed)})


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def hold(found: Tensor, exact: Tensor, magnitude: Tensor, depth: int) -> None:
    """One rounding to the result's type, and a float32 rounding of the magnitudes for each sum."""
    assert found.shape == exact.shape
    kind = torch.finfo(found.dtype)  # the last term: a rounding below its least normal number
    allowed = kind.eps * exact.abs() + depth * 2.0**-24 * magnitude + kind.eps * kind.tiny
    error = (found.double() - exact).abs()
    assert bool((error <= allowed).all()), float((error - allowed).max())


def check_products(packed: Packed, tokens: int, bias: bool, config: Config | None) -> None:
    """The product by the weight, by its transpose, and the gradient of the kept blocks."""
    (out, width), like = packed.shape, {"dtype": packed.dtype, "device": str(packed.device)}
    x, grads = normal(tokens, width, seed=1, **like), normal(tokens, out, seed=2, **like)
    offset = normal(out, seed=3, **like) if bias else None
    weight, wide, wide_grads = packed.dense().double(), x.double(), grads.double()

    exact, magnitude = wide @ weight.T, wide.abs() @ weight.abs().T
    if offset is not None:
        exact, magnitude = exact + offset.double(), magnitude + offset.double().abs()
    for names in (gpu.ROWS, gpu.WIDE_ROWS):
        lines = gpu.lines(packed, names)
        if config is None or config.tile_rows <= lines.members.shape[1] * packed["values"].shape[1]:
            found = blocks.multiply(x, packed["values"], lines, False, offset, config)
            hold(found, exact, magnitude, width + 1)

    if config is None:
        found = blocks.multiply(grads, packed["values"], gpu.lines(packed, gpu.COLUMNS), True, None)
        hold(found, wide_grads @ weight, wide_grads.abs() @ weight.abs(), out)
        found = gpu.values_gradient(grads, x, packed)
        both = wide_grads.T @ wide, wide_grads.abs().T @ wide.abs()
        hold(found, *(at_blocks(full, packed) for full in both), tokens)


def at_blocks(full: Tensor, packed: Packed) -> Tensor:
    """The parts of a full matrix where the weight has blocks, as it stores them."""
    rows, cols = packed["values"].shape[1:]
    tiles = full.unflatten(0, (-1, rows)).unflatten(2, (-1, cols)).transpose(1, 2)
    kept = [
        tiles[row, column]
        for row in range(len(tiles))
        for column in packed["col_indices"][slice(*packed["crow_indices"][row : row + 2])].tolist()
    ]
    return torch.stack(kept) if kept else full.new_empty(0, rows, cols)


CONFIGS = (
    ((64, 64), Config(64, 16, 64, 4, 3, splits=4)),
    ((64, 64), Config(64, 64, 64, 4, 3, group=2, boxes=True)),
    ((64, 64), Config(64, 32, 64, 4, 3, tokens_first=True, boxes=True)),
    ((64, 64), Config(16, 64, 32, 4, 2, group=3)),
    ((32, 32), Config(128, 32, 16, 4, 3, group=2, splits=2, tokens_first=True)),
    ((128, 128), Config(64, 32, 256, 4, 3, splits=2, tokens_first=True)),
    ((128, 16), Config(64, 128, 64, 4, 2, group=4)),
)


def check_all(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Every size of block, tokens below, at and above a tile, no block and all; and other tiles."""
    for dtype in dtypes:
        for block in SIZES:
            some = weight_of(block, "some", dtype, device)
            for tokens in (1, 5, 70, 130):
                check_products(some, tokens, tokens != 5, None)
        for kept in ("none", "all"):
            packed = weight_of((64, 32), kept, dtype, device)
            for tokens in (3, 90):
                check_products(packed, tokens, True, None)
        for block, config in CONFIGS:
            check_products(weight_of(block, "some", dtype, device), 33, True, config)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "all hold", (done.stdout + done.stderr)[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_on_a_gpu() -> None:
    check_all("cuda", (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("block", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("count", [1, 64, 448])
@pytest.mark.parametrize("side", [blocks.JOINED_SIDE, blocks.DENSE_JOINED_SIDE])
@pytest.mark.parametrize("has_boxes", [True, False])
def test_tiles_divide_lines(
    block: tuple[int, int], tokens: int, count: int, side: int, has_boxes: bool
) -> None:
    lines = blocks.lines_of(torch.full((count, 3), -1, dtype=torch.int32), block[0], side)
    config = blocks.config_for(block, lines, tokens, 132, has_boxes)
    joined = lines.members.shape[1]
    assert joined * block[0] % config.tile_rows == 0
    assert joined == 1 or block[1] % config.tile_k == 0
    assert config.tile_tokens >= min(tokens, 128) and config.tile_k >= blocks.STEP
    for size in (config.tile_rows, config.tile_tokens, config.tile_k):
        assert size & (size - 1) == 0, "Triton has tiles of powers of two"
    assert config.splits == 1 or tokens <= 64
    assert not config.boxes or (has_boxes and tokens > 64 and block == (64, 64))


def test_lines_are_split_where_they_leave_processors_idle() -> None:
    """As was measured: 448 lines of 64 rows are enough for 132 processors, 64 are not."""
    for count, splits in ((448, 1), (64, 4), (20, 8)):
        lines = blocks.lines_of(torch.zeros(count, 1, dtype=torch.int32), 64)
        assert blocks.config_for((64, 64), lines, 1, 132, True).splits == splits


NUMBERS = torch.tensor([[-1, 0, -1, -1], [1, -1, -1, 2], [-1, -1, -1, -1], [3, 4, -1, 5]])


def test_rows_that_are_alike_are_joined_and_the_fullest_come_first() -> None:
    lines = blocks.lines_of(NUMBERS.int(), 32)
    assert lines.members.tolist() == [[3, 1], [0, 2]]
    assert lines.starts.tolist() == [0, 3, 4]
    assert lines.across.tolist() == [0, 1, 3, 1]
    assert lines.places.tolist() == [[3, 1], [4, -1], [5, 2], [0, -1]]
    assert blocks.lines_of(NUMBERS.int(), 16).members.tolist() == [[3, 1, 0, 2]]


def test_rows_of_blocks_as_large_as_a_tile_stay_alone() -> None:
    lines = blocks.lines_of(NUMBERS.int(), 64)
    assert lines.members.tolist() == [[3], [1], [0], [2]]
    assert lines.starts.tolist() == [0, 3, 5, 6, 6]
    assert lines.places.tolist() == [[3], [4], [5], [1], [2], [0]]
    assert blocks.lines_of(NUMBERS[:3].int(), 16).members.shape == (3, 1), "an odd number"


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    device, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(blocks, "find_spec", lambda name: name)
    assert blocks.why_not((16, 48), bf16, device) is None
    for block, dtype, where, words in (
        ((64, 64), bf16, torch.device("cpu"), "needs a CUDA GPU"),
        ((64, 64), torch.float32, device, "block on a GPU needs bfloat16 or float16, got"),
        ((64, 24), bf16, device, "multiples of 16, got 64x24: prune larger blocks"),
        ((8, 64), bf16, device, "multiples of 16, got 8x64"),
    ):
        assert words in (blocks.why_not(block, dtype, where) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0, this GPU has 7.5" in (
        blocks.why_not((64, 64), bf16, device) or ""
    )
    monkeypatch.setattr(blocks, "find_spec", lambda name: None)
    assert "without it: pip install triton" in (blocks.why_not((64, 64), bf16, device) or "")


def test_many_tokens_are_not_for_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "why_not", lambda *arguments: None)
    packed = Blocks(16, 16).pack(torch.ones(16, 16))
    assert gpu.why_not_few(packed, 64) is None and gpu.why_not(packed, 65) is None
    assert gpu.why_not_few(packed, 65) == (
        "block decode needs at most 64 tokens, got 65: prefill runs more"
    )


def let_the_interpreter_read_numbers() -> None:
    """Make Triton 3.6's interpreter work with numpy 2.5, which refuses `int(array of one)`."""
    interpreter = import_module("triton.runtime.interpreter")  # CI has no Triton
    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    let_the_interpreter_read_numbers()
    check_all("cpu", (torch.float16,))  # its products of bfloat16 are products of bit patterns
    print("all hold")
