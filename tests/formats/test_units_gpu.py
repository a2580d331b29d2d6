"""What reads units on a GPU, through layers: right at any number of tokens, and held once."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.formats import SparseLinear
from secateur.formats.contract import Implementation
from secateur.formats.format import dequantised
from secateur.formats.kernels.decode24.arrange import FORMATS
from tests.formats.weights import layer_on_gpu
from tests.formats.weights import tokens_on_gpu as inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((16, 64), (528, 1984), (1024, 2048))  # least, ragged, even
TOKENS = (1, 65, 100, 257, 1000)
NAMES = ("prefill", "expand")


@cache
def layer_of(format: str, dtype: torch.dtype, shape: tuple[int, int]) -> SparseLinear:
    """Shared by the tests: none may change it."""
    return layer_on_gpu(format, dtype, shape, True, (("reference", None),))


def needed(layer: SparseLinear, name: str) -> Implementation:
    """The layer's implementation of this name; the test is skipped where it cannot run."""
    named = [e for e in layer.format.implementations if e.name == name]
    if not named:
        pytest.skip(f"{layer.format} has no {name}")
    (found,) = named
    problem = found.why_not(layer.held, 65)
    if problem is not None:
        pytest.skip(problem)
    return found


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_it_is_right(
    format: str, name: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    """At most twice the reference's error, a rounding of the result, its sums, and the weights.

    The weights of a quantised format are rounded to the dtype, as those of the dense layer are.
    """
    layer = layer_of(format, dtype, shape)
    runs, packed, x = needed(layer, name), layer.packed, inputs(tokens, shape[1], dtype)
    weight, bias = dequantised(packed).double(), layer.bias
    exact = x.double() @ weight.T + bias.double()
    known = {entry.name: entry for entry in layer.format.implementations}
    theirs = (known["reference"].linear(x, packed, bias).double() - exact).abs().max()
    magnitude = (x.double().abs() @ weight.abs().T).max()
    eps = torch.finfo(dtype).eps
    allowed = 2 * (theirs + eps * exact.abs().max() + 2.0**-23 * magnitude)
    if not layer.format.is_exact:
        squares = x.double().square() @ weight.square().T
        allowed += 6 * eps / 2 * squares.max().sqrt()  # six deviations of independent roundings
    result = runs.linear(x, runs.arranged(packed), bias)
    assert result.dtype == dtype and result.shape == exact.shape
    assert float((result.double() - exact).abs().max()) <= float(allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_holds_its_weight_once_by_default(format: str, dtype: torch.dtype) -> None:
    layer = copy.deepcopy(layer_of(format, dtype, (1024, 2048)))
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("cpu").to("cuda")
    assert set(layer.held_bytes) <= {"units", "scales"}
    assert layer.nbytes <= 1.02 * layer.stored_bytes
    assert layer.dispatch in ("decode<=64 prefill", "decode<=64 expand")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_repeats_and_other_layouts_of_the_input(format: str, name: str) -> None:
    layer = copy.deepcopy(layer_of(format, torch.bfloat16, (1024, 2048)))
    needed(layer, name)
    layer.use(((name, None),))
    x = inputs(130, 2048, torch.bfloat16)
    y = layer(x)
    assert all(torch.equal(layer(x), y) for _ in range(5))
    assert torch.equal(layer(x.view(2, 65, 2048)).view(130, 1024), y)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(130, 2048)
    assert shifted.data_ptr() % 16
    for other in (layer(x.T.contiguous().T), layer(shifted)):  # not contiguous, not aligned
        torch.testing.assert_close(other, y, rtol=2e-2, atol=2e-2)
        assert torch.equal(other, y) or name == "expand"  # for which cuBLAS has other kernels


@pytest.mark.parametrize("name", NAMES)
def test_layers_in_a_graph_share_what_they_need_for_a_moment(name: str) -> None:
    """Each writes its own dense weight, or none: in a graph, one behind another."""
    shared = [layer_of(format, torch.bfloat16, (2048, 2048)) for format in FORMATS]
    known = [[e.name for e in layer.format.implementations] for layer in shared]
    layers = [copy.deepcopy(one) for one, names in zip(shared, known, strict=True) if name in names]
    for layer in layers:
        needed(layer, name)
        layer.use((("decode", 64), (name, None)))
    model = nn.Sequential(*layers)
    for tokens in (70, 300):
        x = inputs(tokens, 2048, torch.bfloat16)
        expected = x
        for layer in layers:
            expected = layer(expected)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(5):
            graph.replay()
            assert torch.equal(y, expected)


def requested() -> int:
    """Bytes of all tensors; what is allocated for them is rounded up, to a MB for large ones."""
    found: int = torch.cuda.memory_stats()["requested_bytes.all.current"]
    return found


def test_a_model_takes_the_memory_of_its_file_and_one_dense_layer_for_a_moment() -> None:
    torch.manual_seed(0)
    sizes = (2048, 4096, 2048, 4096, 2048)
    layers = [
        nn.Linear(*pair, bias=False, device="cuda", dtype=torch.bfloat16)
        for pair in pairwise(sizes)
    ]
    model = nn.Sequential(*layers).requires_grad_(False)
    del layers
    sc.prune_(model, sc.plan(model, "2:4"))
    torch.cuda.synchronize()
    before = requested()
    sc.pack_(model, "semi24_int4")
    stored = sum(layer.stored_bytes for layer in model)
    gone = 4 * 2048 * 4096 * 2
    assert requested() - (before - gone) <= 1.02 * stored
    x = inputs(100, 2048, torch.bfloat16)
    for layer in model:
        layer.use((("decode", 64), ("expand", None)))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    model(x)
    largest = 2048 * 4096 * 2
    results = 4 * 100 * 4096 * 2
    workspace = 64 * 2**20  # of cuBLAS, at the first call
    assert torch.cuda.max_memory_allocated() - held <= largest + results + workspace


def test_input_gradients_come_from_what_is_held() -> None:
    for format in FORMATS:
        layer = copy.deepcopy(layer_of(format, torch.bfloat16, (528, 1984)))
        layer.use((("decode", 64), ("expand", None)))
        assert "values" not in layer.held_bytes
        x = inputs(70, 1984, torch.bfloat16).requires_grad_()
        up = inputs(71, 528, torch.bfloat16)[:70]
        (grad,) = torch.autograd.grad(layer(x), (x,), up)
        assert torch.equal(grad, up @ layer.packed.dense())
