"""The prefill kernel on a GPU: every format, number type and tile, held to float64."""

from functools import cache

import pytest
import torch
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.activations import ACTIVATIONS as FUNCTIONS
from secateur.formats.contract import Packed
from secateur.formats.format import dequantised
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24.arrange import FORMATS as KINDS
from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.launch import _load
from secateur.formats.kernels.prefill16 import ACTIVATIONS, multiply, why_not
from secateur.formats.kernels.prefill16.config import TILES, Tile, with_stages
from secateur.formats.kernels.prefill16.multiply import _launch, operands
from tests.formats.weights import allowed_error, exact_linear, fitting_weight
from tests.formats.weights import tokens_on_gpu as inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

FORMATS = tuple(name for name, (kind, _) in KINDS.items() if not kind.on_dense_cores)
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((16, 64), (528, 1984), (1024, 2048))  # least, ragged, even
TOKENS = (65, 100, 255, 257, 1000, 4097)
RAGGED = (528, 1984)


class Layer:
    """A packed weight with its units and a bias."""

    def __init__(self, format: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.packed: Packed = parse_format(format).pack(
            fitting_weight(format, *shape, dtype).cuda()
        )
        entries = self.packed.format.implementations
        decode = next(e for e in entries if e.name == "decode")
        self.units = decode.arranged(self.packed)["units"]
        self.kind, self.grouped = KINDS[str(self.packed.format)]
        scaled = "scales" in self.packed.tensors and not self.grouped
        self.scales = self.packed["scales"] if scaled else None
        self.bias = inputs(1, shape[0], dtype)[0]

    def __call__(self, x: Tensor, bias: bool = True, activation: str = "") -> Tensor:
        rows, offset = self.packed.shape[0], self.bias if bias else None
        return multiply(
            x, self.units, self.scales, offset, self.kind, self.grouped, rows, activation
        )


@cache  # packing takes longer than the tests
def layer_of(format: str, dtype: torch.dtype, shape: tuple[int, int]) -> Layer:
    """A layer of random weights; shared, so no test may change it."""
    problem = why_not(shape, dtype, torch.device("cuda"))
    if problem is not None:
        pytest.skip(problem)
    return Layer(format, dtype, shape)


def held_to_float64(layer: Layer, x: Tensor, bias: bool) -> None:
    weight = layer.packed.dense()
    offset, meant = layer.bias if bias else None, dequantised(layer.packed).double()
    exact = exact_linear(x, meant, offset)
    found = layer(x, bias)
    assert found.shape == exact.shape and found.dtype == x.dtype
    assert (found.double() - exact).abs().max() <= allowed_error(x, weight, offset, meant)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_right(
    format: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    layer = layer_of(format, dtype, shape)
    held_to_float64(layer, inputs(tokens, shape[1], dtype), bias=tokens % 2 == 1)


@pytest.mark.parametrize("tokens", [9, 70, 256, 600, 2000])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("format", ["semi24", "semi24_int4", "semi24_fp8"])
def test_every_tile_gives_the_same_result(format: str, tile: Tile, tokens: int) -> None:
    """To a rounding, and to the bit when it is repeated; nothing beyond it is written."""
    dtype = torch.bfloat16
    layer, x = layer_of(format, dtype, RAGGED), inputs(tokens, RAGGED[1], dtype)
    case = Case(layer.kind, layer.grouped, dtype, *RAGGED, tokens)
    full = with_stages(tile, case)
    launch = _launch(x.device, layer.kind, layer.grouped, dtype, full, "", True)
    stream = torch.cuda.current_stream().cuda_stream
    scales = 0 if layer.scales is None else layer.scales.data_ptr()
    wanted, found = layer(x), torch.full((tokens + 1, RAGGED[0]), 7.0, dtype=dtype, device="cuda")
    first = None
    for _ in range(10):
        found[:-1] = torch.nan
        maps = operands(case, full, x.data_ptr(), layer.units.data_ptr(), found.data_ptr())
        rest = (layer.bias.data_ptr(), tokens, RAGGED[0], case.units)
        launch(stream, *maps, scales, *rest)
        first = found.clone() if first is None else first
        assert torch.equal(found, first)
    assert bool((found[-1] == 7).all())
    assert torch.allclose(found[:-1], wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_one_input_gives_the_dense_weights_column(format: str, dtype: torch.dtype) -> None:
    """Bit for bit: codes, scales and their rounding are the dense weight's."""
    layer = layer_of(format, dtype, RAGGED)
    x = torch.eye(RAGGED[1], device="cuda", dtype=dtype)
    assert torch.equal(layer(x, bias=False), layer.packed.dense().t())


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_that_is_not_finite_stays_alone(format: str) -> None:
    """NaN reaches every row that keeps its column; other tokens keep their bits."""
    layer, x = layer_of(format, torch.bfloat16, RAGGED), inputs(300, RAGGED[1], torch.bfloat16)
    clean = layer(x)
    x[3, 5], x[258, 0], x[299, -1] = torch.nan, torch.inf, -torch.inf
    found = layer(x)
    changed = [3, 258, 299]
    others = [row for row in range(300) if row not in changed]
    assert torch.equal(found[others], clean[others])
    dense = layer.packed.dense()
    for row, column in zip(changed, (5, 0, RAGGED[1] - 1), strict=True):
        kept = dense[:, column] != 0
        assert not found[row, kept].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
def test_activations_are_applied_before_the_result_is_rounded(
    format: str, activation: str, dtype: torch.dtype
) -> None:
    """The slope of all of them is at most 1.13, so what rounds the one moves the other as much."""
    layer, x = layer_of(format, dtype, RAGGED), inputs(300, RAGGED[1], dtype)
    x[7] = torch.nan
    plain = layer(x).double()
    found = layer(x, activation=activation).double()
    wanted = FUNCTIONS[activation](plain)
    eps = torch.finfo(dtype).eps
    assert found[7].isnan().all()
    band = eps * (1.13 * plain.abs() + wanted.abs()) + eps**2
    rows = [row for row in range(300) if row != 7]
    assert bool(((found - wanted).abs() <= band)[rows].all())


@pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
def test_inputs_that_lie_otherwise(format: str) -> None:
    """Transposed, in every second column, two bytes off 16, or none at all."""
    layer, x = layer_of(format, torch.bfloat16, RAGGED), inputs(300, RAGGED[1], torch.bfloat16)
    wanted = layer(x)
    for given in (x.t().contiguous().t(), torch.stack((x, -x), 2).flatten(1)[:, ::2]):
        assert not given.is_contiguous() and torch.equal(layer(given), wanted)
    moved = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert moved.data_ptr() % 16 == 2 and torch.equal(layer(moved), wanted)
    assert layer(x[:0]).shape == (0, RAGGED[0])


@pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
def test_a_chain_gives_the_bits_of_launches_that_are_waited_for(format: str) -> None:
    """Each result is the next input, at many tokens and at few, where the decode kernel runs."""
    dtype = torch.bfloat16
    layer = layer_of(format, dtype, (1024, 1024))
    gain = float(layer.packed.dense().float().norm()) / 32
    first = inputs(300, 1024, dtype)

    def chain(wait: bool) -> Tensor:
        y = first
        for step in range(12):
            y = layer(y, bias=False)
            if step % 3 == 2:
                few = y[:64] * 2.0**-6  # a kernel that knows nothing of dependent launch
                args = (layer.units, layer.scales, None, layer.kind, layer.grouped, 1024)
                y = torch.cat((decode24.multiply(few, *args), y[64:]))
            if wait:
                torch.cuda.synchronize()
            y = y / gain
        return y

    wanted = chain(wait=True)
    assert wanted.isfinite().all() and wanted.any()
    chain(wait=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(10):
        graph.replay()
        assert torch.equal(found, wanted)


def test_an_uncompiled_kernel_is_refused_in_a_capture() -> None:
    layer, x = layer_of("semi24", torch.bfloat16, RAGGED), inputs(300, RAGGED[1], torch.bfloat16)
    layer(x)
    _load.cache_clear()
    _launch.cache_clear()
    with pytest.raises(RuntimeError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x * 1)
    held_to_float64(layer, x, bias=True)


@pytest.mark.parametrize("kind", [Kind.W16, Kind.INT4])
def test_weights_written_just_before(kind: Kind) -> None:
    """Weights are read before the wait for the kernel before, which has ended by then."""
    format = "semi24" if kind is Kind.W16 else "semi24_int4"
    layer, x = layer_of(format, torch.bfloat16, RAGGED), inputs(300, RAGGED[1], torch.bfloat16)
    wanted = layer(x)
    for _ in range(100):
        copied = layer.units.clone()
        y = multiply(x, copied, layer.scales, layer.bias, kind, layer.grouped, RAGGED[0])
        copied.fill_(255)
        assert torch.equal(y, wanted)
