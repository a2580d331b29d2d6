"""How a CTA is made, what is refused, and on a GPU the products, held to float64."""

from functools import cache

import pytest
import torch
from torch import Tensor

from secateur.formats import SparseLinear, parse_format
from secateur.formats.contract import Packed
from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.bits import (
    CODES,
    FLOATS,
    MOST_TOKENS,
    Numbers,
    multiply,
    multiply_expanded,
    why_not,
)
from secateur.formats.kernels.bits.multiply import (
    MOST_BYTES,
    MOST_BYTES_PORTABLE,
    MOST_WARPS,
    Config,
    choose,
)
from tests.formats.weights import allowed_error, exact_linear, tokens_on_gpu

SMS = 132  # of an H200
GPU = torch.device("cuda:0")
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 8), (16, 256), (530, 1992), (1024, 2048), (4096, 520))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(
    ("numbers", "rows", "columns", "tokens", "config"),
    [
        (FLOATS, 28672, 4096, 1, Config(2, 8)),
        (FLOATS, 28672, 4096, 16, Config(14, 1)),  # inputs are read by fewer groups
        (FLOATS, 4096, 14336, 1, Config(2, 8)),
        (FLOATS, 6144, 4096, 1, Config(1, 16)),
        (FLOATS, 4096, 4096, 16, Config(2, 8)),
        (CODES, 28672, 4096, 1, Config(14, 1)),
        (CODES, 28672, 4096, 16, Config(14, 1)),
        (CODES, 4096, 14336, 1, Config(2, 7)),  # 2, 8 was measured, with as many steps
        (CODES, 4096, 4096, 1, Config(2, 8)),
        (CODES, 4096, 4096, 16, Config(2, 8)),
    ],
)
def test_what_measured_fastest_is_chosen(
    numbers: Numbers, rows: int, columns: int, tokens: int, config: Config
) -> None:
    """docs/log/2026-12-01-gpu-bits.md, at half the weights."""
    wide, stage = 8 if tokens <= 8 else 16, {FLOATS: 5888, CODES: 3712}[numbers]
    units = columns // numbers.unit_columns
    assert choose(numbers, rows // 16, units, wide, stage, SMS, MOST_BYTES) == config


@pytest.mark.parametrize("most", [MOST_BYTES, MOST_BYTES_PORTABLE])
@pytest.mark.parametrize(
    ("numbers", "stage"),
    [(FLOATS, 512), (FLOATS, 2304), (FLOATS, 8704), (CODES, 1152), (CODES, 3712), (CODES, 5248)],
)
@pytest.mark.parametrize("units", [1, 3, 56])
@pytest.mark.parametrize("tiles", [1, 7, 132, 133, 1792, 100000])
def test_what_is_chosen_fits(
    tiles: int, units: int, numbers: Numbers, stage: int, most: int
) -> None:
    for tokens in (8, 16):
        config = choose(numbers, tiles, units, tokens, stage, SMS, most)
        assert 1 <= config.warps <= MOST_WARPS and config.splits <= units
        assert config.shared_bytes(numbers, stage) + config.static_bytes(tokens) <= most


def test_a_unit_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="has no room for two units of 99999 bytes"):
        choose(FLOATS, 1, 1, 8, 99999, SMS, MOST_BYTES_PORTABLE)


def test_what_it_cannot_run_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    assert "needs a CUDA GPU" in (why_not((16, 256), torch.bfloat16, here, 1, None) or "")
    monkeypatch.setattr(gpu_checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_checks.torch.cuda, "get_device_capability", lambda _: (7, 5))

    def reason(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> str:
        return why_not(shape, dtype, GPU, tokens, MOST_TOKENS) or ""

    assert reason((16, 256), torch.float32, 1).endswith("got torch.float32: cast the layer")
    assert reason((16, 260), torch.bfloat16, 1) == (
        "the kernel for bits needs in_features that is a multiple of 8, got 16 x 260: "
        "pad the layer with zeros"
    )
    assert reason((16, 256), torch.bfloat16, 17) == (
        "the kernel for bits serves at most 16 tokens, got 17"
    )
    assert "needs compute capability 8.0, this GPU has 7.5" in reason((16, 256), torch.bfloat16, 1)


NUMBERS = {"bitmap": FLOATS, "bitmap_int4": CODES, "bitmap_int4:channel": CODES}
FORMATS = tuple(NUMBERS)


@cache  # packing takes longer than the tests
def layer_of(
    format: str, dtype: torch.dtype, shape: tuple[int, int], density: float
) -> tuple[Packed, Tensor]:
    """A packed weight as the kernels read it, and a bias; shared, so no test may change them."""
    problem = why_not(shape, dtype, GPU, 1, None)
    if problem is not None:
        pytest.skip(problem)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    weight = (weight * (torch.rand(shape, generator=generator) < density)).to(dtype)
    packed = parse_format(format).pack(weight.cuda())
    decode = packed.format.implementations[0]
    return decode.arranged(packed), torch.randn(shape[0], generator=generator).to(dtype).cuda()


def run(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product with few tokens."""
    numbers = NUMBERS[str(packed.format)]
    return multiply(numbers, x, packed["lines"], packed["starts"], bias, packed.shape[0])


def run_expanded(packed: Packed, x: Tensor) -> Tensor:
    """The product by the dense weight."""
    numbers = NUMBERS[str(packed.format)]
    return multiply_expanded(numbers, x, packed["lines"], packed["starts"], None, packed.shape[0])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_few_tokens_are_right(
    format: str, dtype: torch.dtype, shape: tuple[int, int], density: float
) -> None:
    packed, bias = layer_of(format, dtype, shape, density)
    meant = packed.format.unpack(packed.stored())
    for tokens in (1, 3, 8, 9, 16):
        offset = bias if tokens % 2 else None
        x = tokens_on_gpu(tokens, shape[1], dtype)
        found = run(packed, x, offset)
        assert found.dtype == dtype and found.shape == (tokens, shape[0])
        exact = exact_linear(x, meant, offset)
        allowed = allowed_error(x, packed.stored().dense(), offset, meant)
        assert (found.double() - exact).abs().max() <= allowed
        for _ in range(3):
            assert torch.equal(run(packed, x, offset), found)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_dense_weight_comes_back(
    format: str, dtype: torch.dtype, shape: tuple[int, int], density: float
) -> None:
    """One input is one at each column in turn: what comes out are the columns, bit for bit."""
    packed, _ = layer_of(format, dtype, shape, density)
    eye = torch.eye(shape[1], dtype=dtype, device="cuda")
    found = run_expanded(packed, eye)
    assert torch.equal(found.t(), packed.stored().dense())
    assert torch.equal(run(packed, eye[:7], None), found[:7])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_lie_otherwise(format: str) -> None:
    packed, bias = layer_of(format, torch.bfloat16, (530, 1992), 0.5)
    x = tokens_on_gpu(9, 1992, torch.bfloat16)
    wanted = run(packed, x, bias)
    moved = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for given in (x.t().contiguous().t(), torch.stack((x, -x), 2).flatten(1)[:, ::2], moved):
        assert torch.equal(run(packed, given, bias), wanted)
    assert run(packed, x[:0], bias).shape == (0, 530)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_holds_one_form_and_gives_the_stored_one_back(format: str) -> None:
    packed, bias = layer_of(format, torch.bfloat16, (1024, 2048), 0.3)
    stored, meant = packed.stored(), packed.format.unpack(packed.stored())
    layer = SparseLinear(stored, torch.nn.Parameter(bias), "layer")
    layer.use((("decode", MOST_TOKENS), ("expand", 2**62), ("reference", None)))
    assert set(layer.held_bytes) == set(packed.tensors)
    x = tokens_on_gpu(100, 2048, torch.bfloat16)
    with torch.no_grad():
        for tokens in (1, 16, 17, 100):
            exact = exact_linear(x[:tokens], meant, bias)
            allowed = allowed_error(x[:tokens], stored.dense(), bias, meant)
            assert (layer(x[:tokens]) - exact).abs().max() <= allowed
    saved = layer.state_dict()
    for name, tensor in stored.tensors.items():
        assert torch.equal(saved[name], tensor)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_chain_in_a_graph_gives_the_same_bits(format: str) -> None:
    """Each result is the next input, and kernels start before the one ahead has ended."""
    packed, _ = layer_of(format, torch.bfloat16, (1024, 1024), 0.5)
    gain = float(packed.stored().dense().float().norm()) / 32
    first = tokens_on_gpu(8, 1024, torch.bfloat16)

    def chain(wait: bool) -> Tensor:
        y = first
        for _ in range(12):
            y = run(packed, y, None)
            if wait:
                torch.cuda.synchronize()
            y = y / gain
        return y

    wanted = chain(wait=True)
    assert wanted.isfinite().all() and wanted.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(10):
        graph.replay()
        assert torch.equal(found, wanted)
