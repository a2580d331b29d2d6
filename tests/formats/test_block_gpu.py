"""Layers of blocks on a GPU: right at real sizes, and all that a user can call still works."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear
from secateur.formats.block import Blocks
from secateur.formats.linear import Table
from secateur.formats.pack import packed_linear
from tests.formats.kernels.test_blocks import at_blocks
from tests.formats.weights import tokens_on_gpu as inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SHAPES = ((4096, 1024), (1536, 4096))
SIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 32), (32, 256))
PREFILL: Table = (("prefill", None),)


def layer_of(
    block: tuple[int, int],
    shape: tuple[int, int] = SHAPES[0],
    dtype: torch.dtype = torch.bfloat16,
    table: Table | None = None,
) -> SparseLinear:
    """A packed layer of which a fifth of the blocks is kept, but for a row of blocks of zeros."""
    generator = torch.Generator("cuda").manual_seed(0)
    out, width = shape
    keep = torch.rand(out // block[0], width // block[1], device="cuda", generator=generator) < 0.2
    keep[1] = False
    weight = torch.randn(shape, device="cuda", generator=generator) * width**-0.5
    weight *= keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    linear = nn.Linear(width, out, device="cuda", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias.data.normal_(generator=generator)
    return packed_linear("layer", linear, Blocks(*block), table).requires_grad_(False)


def hold(layer: SparseLinear, x: Tensor, result: Tensor) -> None:
    """The error is at most a rounding of the result, and a float32 one of its sum's magnitudes."""
    assert result.shape == (*x.shape[:-1], layer.out_features) and result.is_contiguous()
    weight, bias = layer.packed.dense().double(), layer.bias.double()
    exact = x.double() @ weight.T + bias
    magnitude = x.double().abs() @ weight.abs().T + bias.abs()
    allowed = torch.finfo(result.dtype).eps * exact.abs() + x.shape[-1] * 2.0**-24 * magnitude
    assert bool(((result.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("tokens", [1, 7, 16, 64, 65, 300, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", SIZES, ids=str)
def test_it_is_right(block: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    for shape in SHAPES:
        layer, x = layer_of(block, shape, dtype), inputs(tokens, shape[1], dtype)
        assert layer.dispatch == "decode<=64 prefill"
        hold(layer, x, layer(x))
        layer.use(PREFILL)
        hold(layer, x, layer(x))


def test_inputs_of_any_shape_and_stride() -> None:
    layer = layer_of((64, 64))
    x = inputs(90, 2048, torch.bfloat16)
    for strided in (
        x[:, ::2],
        x[:, :1024].unflatten(0, (9, 10)),
        x[:, :1024].view(9, 10, 1024)[:3],
    ):
        hold(layer, strided, layer(strided))
    assert layer(x[:0, :1024]).shape == (0, 4096)
    hold(layer, x[:1, 1024:], layer(x[:1, 1024:]))


def test_the_same_bits_every_time() -> None:
    layer = layer_of((64, 64))
    for tokens in (1, 16, 500):
        x = inputs(tokens, 1024, torch.bfloat16)
        first = layer(x)
        assert all(torch.equal(first, layer(x)) for _ in range(5))


def test_a_weight_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    linear.weight.data.zero_()
    layer = packed_linear("layer", linear, Blocks(64, 64)).requires_grad_(False)
    for tokens in (2, 100):
        x = inputs(tokens, 256, torch.bfloat16)
        assert torch.equal(layer(x), layer.bias.expand(tokens, -1))


def test_copies_moves_casts_and_files() -> None:
    layer = layer_of((64, 32))
    x = inputs(70, 1024, torch.bfloat16)
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    moved = copy.deepcopy(layer).cpu()
    assert "prefill" not in moved.dispatch
    assert torch.equal(moved.cuda()(x), wanted)
    half = copy.deepcopy(layer).half()
    hold(half, x.half(), half(x.half()))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(layer)
    other.values.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), wanted)


def test_captured() -> None:
    model = nn.Sequential(layer_of((64, 64)), nn.GELU(), layer_of((64, 64), (1024, 4096)))
    sc.warmup(model, (1, 100))
    for tokens in (1, 100):
        x = inputs(tokens, 1024, torch.bfloat16)
        with torch.no_grad():
            wanted = model(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = model(x)
        result.zero_()
        graph.replay()
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("tokens", [3, 64, 500, 4096])
@pytest.mark.parametrize("block", SIZES, ids=str)
def test_gradients_are_those_of_the_dense_weight(block: tuple[int, int], tokens: int) -> None:
    layer = layer_of(block).unfreeze_().requires_grad_()
    weight, x = layer.packed.dense().double(), inputs(tokens, 1024, torch.bfloat16)
    x.requires_grad_()
    grad = inputs(tokens, 4096, torch.bfloat16)
    found = torch.autograd.grad(layer(x), [x, layer.values], grad)
    up, wide = grad.double(), x.detach().double()
    values = layer.packed["values"].detach()
    exact = up @ weight, at_blocks(up.T @ wide, layer.packed)
    sizes = up.abs() @ weight.abs(), at_blocks(up.abs().T @ wide.abs(), layer.packed)
    assert found[1].shape == values.shape
    for one, wanted, size, depth in zip(found, exact, sizes, (4096, tokens), strict=True):
        allowed = torch.finfo(one.dtype).eps * wanted.abs() + depth * 2.0**-24 * size
        assert bool(((one.double() - wanted).abs() <= allowed).all())


def test_it_trains() -> None:
    layer = layer_of((64, 64)).unfreeze_().requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=500.0)  # of a mean over 512 x 4096
    x, target = inputs(512, 1024, torch.bfloat16), inputs(512, 4096, torch.bfloat16)
    losses = []
    for _ in range(10):
        loss = (layer(x) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0], losses


def test_accelerate_measures_it() -> None:
    model = nn.Sequential(nn.Linear(4096, 8192, device="cuda", dtype=torch.bfloat16))
    keep = torch.rand(128, 64, device="cuda") < 0.05
    model[0].weight.data.mul_(keep.repeat_interleave(64, 0).repeat_interleave(64, 1))
    x = inputs(2048, 4096, torch.bfloat16)
    wanted = model(x)
    report = sc.accelerate_(model, (1, 2048), ["block:64x64"])
    assert isinstance(model[0], SparseLinear), str(report)
    assert "prefill" in model[0].dispatch or "decode" in model[0].dispatch
    assert torch.allclose(model(x), wanted, rtol=0.02, atol=0.02)
