"""Siblings in one launch, and what a launch does beside the product, held to float64 on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear
from secateur.formats.format import dequantised
from secateur.formats.kernels.decode24 import Fusion
from secateur.llm.linears import Joined, joined, linear_operations
from tests.formats.weights import layer_on_gpu, tokens_on_gpu

FORMATS = (
    *("semi24", "semi24_int4", "semi24_int4:channel", "semi24_int8", "semi24_fp8"),
    *("semi48", "semi48_int4", "int4", "int4:channel", "int8"),
)
DECODE = (("decode", 64), ("reference", None))


def test_dense_layers_run_one_by_one() -> None:
    layers = [nn.Linear(8, 4), nn.Linear(8, 6, bias=False)]
    assert joined(layers, 1) == "not all of them are packed layers that the decode kernel runs"
    for tokens in (1, 3):
        x, y = torch.randn(tokens, 8), torch.zeros(tokens, 10)
        with torch.no_grad():
            for operation in linear_operations(layers, x, y):
                operation(0)
            wanted = torch.cat([layer(x) for layer in layers], 1)
        assert torch.allclose(y, wanted, atol=1e-6)


def made(format: str, rows: int, columns: int, bias: bool, dtype: torch.dtype) -> SparseLinear:
    return layer_on_gpu(format, dtype, (rows, columns), bias, DECODE)


def exact(layers: list[SparseLinear], x: Tensor) -> Tensor:
    weights = torch.cat([dequantised(layer.packed).double() for layer in layers])
    biases = [
        layer.bias.double() if layer.bias is not None else weights.new_zeros(layer.out_features)
        for layer in layers
    ]
    return x.double() @ weights.T + torch.cat(biases)


def run(joint: Joined, x: Tensor, y: Tensor, fusion: Fusion, norm: tuple | None) -> Tensor:
    joint.into(x, y, fusion, norm)(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return y


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("columns", [192, 1024, 4096])
@pytest.mark.parametrize("format", FORMATS)
def test_fused_launches_are_right(format: str, columns: int) -> None:
    dtype, eps = torch.bfloat16, torch.finfo(torch.bfloat16).eps
    layers = [made(format, rows, columns, rows == 64, dtype) for rows in (512, 64, 64)]
    before = [layer.state_dict() for layer in layers]
    joint = joined(layers, 1)
    assert isinstance(joint, Joined) and joint.shape == (640, columns)
    again = joined(layers, 1)
    assert isinstance(again, Joined) and again.units.data_ptr() == joint.units.data_ptr()
    for layer, state in zip(layers, before, strict=True):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state[name])
    weight = tokens_on_gpu(1, columns, dtype)[0] * 0.1 + 1
    for tokens in (1, 2):
        x = tokens_on_gpu(tokens, columns, dtype) * 3
        start = tokens_on_gpu(tokens, 640, dtype)
        both = tokens_on_gpu(tokens, 2 * columns, dtype)
        gate, up = both.double().chunk(2, 1)
        normed = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
        inner = nn.functional.silu(gate) * up
        cases = {
            Fusion(): (x, None, x.double(), 0.0),
            Fusion(normed=True): (x, (weight, 1e-5), normed * weight.double(), 0.0),
            Fusion(adds=True): (x, None, x.double(), 1.0),
            Fusion(gate="silu", adds=True): (both, None, inner, 1.0),
            Fusion(gate="gelu_tanh"): (
                *(both, None),
                *(nn.functional.gelu(gate, approximate="tanh") * up, 0.0),
            ),
        }
        for fusion, (given, norm, seen, added) in cases.items():
            assert joint.why_not_fused(tokens, fusion) is None, fusion
            wanted = exact(layers, seen) + added * start.double()
            y = run(joint, given, start.clone(), fusion, norm).double()
            # what is multiplied is rounded once to 16 bits, and so is the result
            magnitude = exact(layers, seen).abs().max() + start.double().abs().max()
            rounded = (seen.abs().amax() * eps) * columns**0.5
            scale = torch.cat([dequantised(one.packed).double() for one in layers]).abs().max()
            most = eps * magnitude + float(rounded * scale)
            assert (y - wanted).abs().max() <= most, (fusion, tokens)
            assert torch.equal(run(joint, given, start.clone(), fusion, norm).double(), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layers_packed_differently_stay_apart() -> None:
    layers = [made(format, 64, 256, False, torch.bfloat16) for format in ("semi24", "semi24_int8")]
    assert joined(layers, 1) == "they are packed differently: semi24, semi24_int8"
    x = tokens_on_gpu(3, 256, torch.bfloat16)
    y = x.new_zeros(3, 128)
    for operation in linear_operations(layers, x, y):
        operation(torch.cuda.current_stream().cuda_stream)
    assert torch.equal(y, torch.cat([layer(x) for layer in layers], 1))
