"""Every format: unpack(pack(w)) is w, bytes are as documented, and bad weights are refused."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats import contract, parse_format
from tests.formats.weights import DTYPES, EXACT, FORMATS, fitting_weight

ANY_PATTERN = ("block:4x8", "block:2x1", "bitmap", "csr")
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-6, 3e4])


@st.composite
def weights(draw: st.DrawFn, format: str) -> Tensor:
    """Small weights with zeros of both signs anywhere; half of a group forced for 2:4 and 4:8."""
    out, width = 4 * draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    numbers = draw(st.lists(VALUES, min_size=out * width, max_size=out * width))
    weight = torch.tensor(numbers).reshape(out, width)
    if format.startswith("semi"):
        size = 4 if format == "semi24" else 8
        kept = st.sampled_from(list(combinations(range(size), size // 2)))
        keep = torch.zeros(out, width // size, size)
        for group in keep.flatten(0, 1):
            group[list(draw(kept))] = 1.0
        weight = weight * keep.flatten(1)
    return weight


def round_trip(format: str, weight: Tensor) -> Tensor:
    chosen = parse_format(format)
    packed = chosen.pack(weight)
    assert chosen.why_broken(packed) is None
    return packed.dense()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("format", EXACT)
@given(data=st.data())
def test_any_legal_weight_comes_back(format: str, data: st.DataObject) -> None:
    weight = data.draw(weights(format))
    restored = round_trip(format, weight)
    assert torch.equal(restored, weight)
    nonzero = weight != 0
    assert torch.equal(bits(restored[nonzero]), bits(weight[nonzero]))


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(f, d) for f in FORMATS for d in DTYPES if f in EXACT or d != torch.float64],
    ids=str,
)
def test_every_dtype_comes_back(format: str, dtype: torch.dtype) -> None:
    weight = fitting_weight(format, 24, 40, dtype)
    restored = round_trip(format, weight)
    assert restored.dtype == dtype and torch.equal(restored, weight)


@pytest.mark.parametrize("format", FORMATS)
def test_all_zeros(format: str) -> None:
    assert torch.equal(round_trip(format, torch.zeros(8, 16)), torch.zeros(8, 16))


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_row_and_a_kept_last_column(format: str) -> None:
    weight = fitting_weight(format, 8, 16)
    weight[0:4] = 0
    weight[7] = 0
    weight[7, 15] = 5.0
    assert torch.equal(round_trip(format, weight), weight)


@pytest.mark.parametrize("format", ANY_PATTERN)
def test_a_dense_weight(format: str) -> None:
    weight = torch.arange(1.0, 8 * 16 + 1).reshape(8, 16)
    assert torch.equal(round_trip(format, weight), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_a_transposed_weight(format: str) -> None:
    weight = fitting_weight(format, 16, 24).t().contiguous().t()
    assert not weight.is_contiguous()
    assert torch.equal(round_trip(format, weight), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_copies(format: str) -> None:
    weight = fitting_weight(format, 16, 24)
    kept = weight.clone()
    packed = parse_format(format).pack(weight)
    weight.fill_(7.0)
    assert torch.equal(packed.dense(), kept)


@pytest.mark.parametrize("format", ["semi24", "bitmap", "csr"])
def test_negative_zero_comes_back_positive(format: str) -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 0.0]])
    assert not bool(round_trip(format, weight).signbit().any())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_located(format: str, value: float) -> None:
    weight = torch.zeros(8, 16)
    weight[5, 11] = value
    with pytest.raises(ValueError, match=r"needs finite weights, row 5 column 11 is -?(nan|inf)"):
        parse_format(format).pack(weight)


@pytest.mark.parametrize("format", FORMATS)
def test_other_ranks_and_dtypes_are_refused(format: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"needs a weight of shape \[out, in\], got \(2, 8, 8\)"):
        parse_format(format).pack(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"bfloat16 or float16 weight, got torch.int8"):
        parse_format(format).pack(torch.zeros(8, 8, dtype=torch.int8))


@pytest.mark.parametrize("format", FORMATS)
def test_more_weights_than_indices_can_number_are_refused(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert contract.MOST_WEIGHTS == torch.iinfo(torch.int32).max
    monkeypatch.setattr(contract, "MOST_WEIGHTS", 128)
    parse_format(format).pack(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="at most 128 weights in a layer, got 256: split the lay"):
        parse_format(format).pack(torch.zeros(8, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_semi24_takes_the_documented_bytes(dtype: torch.dtype) -> None:
    weight = fitting_weight("semi24", 64, 256, dtype)
    assert parse_format("semi24").pack(weight).nbytes == 0.5625 * weight.nbytes


def test_bitmap_takes_the_documented_bytes() -> None:
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    assert parse_format("bitmap").pack(weight).nbytes == 0.5625 * weight.nbytes


def test_block_and_csr_take_the_documented_bytes() -> None:
    weight = torch.zeros(64, 128)
    weight[0:8, 0:16] = 1
    weight[8:16, 16:32] = 1
    blocks = parse_format("block:8x16").pack(weight).nbytes
    assert blocks == 2 * 8 * 16 * 4 + 4 * 2 + 4 * (64 // 8 + 1)
    assert parse_format("csr").pack(weight).nbytes == 256 * (4 + 4) + 4 * (64 + 1)
