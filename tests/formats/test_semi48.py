"""The 4:8 layout, byte by byte, its laws and its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.formats import parse_format
from secateur.formats.quantised import Quantised
from secateur.formats.semi24 import Semi24
from secateur.formats.semi48 import Semi48
from tests.formats.weights import changed, fitting_weight, tokens_in

SEMI48 = Semi48()


def test_a_group_is_four_values_and_a_bit_for_each_column() -> None:
    weight = torch.tensor([[0.0, 1, 0, 2, 0, 0, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]])
    packed = SEMI48.pack(weight)
    assert packed["values"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed["metadata"].tolist() == [[0b1100_1010, 0b0000_1111]]


def test_a_single_nonzero_is_kept_beside_zeros() -> None:
    packed = SEMI48.pack(torch.tensor([[0.0, 0, 0, 0, 0, 0, 9, 0]]))
    assert packed["values"].tolist() == [[0, 0, 0, 9]]
    assert packed["metadata"].tolist() == [[0b0100_0111]]


def test_negative_zeros_are_not_kept() -> None:
    packed = SEMI48.pack(torch.tensor([[-0.0, 3, -0.0, 4, 5, -0.0, -0.0, 6]]))
    assert packed["values"].tolist() == [[3, 4, 5, 6]]
    assert not packed.dense().signbit().any()


@given(
    masks=st.lists(st.integers(0, 255), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_whatever_keeps_at_most_four_comes_back_and_nothing_else_packs(
    masks: list[int], dtype: torch.dtype
) -> None:
    keep = torch.tensor([[mask >> column & 1 for mask in masks for column in range(8)]])
    weight = (keep * torch.arange(1, 17)).to(dtype)
    if any(mask.bit_count() > 4 for mask in masks):
        assert SEMI48.why_not(weight) is not None
        with pytest.raises(ValueError, match="pack needs a 4:8 weight, row 0"):
            SEMI48.pack(weight)
        return
    assert SEMI48.why_not(weight) is None
    packed = SEMI48.pack(weight)
    assert SEMI48.why_broken(packed) is None
    assert packed.dense().dtype == dtype and torch.equal(packed.dense(), weight)


def test_a_fifth_nonzero_is_located() -> None:
    weight = torch.zeros(3, 16)
    weight[1, 8:13] = 1.0
    message = (
        r"pack needs a 4:8 weight, row 1, columns 8\.\.15 keeps 5: run prune_ with NM\(4, 8\) first"
    )
    with pytest.raises(ValueError, match=message):
        SEMI48.pack(weight)
    assert SEMI48.why_not(weight) == (
        "semi48 needs at most 4 nonzeros in every 8 consecutive inputs, row 1 columns 8..15 keep 5"
    )


def test_a_ragged_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 8, got \(3, 12\): leave this layer dense"):
        SEMI48.pack(torch.zeros(3, 12))
    assert SEMI48.why_not(torch.zeros(3, 12)) == (
        "semi48 needs in_features that is a multiple of 8, got (3, 12)"
    )


def test_broken_metadata_is_located() -> None:
    packed = SEMI48.pack(torch.zeros(2, 16))
    packed["metadata"][1, 1] = 0b111
    assert SEMI48.why_broken(packed) == "metadata of row 1 columns 8..15 keep 3, not 4"


def test_an_empty_one_has_the_sizes_of_a_packed_one() -> None:
    packed = SEMI48.pack(torch.zeros(3, 24, dtype=torch.bfloat16))
    empty = SEMI48.empty((3, 24), 3, torch.bfloat16)
    for name, tensor in packed.tensors.items():
        assert empty[name].shape == tensor.shape and empty[name].dtype == tensor.dtype
    with pytest.raises(ValueError, match="3 rows of a multiple of 8 inputs, got 2 x 24"):
        SEMI48.empty((3, 24), 2, torch.bfloat16)


def test_it_takes_the_bytes_of_2_to_4() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    both = weight * sc.NM(2, 4).mask(weight.abs())  # at most 2:4, so at most 4:8
    assert SEMI48.pack(both).nbytes == Semi24().pack(both).nbytes
    assert SEMI48.density(both) == 0.5
    ints = [Quantised(sc.Int4(), sc.NM(n, 2 * n)).pack(both) for n in (2, 4)]
    assert ints[0].nbytes == ints[1].nbytes
    assert torch.equal(ints[0].dense(), ints[1].dense())


def test_codes_of_a_4_8_weight_go_to_its_columns() -> None:
    weight = torch.tensor([[0.0, 7, 0, -3, 0, 0, 1, 2]]) / 4
    format = Quantised(sc.Int4(), sc.NM(4, 8))
    packed = format.pack(weight)
    assert str(packed.format) == "semi48_int4"
    assert packed["values"].tolist() == [[0x7 | 0xD << 4, 0x1 | 0x2 << 4]]
    assert packed["metadata"].tolist() == [[0b1100_1010]]
    assert torch.equal(format.unpack(packed), weight)


NAMES = ("semi48_int4", "semi48_int4:channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(width=st.sampled_from([8, 64, 136, 264]), seed=st.integers(0, 2**16))
def test_packing_what_was_unpacked_changes_nothing(
    name: str, dtype: torch.dtype, width: int, seed: int
) -> None:
    chosen = parse_format(name)
    weight = fitting_weight("semi48", 4, width, dtype, seed)
    assert chosen.why_not(weight) is None and chosen.density(weight) == 0.5
    packed = chosen.pack(weight)
    assert chosen.why_broken(packed) is None and packed.dtype == dtype
    scales = packed.format.grid.scales(weight)
    expected = packed.format.grid.dequantised(packed.format.grid.codes(weight, scales), scales)
    assert torch.equal(packed.format.unpack(packed), expected)
    dense = packed.dense()
    assert not dense[weight == 0].any()
    assert torch.equal(chosen.pack(dense).dense(), dense)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_codes_says_why(name: str) -> None:
    chosen, short = parse_format(name), name.partition(":")[0]
    with pytest.raises(ValueError, match=r"needs a 4:8 weight, row 0, columns 0\.\.7 keeps 8"):
        chosen.pack(torch.ones(2, 8))
    assert (chosen.why_not(torch.ones(2, 8)) or "").startswith(f"{short} needs at most 4 nonzeros")
    packed = chosen.pack(fitting_weight("semi48", 3, 264))
    values, metadata = packed["values"].clone(), packed["metadata"].clone()
    values[2, 5] = 0x81
    said = chosen.why_broken(changed(packed, values=values))
    assert said == "values of row 2 columns 16..23 hold the code -8"
    metadata[0, 1] = 0
    said = chosen.why_broken(changed(packed, metadata=metadata))
    assert said == "metadata of row 0 columns 8..15 keep 0, not 4"


@pytest.mark.parametrize("name", ("semi48", *NAMES))
def test_a_saved_model_comes_back(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("saved") / "model"
    models = [nn.Sequential(nn.Linear(264, 16)).bfloat16() for _ in range(2)]
    models[0][0].weight.data.copy_(fitting_weight("semi48", 16, 264, torch.bfloat16))
    x = tokens_in(3, 264, dtype=torch.bfloat16)
    sc.save(models[0], folder, reports=[sc.pack_(models[0], name)])
    loaded = sc.load(folder, models[1])
    assert str(loaded[0].format) == name  # type: ignore[index]
    assert torch.equal(loaded(x), models[0](x))
