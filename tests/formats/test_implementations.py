"""Every (format, implementation, dtype, shape): right within the derived error budget."""

import pytest
import torch
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.contract import Implementation
from secateur.formats.format import FORMATS as NAMED
from secateur.formats.format import dequantised
from secateur.formats.kernels import simd
from tests.formats.weights import (
    DTYPES,
    FORMATS,
    allowed_error,
    exact_linear,
    fitting_weight,
    packed_weight,
    tokens_in,
    used_inputs,
)

CASES = [
    (format, implementation)
    for format in FORMATS
    for implementation in parse_format(format).implementations
]
RUNNABLE = [
    (format, implementation, dtype)
    for format, implementation in CASES
    for dtype in DTYPES
    if implementation.why_not(packed_weight(format, torch.zeros(8, 8, dtype=dtype)), 1) is None
]
HERE = [(format, runs) for format, runs, dtype in RUNNABLE if dtype == torch.float32]
NAMES = [f"{format} {implementation.name}" for format, implementation in HERE]


def test_only_csr_in_16_bits_and_what_needs_a_gpu_cannot_run_here() -> None:
    missing = {(f, i.name, d) for f, i in CASES for d in DTYPES}
    missing -= {(format, implementation.name, dtype) for format, implementation, dtype in RUNNABLE}
    on_units = [f for f in FORMATS if f.startswith("semi") or f in ("int4", "int8")]
    on_a_gpu = {(f, "decode", d) for f in on_units for d in DTYPES}
    on_a_gpu |= {("semi24", name, d) for name in ("cusparselt", "dense") for d in DTYPES}
    in_16_bits = [f for f in FORMATS if f.startswith("semi24") and "dynamic" not in f]
    on_a_gpu |= {(f, name, d) for f in in_16_bits for name in ("prefill", "expand") for d in DTYPES}
    on_a_gpu |= {
        (f, "expand", d) for f in ("semi48", "semi48_int4", "int4", "int8") for d in DTYPES
    }
    sixteen = {("csr", "torch_csr", torch.bfloat16), ("csr", "torch_csr", torch.float16)}
    dynamic = ("semi24_int8_dynamic", "semi24_fp8_dynamic")
    on_a_gpu |= {(f, "prefill", d) for f in dynamic for d in DTYPES}
    on_a_gpu |= {("semi24_int8_dynamic", "cusparselt", d) for d in DTYPES}
    blocks = [f for f in FORMATS if f.startswith("block")]
    on_a_gpu |= {(f, name, d) for f in blocks for name in ("decode", "prefill") for d in DTYPES}
    bitmaps = ("bitmap", "bitmap_int4")
    on_a_gpu |= {(f, name, d) for f in bitmaps for name in ("decode", "expand") for d in DTYPES}
    torchs = {(f, "torch", d) for f in ("int8_dynamic", "fp8_dynamic") for d in DTYPES}
    lacking = DTYPES if simd.why_not() else [torch.float64]
    on_a_cpu = {(f, i.name, d) for f, i in CASES if i.name == "simd" for d in lacking}
    assert missing == sixteen | on_a_gpu | torchs | on_a_cpu


@pytest.mark.parametrize("shape", [(16, 24), (8, 104)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(
    ("format", "implementation", "dtype"),
    RUNNABLE,
    ids=[f"{format} {implementation.name} {dtype}" for format, implementation, dtype in RUNNABLE],
)
def test_it_is_right(
    format: str,
    implementation: Implementation,
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int],
) -> None:
    out, width = shape
    weight = fitting_weight(format, out, width, dtype)
    packed = packed_weight(format, weight)
    meant = dequantised(packed)
    arranged = implementation.arranged(packed)
    x = tokens_in(tokens, width, dtype=dtype)
    used = used_inputs(format, x)
    for bias in (None, tokens_in(out, dtype=dtype, seed=3)):
        kept = x.clone(), None if bias is None else bias.clone()
        result = implementation.linear(x, arranged, bias)
        assert result.dtype == dtype and result.shape == (tokens, out)
        error = float((result - exact_linear(used, meant, bias)).abs().max())
        assert error <= allowed_error(x, weight, bias, meant)
        assert torch.equal(x, kept[0])
        assert bias is None or torch.equal(bias, kept[1])


@pytest.mark.parametrize(("format", "implementation"), HERE, ids=NAMES)
def test_an_all_zero_weight_gives_the_bias(format: str, implementation: Implementation) -> None:
    packed = parse_format(format).pack(torch.zeros(8, 16))
    bias, x = tokens_in(8, seed=3), tokens_in(3, 16)
    result = implementation.linear(x, implementation.arranged(packed), bias)
    assert torch.equal(result, bias.expand(3, 8))


@pytest.mark.parametrize(("format", "implementation"), HERE, ids=NAMES)
def test_an_arrangement_has_the_named_tensors(format: str, implementation: Implementation) -> None:
    packed = parse_format(format).pack(fitting_weight(format, 8, 16))
    assert tuple(implementation.arranged(packed).tensors) == implementation.reads(packed.format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (144, 320)], ids=str)
@pytest.mark.parametrize(
    ("format", "implementation"),
    [(format, runs) for format, runs in CASES if runs.restores],
    ids=[f"{format} {runs.name}" for format, runs in CASES if runs.restores],
)
def test_what_is_arranged_restores_what_is_stored(
    format: str, implementation: Implementation, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit, and in no more bytes but for what fills the last tile."""
    packed = packed_weight(format, fitting_weight(format, *shape, dtype))
    if implementation.name not in ("cpu", "simd") and dtype.itemsize != 2:
        return  # their kernels run in 16 bits alone
    arranged = implementation.arranged(packed)
    restored = arranged.stored()
    assert list(restored.tensors) == list(packed.tensors)
    for name, tensor in packed.tensors.items():
        assert restored[name].dtype == tensor.dtype and restored[name].shape == tensor.shape
        assert torch.equal(bits(restored[name]), bits(tensor)), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", [*map(str, NAMED), "block:4x4"])
def test_the_reference_comes_last_and_always_runs(name: str) -> None:
    last = parse_format(name).implementations[-1]
    assert last.name == "reference"
    for dtype in DTYPES:
        packed = packed_weight(name, torch.zeros(64, 64, dtype=dtype))
        assert last.why_not(packed, 10**6) is None
