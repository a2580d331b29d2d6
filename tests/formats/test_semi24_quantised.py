"""2:4 weights on a grid: bytes, what rounding keeps and loses, and damaged tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.formats import describe, empty_from, parse_format
from secateur.formats.format import dequantised, weight_error
from secateur.formats.linear import SparseLinear
from secateur.formats.quantised import Quantised
from secateur.formats.quantised.codes import kept_codes
from secateur.formats.semi24 import Semi24
from secateur.patterns.grids import Grid
from tests.formats.weights import QUANTISED, changed, fitting_weight, tokens_in

INT4, INT4_CHANNEL, INT8, FP8 = (
    Quantised(grid, sc.NM(2, 4)) for grid in (sc.Int4(), sc.Int4(None), sc.Int8(), sc.Fp8())
)
NAMES = (*(name for name in QUANTISED if name.startswith("semi24")), "semi24_int4:channel")
GRID: dict[str, Grid] = {
    "semi24_int4": sc.Int4(),
    "semi24_int4:channel": sc.Int4(None),
    "semi24_int8": sc.Int8(),
    "semi24_fp8": sc.Fp8(),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_ERROR = {  # of normal weights; twice what was measured
    "semi24_int4": 0.2,
    "semi24_int4:channel": 0.25,
    "semi24_int8": 0.02,
    "semi24_fp8": 0.06,
}


def any_weight(out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return fitting_weight("semi24", out, width, dtype, seed)


def test_int4_bytes_by_hand() -> None:
    weight = torch.tensor([[7.0, 0, 0, -3, 0, -1, 2, 0, 0, 0, 5, 0]])
    packed = INT4.pack(weight)
    assert packed["scales"].tolist() == [[1.0]]
    # two's complement nibbles, first kept code low: (7, -3), (-1, 2), (0, 5)
    assert packed["values"].tolist() == [[0x7 | 0xD << 4, 0xF | 0x2 << 4, 0x0 | 0x5 << 4]]
    assert torch.equal(packed["metadata"], Semi24().pack(weight)["metadata"])
    assert kept_codes(sc.Int4(), packed).tolist() == [[7, -3, -1, 2, 0, 5]]
    assert torch.equal(packed.dense(), weight)


def test_the_row_that_the_page_draws() -> None:
    row = [3.5, 0, 0, -1, 0, 2, 0.5, 0, 0, 0, -2, 0, 0, 0, 0, 0]
    packed = INT4.pack(torch.tensor([row]))
    assert packed["scales"].tolist() == [[0.5]]
    assert packed["values"].tolist() == [[0b1110_0111, 0b0001_0100, 0b1100_0000, 0]]
    assert kept_codes(sc.Int4(), packed).tolist() == [[7, -2, 4, 1, 0, -4, 0, 0]]


def test_int8_and_fp8_bytes_by_hand() -> None:
    weight = torch.tensor([[127.0, 0, 0, -3, 0, -1, 2, 0]])
    packed = INT8.pack(weight)
    assert packed["scales"].tolist() == [[1.0]] and packed["values"].tolist() == [[127, -3, -1, 2]]
    weight = torch.tensor([[448.0, 0, 0, -3, 0, -1, 0.125, 0]])
    floats = FP8.pack(weight)
    assert floats["scales"].tolist() == [[1.0]]
    assert floats["values"].tolist() == [
        [0x7E, 0xC4, 0xB8, 0x20]
    ]  # sign, 4 exponent, 3 mantissa bits


def test_a_scale_belongs_to_128_inputs_kept_or_not() -> None:
    weight = torch.zeros(1, 132)
    weight[0, 124:132] = torch.tensor([0.0, 7, 1, 0, 0, 70, 10, 0])
    packed = INT4.pack(weight)
    assert packed["scales"].tolist() == [[1.0, 10.0]]
    assert packed["values"].tolist()[0][-2:] == [0x17, 0x17]
    whole = INT4_CHANNEL.pack(weight)
    assert whole["scales"].shape == (1, 1) and whole.format == INT4_CHANNEL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_they_take_the_documented_bytes(dtype: torch.dtype) -> None:
    weight = any_weight(8, 1024, dtype)
    taken = {name: parse_format(name).pack(weight).nbytes for name in NAMES}
    assert taken["semi24_int4"] == 0.390625 * weight.numel()
    assert taken["semi24_int4:channel"] == 0.375 * weight.numel() + 2 * 8
    assert taken["semi24_int8"] == taken["semi24_fp8"] == 0.625 * weight.numel() + 2 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(width=st.sampled_from([4, 64, 132, 260]), seed=st.integers(0, 2**16))
def test_packing_what_was_unpacked_changes_nothing(
    name: str, dtype: torch.dtype, width: int, seed: int
) -> None:
    chosen = parse_format(name)
    weight = any_weight(4, width, dtype, seed)
    packed = chosen.pack(weight)
    assert chosen.why_broken(packed) is None and packed.dtype == dtype
    dense = packed.dense()
    assert dense.dtype == dtype and torch.equal(dense, dequantised(packed).to(dtype))
    assert not bool(dense[weight == 0].any()) and not bool(dense[weight == 0].signbit().any())
    assert torch.equal(chosen.pack(dense).dense(), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_codes_are_those_of_the_grid(name: str, dtype: torch.dtype) -> None:
    weight, grid = any_weight(8, 260, dtype), GRID[name]
    packed = parse_format(name).pack(weight)
    scales = grid.scales(weight)
    expected = grid.dequantised(grid.codes(weight, scales), scales)
    assert torch.equal(packed.tensors["scales"], scales)
    assert torch.equal(dequantised(packed), expected)
    error = weight_error(weight, packed)
    lost = (weight.double() - expected.double()).norm() / weight.double().norm()
    assert error == pytest.approx(float(lost), rel=1e-6)
    assert 0 < error < LARGEST_ERROR[name]
    assert weight_error(torch.zeros(4, 8), parse_format(name).pack(torch.zeros(4, 8))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_multiplies_by_the_unrounded_weight(name: str) -> None:
    """In bfloat16 the product of code and scale has bits that the dense weight cannot hold."""
    chosen = parse_format(name)
    packed = chosen.pack(any_weight(16, 260, torch.bfloat16))
    x, bias = tokens_in(5, 260, dtype=torch.bfloat16), tokens_in(16, dtype=torch.bfloat16)
    result = chosen.implementations[-1].linear(x, packed, bias)
    wide = nn.functional.linear(x.float(), dequantised(packed), bias.float())
    assert result.dtype == torch.bfloat16 and torch.equal(result, wide.bfloat16())
    assert not torch.equal(packed.dense().float(), dequantised(packed))


def test_a_row_of_at_most_128_inputs_has_one_scale_either_way() -> None:
    weight = any_weight(4, 128)
    groups, rows = INT4.pack(weight), INT4_CHANNEL.pack(weight)
    assert groups.format == rows.format == INT4
    assert torch.equal(groups["scales"], rows["scales"])


def test_a_layer_with_a_scale_for_every_output_is_described_and_made_again() -> None:
    layer = SparseLinear(parse_format("semi24_int4:channel").pack(any_weight(8, 260)))
    description = describe(layer)
    assert description["format"] == "semi24_int4:channel" and description["dtype"] == "float32"
    other = empty_from(description)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_packed_says_why(name: str) -> None:
    chosen, short = parse_format(name), name.partition(":")[0]
    wide = any_weight(4, 8, torch.float64)
    with pytest.raises(ValueError, match=f"pack into {short} needs a float32, .*got torch.float64"):
        chosen.pack(wide)
    assert "got torch.float64" in (chosen.why_not(wide) or "")
    assert chosen.why_not(any_weight(4, 8)) is None and chosen.density(wide) == 0.5
    crowded = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"pack needs a 2:4 weight, row 0, columns 0\.\.3 keeps 4"):
        chosen.pack(crowded)
    assert (chosen.why_not(crowded) or "").startswith(f"{short} needs at most 2 nonzeros")
    with pytest.raises(ValueError, match=r"multiple of 4, got \(2, 6\): leave this layer dense"):
        chosen.pack(torch.zeros(2, 6))


def test_another_group_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match="semi24_int4 needs a group_size of 128, or None .* got 64"
    ):
        Quantised(sc.Int4(64), sc.NM(2, 4))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_one_has_the_sizes_of_a_packed_one(name: str) -> None:
    chosen = parse_format(name)
    packed = chosen.pack(any_weight(3, 260, torch.bfloat16))
    empty = chosen.empty((3, 260), 3, torch.bfloat16)
    assert empty.format == packed.format and empty.dtype == torch.bfloat16
    for key, tensor in packed.tensors.items():
        assert empty.tensors[key].shape == tensor.shape
        assert empty.tensors[key].dtype == tensor.dtype
    with pytest.raises(ValueError, match="3 rows of a multiple of 4 inputs, got 2 x 260"):
        chosen.empty((3, 260), 2, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_tensors_are_located(name: str) -> None:
    chosen = parse_format(name)
    packed = chosen.pack(any_weight(3, 260))
    tensors = packed.tensors
    values, scales, metadata = (tensors[key].clone() for key in ("values", "scales", "metadata"))
    values[2, 5] = {"semi24_int8": -128, "semi24_fp8": 0xFF}.get(name, 0x81)
    code = {"semi24_int8": "the code -128", "semi24_fp8": "a NaN"}.get(name, "the code -8")
    first = 20 if "int4" in name else 8  # a byte is a group of four, or half of one
    said = chosen.why_broken(changed(packed, values=values))
    assert said == f"values of row 2 columns {first}..{first + 3} hold {code}"
    scales[1, 0] = torch.inf
    said = chosen.why_broken(changed(packed, scales=scales))
    assert said == "scales of row 1 group 0 are inf"
    metadata[0, 0] = 0
    said = chosen.why_broken(changed(packed, metadata=metadata))
    assert said == "metadata of row 0 columns 0..3 are not two ascending"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_packed_and_told_how_far_it_is_off(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(260, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    model[0].weight.data.copy_(any_weight(16, 260, dtype))
    model[2].weight.data.copy_(fitting_weight(name.partition(":")[0], 8, 16, dtype))
    before = model[0].weight.detach().clone()
    report = sc.pack_(model, name)
    assert [row[0] for row in report.layers] == ["0", "2"]
    assert report.layers[0][4] == weight_error(before, model[0].packed) > 0
    assert report.layers[1][4] <= 2**-8  # on the grid already, but for the rounding of products
    assert report.weight_error == report.layers[0][4]
    assert f"weights off by up to {report.weight_error:.1%}" in str(report)
    assert report.to_dict()["layers"][0]["weight_error"] == report.layers[0][4]
    assert model(tokens_in(3, 260, dtype=dtype)).dtype == dtype
    dense = model[0].weight.clone()
    assert all(row[4] == 0 for row in sc.unpack_(model).layers)
    assert torch.equal(model[0].weight, dense)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("saved") / "model"
    models = [nn.Sequential(nn.Linear(260, 16)).bfloat16() for _ in range(2)]
    models[0][0].weight.data.copy_(any_weight(16, 260, torch.bfloat16))
    x = tokens_in(3, 260, dtype=torch.bfloat16)
    report = sc.pack_(models[0], name)
    sc.save(models[0], folder, reports=[report])
    loaded = sc.load(folder, models[1])
    assert str(loaded[0].format) == name  # type: ignore[index]
    assert torch.equal(loaded(x), models[0](x))
