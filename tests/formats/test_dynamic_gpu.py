"""The dynamic formats on a GPU: every implementation, shape and token count, held to float64."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, parse_format
from secateur.formats.activations import ACTIVATIONS
from secateur.formats.contract import Implementation
from secateur.formats.format import dequantised
from secateur.formats.pack import packed_linear
from tests.formats.weights import DYNAMIC, used_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DTYPES = (torch.bfloat16, torch.float16)
RAGGED = (400, 1296)  # neither whole tiles nor, for cuSPARSELt, whole steps
SHAPES = ((256, 512), RAGGED, (6144, 4096))
TOKENS = (1, 17, 65, 256, 1000)
HOPPER = ("semi24_int8_dynamic", "semi24_fp8_dynamic")  # formats that have `prefill`
FP8_SUM = 2.0**-13  # of a sum that tensor cores keep to 14 bits, for each 32 products added


@cache  # packing takes longer than the tests
def layer_of(format: str, dtype: torch.dtype, shape: tuple[int, int]) -> SparseLinear:
    """A packed layer of random weights; shared, so no test may change it."""
    generator = torch.Generator("cuda").manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    weight = torch.randn(shape, device="cuda", generator=generator) / shape[1] ** 0.5
    if format.startswith("semi24"):
        rank = torch.rand(shape[0], shape[1] // 4, 4, device="cuda", generator=generator)
        weight *= (rank.argsort(-1) < 2).flatten(1)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias.data.normal_(generator=generator)
    return packed_linear("layer", linear, parse_format(format)).requires_grad_(False)


def inputs(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)


def held_to_float64(layer: SparseLinear, name: str, x: Tensor) -> None:
    """At most twice the reference's error, and one rounding more of product and result.

    `decode` does not round inputs: it is held to the product of x itself. Sums of fp8 are kept to
    14 bits by the tensor cores of sm_90; their errors add at random.
    """
    packed, bias = layer.packed, layer.bias
    used = x if name == "decode" else used_inputs(str(layer.format), x)
    weight = dequantised(packed).double()
    product = used.double() @ weight.T
    exact = product + bias.double()
    magnitude = (used.double().abs() @ weight.abs().T).max()
    rounding = torch.finfo(x.dtype).eps * (exact.abs().max() + product.abs().max())
    rounding += 2.0**-23 * magnitude
    if "fp8" in str(layer.format) and name != "decode":
        rounding += FP8_SUM * (layer.in_features / 32) ** 0.5 * product.abs().max()
    known = {entry.name: entry for entry in layer.format.implementations}
    theirs = 0.0
    if name != "decode":
        theirs = float((known["reference"].linear(x, packed, bias).double() - exact).abs().max())
    runs = known[name]
    result = runs.linear(x, runs.arranged(packed), bias)
    assert result.shape == exact.shape and result.dtype == x.dtype
    assert float((result.double() - exact).abs().max()) <= 2 * (theirs + float(rounding))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("format", "name"),
    [(format, entry.name) for format in DYNAMIC for entry in parse_format(format).implementations],
)
def test_every_implementation_is_right(
    format: str, name: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    layer = layer_of(format, dtype, shape)
    needed(layer, name, tokens)
    held_to_float64(layer, name, inputs(tokens, shape[1], dtype))


def needed(layer: SparseLinear, name: str, tokens: int) -> Implementation:
    """The layer's implementation of this name; the test is skipped where it cannot run."""
    runs = next(e for e in layer.format.implementations if e.name == name)
    problem = runs.why_not(layer.packed, tokens)
    if problem is not None:
        pytest.skip(problem)
    return runs


@pytest.mark.parametrize("tokens", [255, 257, 512])
@pytest.mark.parametrize("format", HOPPER)
def test_tiles_of_tokens_that_are_not_whole(format: str, tokens: int) -> None:
    layer = layer_of(format, torch.bfloat16, RAGGED)
    needed(layer, "prefill", tokens)
    held_to_float64(layer, "prefill", inputs(tokens, RAGGED[1], torch.bfloat16))


@pytest.mark.parametrize("width", [16, 8192, 32768])
@pytest.mark.parametrize("format", HOPPER)
def test_the_narrowest_and_the_widest_tokens(format: str, width: int) -> None:
    layer = layer_of(format, torch.bfloat16, (128, width))
    needed(layer, "prefill", 300)
    held_to_float64(layer, "prefill", inputs(300, width, torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", HOPPER)
def test_prefill_beside_the_reference_at_odd_tokens(format: str, bias: bool) -> None:
    """Tokens of zeros, tiny, huge in one place, with a NaN, with an infinity."""
    layer = layer_of(format, torch.bfloat16, RAGGED)
    runs = needed(layer, "prefill", 300)
    x, offset = inputs(300, RAGGED[1], torch.bfloat16), layer.bias if bias else None
    x[3], x[40] = 0, 1e-39
    x[50, 7], x[258, 0], x[299, -1] = 3e4, torch.nan, -torch.inf
    known = {entry.name: entry for entry in layer.format.implementations}
    wanted = known["reference"].linear(x, layer.packed, offset)
    result = runs.linear(x, runs.arranged(layer.packed), offset)
    assert result.isnan().any(1).nonzero().flatten().tolist() == [258, 299]
    assert bool(result[[258, 299]].isnan().all())
    assert torch.equal(result[3], wanted[3])
    rtol = torch.finfo(torch.bfloat16).eps
    atol = rtol if "fp8" in format else 1e-5
    kept = wanted.isfinite()
    kept[50] = False  # 1e4 times the others: by itself
    assert torch.allclose(result[kept], wanted[kept], rtol=rtol, atol=atol)
    most = float(wanted[50].abs().max())
    assert torch.allclose(result[50], wanted[50], rtol=rtol, atol=atol * most)


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("format", DYNAMIC)
def test_the_same_bits_again(format: str, tokens: int) -> None:
    layer, x = layer_of(format, torch.bfloat16, (256, 512)), inputs(tokens, 512, torch.bfloat16)
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(5))


@pytest.mark.parametrize("format", DYNAMIC)
def test_inputs_that_lie_otherwise(format: str) -> None:
    """Transposed, in every second column, 3-dimensional, two bytes off 16, or none at all."""
    layer, x = layer_of(format, torch.bfloat16, (256, 512)), inputs(300, 512, torch.bfloat16)
    wanted = layer(x)
    for given in (x.t().contiguous().t(), torch.stack((x, -x), 2).flatten(1)[:, ::2]):
        assert not given.is_contiguous() and torch.equal(layer(given), wanted)
    assert torch.equal(layer(x.view(3, 100, 512)), wanted.view(3, 100, 256))
    moved = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert moved.data_ptr() % 16 == 2 and torch.equal(layer(moved), wanted)
    assert layer(x[:0]).shape == (0, 256) and layer(x.view(3, 100, 512)[:, :0]).shape == (3, 0, 256)


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_token_that_is_not_finite_stays_alone(format: str) -> None:
    layer, x = layer_of(format, torch.bfloat16, (256, 512)), inputs(100, 512, torch.bfloat16)
    clean = layer(x)
    x[3, 5], x[70, 0] = torch.nan, torch.inf
    result = layer(x)
    assert bool(result[3].isnan().all()) and not result[70].isfinite().any()
    others = [row for row in range(100) if row not in (3, 70)]
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_captured_layer_reads_its_input_anew(format: str) -> None:
    layer, x = layer_of(format, torch.bfloat16, (256, 512)), inputs(96, 512, torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(2 * inputs(97, 512, torch.bfloat16)[:96])
    graph.replay()
    assert torch.allclose(y, layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", HOPPER)
def test_activations_are_applied_before_the_result_is_rounded(
    format: str, dtype: torch.dtype, activation: str
) -> None:
    """They are torch's in float64 of the kernel's own result, but for one rounding of each.

    The slope of all of them is at most 1.13, so what rounds the one moves the other as much.
    """
    layer = layer_of(format, dtype, RAGGED)
    runs = needed(layer, "prefill", 300)
    x = inputs(300, RAGGED[1], dtype)
    x[7] = torch.nan
    arranged = runs.arranged(layer.packed)
    plain = runs.linear(x, arranged, layer.bias).double()
    found = runs.linear(x, arranged, layer.bias, activation=activation).double()
    wanted = ACTIVATIONS[activation](plain)
    eps = torch.finfo(dtype).eps
    most = 1.13 * eps / 2 * plain.abs() + eps / 2 * wanted.abs() + 1e-6
    assert bool(found[7].isnan().all()) and bool(wanted[7].isnan().all())
    others = [row for row in range(300) if row != 7]
    assert bool(((found - wanted).abs() <= most)[others].all())
