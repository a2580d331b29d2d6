"""Torch's own sparse tensors, there and back."""

import warnings

import pytest
import torch

from secateur.formats import from_torch_sparse, parse_format, to_torch_sparse
from secateur.formats.convert import LAYOUTS
from tests.formats.weights import FORMATS, fitting_weight

HAND = torch.tensor([[0.0, 2, 0, 0], [3, 0, 0, 4]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_convert_both_ways(format: str, layout: str) -> None:
    weight = fitting_weight(format, 64, 128)
    tensor = to_torch_sparse(parse_format(format).pack(weight), layout)
    assert tensor.layout == LAYOUTS[layout]
    assert torch.equal(from_torch_sparse(tensor), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weights_convert_both_ways(layout: str, dtype: torch.dtype) -> None:
    weight = fitting_weight("block:4x8", 64, 128, dtype)
    tensor = to_torch_sparse(weight, layout)
    assert tensor.layout == LAYOUTS[layout] and tensor.dtype == dtype
    assert torch.equal(from_torch_sparse(tensor), weight)


def test_the_indices_are_those_of_the_layout() -> None:
    coo = to_torch_sparse(HAND, "sparse_coo").coalesce()
    assert coo.indices().tolist() == [[0, 1, 1], [1, 0, 3]]
    csr = to_torch_sparse(HAND, "sparse_csr")
    assert csr.crow_indices().tolist() == [0, 1, 3] and csr.col_indices().tolist() == [1, 0, 3]
    csc = to_torch_sparse(HAND, "sparse_csc")
    assert csc.ccol_indices().tolist() == [0, 1, 2, 2, 3] and csc.row_indices().tolist() == [
        *(1, 0, 1)
    ]


def test_bsr_keeps_a_packed_weight_s_own_blocks_and_memory() -> None:
    packed = parse_format("block:1x2").pack(HAND)
    bsr = to_torch_sparse(packed, "sparse_bsr")
    assert bsr.values().shape == (3, 1, 2)
    assert bsr.values().data_ptr() == packed["values"].data_ptr()
    csr = parse_format("csr").pack(HAND)
    assert to_torch_sparse(csr, "sparse_csr").values().data_ptr() == csr["values"].data_ptr()


def test_bsr_of_a_dense_weight_is_in_blocks_of_64() -> None:
    assert to_torch_sparse(torch.eye(128), "sparse_bsr").values().shape == (2, 64, 64)
    with pytest.raises(ValueError, match=r"a multiple of 64x64, got \(2, 4\): pack it with a bloc"):
        to_torch_sparse(HAND, "sparse_bsr")


def test_duplicates_are_summed() -> None:
    indices = torch.tensor([[0, 0], [1, 1]])
    coo = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (2, 2), check_invariants=True)
    assert from_torch_sparse(coo).tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_other_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs one of sparse_coo, sparse_csr, .* got 'coo'"):
        to_torch_sparse(HAND, "coo")
    with pytest.raises(ValueError, match="needs a torch sparse tensor, got a dense one"):
        from_torch_sparse(HAND)
    with pytest.raises(ValueError, match=r"needs a matrix \[out, in\], got shape \(1, 2, 4\)"):
        from_torch_sparse(HAND[None].to_sparse())


def test_a_bsc_tensor_is_read_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notice that the layout is in beta
        bsc = HAND.to_sparse_bsc((1, 2))
    assert torch.equal(from_torch_sparse(bsc), HAND)
