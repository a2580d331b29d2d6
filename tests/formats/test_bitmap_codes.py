"""Weights with zeros anywhere as codes: bytes, what rounding keeps and loses, damaged tensors."""

from copy import deepcopy
from pickle import dumps, loads

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.formats import SparseLinear, describe, empty_from, parse_format
from secateur.formats.bitmap.codes import BitmapInt4
from secateur.formats.format import weight_error
from tests.formats.weights import changed, tokens_in

GROUPED, OF_ROWS = BitmapInt4(), BitmapInt4(grouped=False)
NAMES = ("bitmap_int4", "bitmap_int4:channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row of 10 inputs, as the page draws it.
WEIGHT = torch.tensor([[0.0, 3.5, 0, 0, -1, 0, 0, 2, 0.5, 0]])


def some_weight(
    out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0, density: float = 0.5
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(out, width, generator=generator) < density
    return (torch.randn(out, width, generator=generator) * keep).to(dtype)


def test_the_row_that_the_page_draws() -> None:
    packed = GROUPED.pack(WEIGHT)
    assert packed["scales"].tolist() == [[0.5]]
    assert packed["bitmask"].tolist() == [[0b1001_0010, 0b01]]
    assert packed["values"].tolist() == [0b1110_0111, 0b0001_0100]  # 7, -2, 4, 1
    assert torch.equal(packed.dense(), WEIGHT)


def test_a_scale_belongs_to_128_inputs_kept_or_not() -> None:
    weight = torch.zeros(1, 132)
    weight[0, 124:132] = torch.tensor([0.0, 7, 1, 0, 0, 70, 10, 0])
    packed = GROUPED.pack(weight)
    assert packed["scales"].tolist() == [[1.0, 10.0]]
    assert packed["values"].tolist() == [0x17, 0x17]
    whole = OF_ROWS.pack(weight)
    assert whole["scales"].shape == (1, 1) and whole.format == OF_ROWS
    assert packed.format == GROUPED


def test_what_rounds_to_zero_is_left_out() -> None:
    weight = torch.tensor([[7.0, 0.25, 0, -1]])
    packed = GROUPED.pack(weight)
    assert packed["bitmask"].tolist() == [[0b1001]] and packed["values"].tolist() == [0xF7]
    assert packed.dense().tolist() == [[7, 0, 0, -1]]
    assert GROUPED.density(weight) == 0.75  # of what is not zero before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_they_take_the_documented_bytes(dtype: torch.dtype) -> None:
    weight = torch.zeros(8, 1024, dtype=dtype)
    weight[:, ::2] = 1
    taken = {name: parse_format(name).pack(weight).nbytes for name in NAMES}
    assert taken["bitmap_int4"] == 0.1953125 * weight.nbytes
    assert taken["bitmap_int4:channel"] == 0.1875 * weight.nbytes + 2 * 8
    for name in NAMES:
        assert parse_format(name).why_not(weight) is None


def test_why_not_compares_bytes() -> None:
    assert GROUPED.why_not(some_weight(4, 256, torch.float64)) == (
        "into bitmap_int4 needs a float32, bfloat16 or float16 weight, got torch.float64: "
        "scale x code is computed in float32, cast the layer with .float() first"
    )
    assert GROUPED.why_not(torch.ones(4, 256)) is None
    reason = GROUPED.why_not(torch.ones(8, 2, dtype=torch.bfloat16))
    assert reason == "bitmap_int4 would store 1.00x the bytes of the dense weight: nothing to gain"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(
    width=st.sampled_from([1, 64, 132, 260]),
    density=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_packing_what_was_unpacked_changes_nothing(
    name: str, dtype: torch.dtype, width: int, density: float, seed: int
) -> None:
    chosen = parse_format(name)
    weight = some_weight(3, width, dtype, seed, density)
    packed = chosen.pack(weight)
    assert packed.format.why_broken(packed) is None and packed.dtype == dtype
    dense = packed.dense()
    assert not bool(dense[weight == 0].any()) and not bool(dense[dense == 0].signbit().any())
    again = chosen.pack(dense)
    assert torch.equal(again.dense(), dense)
    if dtype != torch.float32:  # whose products of scale and code are rounded
        assert all(torch.equal(again[key], packed[key]) for key in ("values", "bitmask"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_codes_are_those_of_the_grid(name: str, dtype: torch.dtype) -> None:
    weight, chosen = some_weight(8, 260, dtype), parse_format(name)
    grid = sc.Int4() if name == "bitmap_int4" else sc.Int4(None)
    packed, scales = chosen.pack(weight), grid.scales(weight)
    expected = grid.dequantised(grid.codes(weight, scales), scales)
    assert torch.equal(packed["scales"], scales)
    assert torch.equal(chosen.unpack(packed), expected)
    lost = (weight.double() - expected.double()).norm() / weight.double().norm()
    assert weight_error(weight, packed) == pytest.approx(float(lost), rel=1e-6)
    assert 0 < float(lost) < 0.25  # twice what was measured


@pytest.mark.parametrize("name", NAMES)
def test_what_is_arranged_is_stored_again(name: str) -> None:
    """What kernels read, made and undone where no kernel runs."""
    packed = parse_format(name).pack(some_weight(40, 700, torch.bfloat16))
    decode = packed.format.implementations[0]
    arranged = decode.arranged(packed)
    assert set(arranged.tensors) == {"lines", "starts", *(("scales",) if ":" in name else ())}
    restored = arranged.stored()
    assert list(restored.tensors) == list(packed.tensors)
    assert all(torch.equal(restored[key], packed[key]) for key in packed.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_it_is_right_and_made_again(name: str) -> None:
    packed = parse_format(name).pack(some_weight(6, 264))
    layer, x = SparseLinear(packed), tokens_in(5, 264)
    exact = torch.nn.functional.linear(x.double(), packed.format.unpack(packed).double())
    assert torch.allclose(layer(x).double(), exact, rtol=0, atol=1e-5)
    other = empty_from(describe(layer), "")
    other.load_state_dict(layer.state_dict())
    assert str(other.format) == name and torch.equal(other(x), layer(x))
    for copy in (deepcopy(layer), loads(dumps(layer))):
        assert copy.format == layer.format and torch.equal(copy(x), layer(x))


def test_damage_is_noticed() -> None:
    packed = GROUPED.pack(WEIGHT)
    said = GROUPED.why_broken

    def bytes_of(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.uint8)

    assert said(packed) is None
    assert said(changed(packed, bitmask=bytes_of(0b1001_0010, 0b101)[None])) == (
        "bitmask keeps columns from 10 on, which the weight lacks"
    )
    assert said(changed(packed, bitmask=bytes_of(0b1001_0010, 0b11)[None])) == (
        "bitmask keeps 5 weights, but 4 codes are stored"
    )
    assert said(changed(packed, bitmask=bytes_of(0b1001_0010, 0)[None])) == (
        "values hold a code behind the 3 that bitmask keeps"
    )
    assert said(changed(packed, values=bytes_of(0x80, 0x14))) == (
        "values of row 0 column 1 hold the code 0"
    )
    assert said(changed(packed, values=bytes_of(0x87, 0x14))) == (
        "values of row 0 column 4 hold the code -8"
    )
    assert said(changed(packed, scales=torch.tensor([[torch.inf]]))) == (
        "scales of row 0 group 0 are inf"
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_one_has_the_sizes_of_a_packed_one(name: str) -> None:
    chosen = parse_format(name)
    packed = chosen.pack(some_weight(4, 300, torch.bfloat16))
    empty = chosen.empty((4, 300), len(packed["values"]), torch.bfloat16)
    assert empty.format == packed.format and empty.dtype == packed.dtype
    for key, tensor in packed.tensors.items():
        assert empty[key].shape == tensor.shape and empty[key].dtype == tensor.dtype
    with pytest.raises(ValueError, match="at most 1200 values, got 1201"):
        chosen.empty((4, 300), 1201, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_weight_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="pack into bitmap_int4.* torch.float64: scale x code is"):
        parse_format(name).pack(some_weight(4, 64, torch.float64))
