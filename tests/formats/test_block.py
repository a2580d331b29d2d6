"""The block layout, its errors, and the CPU implementation's own choices."""

import pytest
import torch
from pytest import MonkeyPatch

from secateur.formats.block import Blocks, cpu
from secateur.formats.contract import Packed
from tests.formats.weights import allowed_error, changed, exact_linear, fitting_weight, tokens_in

WEIGHT = torch.tensor(
    [
        [0.0, 0, 1, 2, 0, 0],
        [0.0, 0, 3, 0, 0, 0],
        [0.0, 0, 0, 0, 0, 0],
        [0.0, 0, 0, 0, 0, 0],
        [4.0, 0, 0, 0, 0, 5],
        [0.0, 0, 0, 0, 0, 0],
    ]
)


def arranged(packed: Packed) -> Packed:
    """The weight as the implementation for CPUs reads it."""
    return next(e for e in packed.format.implementations if e.name == "cpu").arranged(packed)


def test_layout_is_that_of_torch_bsr() -> None:
    packed = Blocks(2, 2).pack(WEIGHT)
    assert packed["crow_indices"].tolist() == [0, 1, 1, 3]
    assert packed["col_indices"].tolist() == [1, 0, 2]
    assert packed["values"].tolist() == [[[1, 2], [3, 0]], [[4, 0], [0, 0]], [[0, 5], [0, 0]]]
    assert packed["crow_indices"].dtype == packed["col_indices"].dtype == torch.int32
    assert packed.format == Blocks(2, 2)


def test_a_kept_block_keeps_its_negative_zeros() -> None:
    packed = Blocks(1, 2).pack(torch.tensor([[1.0, -0.0, -0.0, -0.0]]))
    assert packed["col_indices"].tolist() == [0]
    assert packed["values"].signbit().tolist() == [[[False, True]]]


def test_blocks_that_do_not_divide_the_shape_are_refused() -> None:
    message = r"block:4x3 needs a weight whose shape is a multiple of 4x3, got 6x6: choose rows"
    with pytest.raises(ValueError, match=message):
        Blocks(4, 3).pack(WEIGHT)
    with pytest.raises(ValueError, match="block:3x4 needs"):
        Blocks(3, 4).pack(WEIGHT)


def test_why_not_asks_for_a_zero_block() -> None:
    assert Blocks(2, 2).why_not(WEIGHT) is None
    assert Blocks(6, 6).why_not(WEIGHT) == "no 6x6 block is zero: nothing to gain"
    assert "multiple of 4x3" in (Blocks(4, 3).why_not(WEIGHT) or "")


def test_density_counts_blocks() -> None:
    assert Blocks(2, 2).density(WEIGHT) == pytest.approx(3 / 9)


def test_broken_indices_are_named() -> None:
    good = Blocks(2, 2).pack(WEIGHT)
    assert Blocks(2, 2).why_broken(good) is None
    crow = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    falling = torch.tensor([0, 2, 1, 3], dtype=torch.int32)
    for indices in (crow, falling):
        bad = changed(good, crow_indices=indices)
        assert "crow_indices do not rise" in (Blocks(2, 2).why_broken(bad) or "")
    for columns, words in (
        ([1, 0, 3], "leave 0..2"),
        ([1, -1, 2], "leave 0..2"),
        ([1, 2, 2], "do not ascend"),
        ([1, 2, 0], "do not ascend"),
    ):
        bad = changed(good, col_indices=torch.tensor(columns, dtype=torch.int32))
        assert words in (Blocks(2, 2).why_broken(bad) or "")


def test_an_empty_one_has_the_sizes_of_a_packed_one() -> None:
    packed, empty = Blocks(2, 2).pack(WEIGHT), Blocks(2, 2).empty((6, 6), 3, torch.float32)
    for key, tensor in packed.tensors.items():
        assert empty.tensors[key].shape == tensor.shape
        assert empty.tensors[key].dtype == tensor.dtype
    for shape, stored, size in (((6, 6), 10, (2, 2)), ((6, 5), 1, (2, 2)), ((5, 6), 1, (2, 2))):
        with pytest.raises(ValueError, match="needs a shape that holds"):
            Blocks(*size).empty(shape, stored, torch.float32)


def test_the_arrangement_spells_out_the_rows() -> None:
    rows = cpu.arrange(Blocks(2, 2).pack(WEIGHT))["block_rows"]
    assert rows.tolist() == [0, 2, 2]


@pytest.mark.parametrize("tokens", [1, cpu.FEW_TOKENS, cpu.FEW_TOKENS + 1, 40])
@pytest.mark.parametrize("blocks_in_a_run", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_and_sides_change_nothing(
    monkeypatch: MonkeyPatch, tokens: int, blocks_in_a_run: int, dtype: torch.dtype
) -> None:
    weight = fitting_weight("block:8x4", 32, 48, dtype)
    packed = Blocks(8, 4).pack(weight)
    x, bias = tokens_in(tokens, 48, dtype=dtype), tokens_in(32, dtype=dtype, seed=3)
    monkeypatch.setattr(cpu, "RUN_BYTES", blocks_in_a_run * max(8 * tokens, 8 * 4) * 4)
    result = cpu.linear(x, arranged(packed), bias)
    error = (result - exact_linear(x, weight, bias)).abs().max()
    assert result.dtype == dtype and result.is_contiguous()
    assert float(error) <= allowed_error(x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 30])
def test_memory_stays_bounded(monkeypatch: MonkeyPatch, tokens: int) -> None:
    """No product, and so no gathered run, exceeds RUN_BYTES, however many blocks there are."""
    packed = Blocks(4, 4).pack(torch.ones(64, 64))
    sizes: list[int] = []
    multiply = torch.bmm

    def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        sizes.append(product.nbytes)
        return product

    ten_blocks = 10 * 4 * tokens * 4
    monkeypatch.setattr(cpu, "RUN_BYTES", ten_blocks)
    monkeypatch.setattr(torch, "bmm", spy)
    cpu.linear(tokens_in(tokens, 64), arranged(packed), None)
    assert sizes == [ten_blocks] * 25 + [6 * 4 * tokens * 4]  # 256 blocks


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 20])
def test_16_bit_sums_are_taken_in_float32(
    monkeypatch: MonkeyPatch, dtype: torch.dtype, tokens: int, native: bool
) -> None:
    """Adding 512 blocks of ones in bfloat16 would stop at 1024, where 4 more is half a step."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {cpu.NATIVE[dtype]: native})
    packed = Blocks(4, 4).pack(torch.ones(4, 2048, dtype=dtype))
    result = cpu.linear(torch.ones(tokens, 2048, dtype=dtype), arranged(packed), None)
    assert torch.equal(result, torch.full((tokens, 4), 2048.0, dtype=dtype))


@pytest.mark.parametrize(
    ("capabilities", "bfloat16", "float16"),
    [
        ({}, torch.float32, torch.float32),
        ({"avx512_bf16": True, "avx512_fp16": False}, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True, "avx512_fp16": True}, torch.bfloat16, torch.float16),
    ],
)
def test_16_bit_weights_are_widened_where_the_processor_lacks_units(
    monkeypatch: MonkeyPatch,
    capabilities: dict[str, bool],
    bfloat16: torch.dtype,
    float16: torch.dtype,
) -> None:
    seen: list[torch.dtype] = []
    multiply = torch.bmm

    def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.extend([left.dtype, right.dtype])
        return multiply(left, right)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch, "bmm", spy)
    expected = {
        torch.bfloat16: bfloat16,
        torch.float16: float16,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }
    for dtype, multiplied in expected.items():
        seen.clear()
        weight = fitting_weight("block:8x4", 32, 48, dtype)
        packed, x = Blocks(8, 4).pack(weight), tokens_in(3, 48, dtype=dtype)
        result = cpu.linear(x, arranged(packed), None)
        assert set(seen) == {multiplied}
        error = float((result - exact_linear(x, weight, None)).abs().max())
        assert error <= allowed_error(x, weight, None)


def test_same_bits_every_time() -> None:
    packed = Blocks(8, 4).pack(fitting_weight("block:8x4", 64, 64))
    x = tokens_in(20, 64)
    first = cpu.linear(x, arranged(packed), None)
    assert all(torch.equal(first, cpu.linear(x, arranged(packed), None)) for _ in range(5))


def test_it_says_which_device_it_needs() -> None:
    packed = Blocks(2, 2).pack(WEIGHT)
    assert cpu.why_not(packed, 1) is None
    meta = changed(packed, values=packed["values"].to("meta"))
    assert cpu.why_not(meta, 1) == "block cpu needs a weight on the CPU, got meta"
