"""The CSR layout, and when torch's own matmul can run it."""

import warnings

import pytest
import torch

from secateur.formats.csr import Csr, torch_csr
from tests.formats.weights import changed

CSR = Csr()
WEIGHT = torch.tensor([[0.0, 3, 0, 4], [0, 0, 0, 0], [5, 0, 0, 0]])


def test_layout_is_that_of_torch_csr() -> None:
    packed = CSR.pack(WEIGHT)
    assert packed["values"].tolist() == [3, 4, 5]
    assert packed["crow_indices"].tolist() == [0, 2, 2, 3]
    assert packed["col_indices"].tolist() == [1, 3, 0]
    assert packed["crow_indices"].dtype == packed["col_indices"].dtype == torch.int32


def test_why_not_compares_bytes() -> None:
    assert CSR.why_not(torch.eye(16)) is None
    reason = CSR.why_not(torch.ones(4, 16))
    assert reason == "csr would store 2.08x the bytes of the dense weight: nothing to gain"


def test_density_counts_nonzeros() -> None:
    assert CSR.density(WEIGHT) == 0.25


def test_broken_indices_are_named() -> None:
    good = CSR.pack(WEIGHT)
    assert CSR.why_broken(good) is None
    for crow in ([0, 2, 2, 2], [1, 2, 2, 3], [0, 3, 2, 3]):
        bad = changed(good, crow_indices=torch.tensor(crow, dtype=torch.int32))
        assert CSR.why_broken(bad) == "crow_indices do not rise from 0 to 3"
    for columns, words in (
        ([1, 4, 0], "leave 0..3"),
        ([-1, 3, 0], "leave 0..3"),
        ([3, 1, 0], "do not ascend"),
        ([1, 1, 0], "do not ascend"),
    ):
        bad = changed(good, col_indices=torch.tensor(columns, dtype=torch.int32))
        assert words in (CSR.why_broken(bad) or "")


def test_an_empty_one_has_the_sizes_of_a_packed_one() -> None:
    packed, empty = CSR.pack(WEIGHT), CSR.empty((3, 4), 3, torch.float32)
    for key, tensor in packed.tensors.items():
        assert empty.tensors[key].shape == tensor.shape
        assert empty.tensors[key].dtype == tensor.dtype
    with pytest.raises(ValueError, match="at most 12 values, got 13"):
        CSR.empty((3, 4), 13, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_multiplies_float32_and_float64(dtype: torch.dtype) -> None:
    assert torch_csr.why_not(CSR.pack(WEIGHT.to(dtype)), 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_multiplies_no_16_bit_csr(dtype: torch.dtype) -> None:
    packed = CSR.pack(WEIGHT.to(dtype))
    reason = torch_csr.why_not(packed, 1)
    assert reason is not None and "needs float32 or float64 (torch has no" in reason
    with pytest.raises(NotImplementedError):  # the day this passes, why_not can go
        torch_csr.linear(torch.ones(2, 4, dtype=dtype), packed, None)


def test_it_says_which_device_it_needs() -> None:
    packed = CSR.pack(WEIGHT)
    meta = changed(packed, values=packed["values"].to("meta"))
    assert torch_csr.why_not(meta, 1) == "csr torch_csr needs a weight on the CPU, got meta"


def test_the_forward_is_quiet() -> None:
    packed = CSR.pack(WEIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = torch_csr.linear(torch.eye(4), packed, torch.ones(3))
    assert torch.equal(result, WEIGHT.t() + 1)
