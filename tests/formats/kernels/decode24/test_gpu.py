"""The decode kernel on a GPU: every format, number type and token count, alone and in chains."""

import copy
import fcntl
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear
from secateur.formats.format import dequantised
from secateur.formats.kernels.decode24.arrange import FORMATS, Kind
from secateur.formats.kernels.decode24.choose import choose
from secateur.formats.kernels.decode24.config import BUCKETS, Case, LaunchConfig
from secateur.formats.kernels.decode24.launch_configs import MOST_BYTES, PORTABLE
from secateur.formats.kernels.decode24.multiply import ARGUMENTS, SOURCE, prepared
from secateur.formats.kernels.decode24.tune import Problem, compile_all, error, problem
from secateur.formats.kernels.launch import Launch, _load, load, prepare
from tests.formats.weights import layer_on_gpu
from tests.formats.weights import tokens_on_gpu as inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((16, 64), (528, 1984), (1024, 2048))  # least, ragged, even
TOKENS = (1, 2, 3, 8, 9, 16, 17, 32, 33, 64)
CONFIGS = [
    "2,4,2,1,1,4,0,0,0,1,2", "2,4,2,1,1,4,1,0,0,0,4", "4,3,2,2,2,3,1,0,0,0,0",
    "1,4,2,1,1,3,2,3,0,0,1", "8,4,1,1,1,2,1,0,0,0,2", "2,4,2,1,1,2,1,0,1,0,0",
    "1,8,1,1,1,3,2,3,1,0,0", "4,12,1,2,1,2,1,4,1,0,3",
]  # fmt: skip
GIVEN_KINDS = (
    *(Kind.W16, Kind.INT4, Kind.FP8, Kind.W16_48, Kind.INT4_48, Kind.INT8_ALL, Kind.INT4_ALL),
)
GIVEN = [
    (case, config)
    for config in map(LaunchConfig.parse, CONFIGS)
    for kind in GIVEN_KINDS
    for tokens in (1, 7, 16, 40)
    for case in [Case(kind, kind.numbers is Kind.INT4, torch.bfloat16, 1056, 1984, tokens)]
    if config.shared_bytes(case.widest) + config.static_bytes <= MOST_BYTES
    and not (config.warpgroup and kind.on_dense_cores)
]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def selected(session: pytest.Session, name: str) -> list[Any]:
    """The distinct values of a parameter in this file's tests that are to run."""
    items = [item for item in session.items if item.path == Path(__file__)]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(params[name] for params in calls if name in params))


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels of this file at once, in parallel: one after another they would take minutes.

    Of processes that share the tests one compiles, and the others wait for what it has kept.
    """
    if not torch.cuda.is_available():
        return
    cases = [
        Case(*FORMATS[format], dtype, *shape, most)
        for format in selected(request.session, "format")
        for dtype in DTYPES
        for shape in SHAPES
        for most in BUCKETS
    ]
    chosen = [(case, choose(case, device())) for case in cases]
    wanted = selected(request.session, "case")
    given = [(case.widest, config) for case, config in GIVEN if case in wanted]
    with (tmp_path_factory.getbasetemp().parent / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_all(chosen + given, device(), None)


@cache  # packing takes longer than the tests
def layer_of(
    format: str, dtype: torch.dtype, shape: tuple[int, int], bias: bool = True
) -> SparseLinear:
    """A packed layer of random weights that runs the kernel, and nothing else up to 64 tokens.

    Shared by the tests: none may change it.
    """
    return layer_on_gpu(format, dtype, shape, bias, (("decode", 64), ("reference", None)))


def held_to_float64(layer: SparseLinear, x: Tensor) -> None:
    """An error of at most twice the reference's, and one rounding of the result and of its sums."""
    weight = dequantised(layer.packed).double()
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = x.double() @ weight.T + bias
    packed = layer.packed
    reference = next(e for e in layer.format.implementations if e.name == "reference")
    theirs = (reference.linear(x, packed, layer.bias).double() - exact).abs().max()
    magnitude = (x.double().abs() @ weight.abs().T).max()
    rounding = torch.finfo(x.dtype).eps * exact.abs().max() + 2.0**-23 * magnitude
    assert (layer(x).double() - exact).abs().max() <= 2 * (theirs + rounding)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_right(
    format: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    held_to_float64(
        layer_of(format, dtype, shape, bias=tokens % 2 == 1), inputs(tokens, shape[1], dtype)
    )


@pytest.mark.parametrize("format", FORMATS)
def test_zero_weights_and_padding_are_zero(format: str) -> None:
    layer = layer_of(format, torch.bfloat16, (528, 1984), bias=False)
    one = torch.zeros(3, 1984, device="cuda", dtype=torch.bfloat16)
    assert not layer(one).any()
    one[1, 5] = 1
    column = dequantised(layer.packed)[:, 5].to(torch.bfloat16)
    assert torch.equal(layer(one)[1], column)
    assert not layer(one)[0].any()


@pytest.mark.parametrize("exponent", [-20, -6, 6, 20])
@pytest.mark.parametrize("format", ["semi24_int4", "semi24_fp8", "semi48_int4", "int4", "int8"])
def test_range_of_activations(format: str, exponent: int) -> None:
    """Codes and activations are scaled by powers of two on the way; it must not show."""
    layer = layer_of(format, torch.bfloat16, (1024, 2048), bias=False)
    x = inputs(4, 2048, torch.bfloat16)
    assert torch.equal(layer(x * 2.0**exponent), layer(x) * 2.0**exponent)


@pytest.mark.parametrize("format", ["semi24", "semi24_int4", "semi48", "semi48_int4", "int4"])
def test_shapes_of_the_input(format: str) -> None:
    layer = layer_of(format, torch.bfloat16, (1024, 2048))
    x = inputs(12, 2048, torch.bfloat16)
    y = layer(x)
    assert layer(x[:0]).shape == (0, 1024)
    assert torch.equal(layer(x.view(2, 6, 2048)).view(12, 1024), y)
    assert torch.equal(layer(x.T.contiguous().T), y)  # not contiguous
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(12, 2048)
    assert shifted.data_ptr() % 16
    assert torch.equal(layer(shifted), y)
    held_to_float64(layer, inputs(65, 2048, torch.bfloat16))  # the reference's turn


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("format", ["semi24", "semi24_int4", "semi48", "semi48_int4", "int4"])
def test_repeats_give_the_same_bits(format: str, tokens: int) -> None:
    layer = layer_of(format, torch.bfloat16, (1024, 2048))
    x = inputs(tokens, 2048, torch.bfloat16)
    y = layer(x)
    assert all(torch.equal(layer(x), y) for _ in range(20))


# ---- one kernel behind another ------------------------------------------------------------------


def launches(case: Case) -> tuple[Launch, Launch]:
    """The case's kernel, launched dependent on the one before and plainly."""
    config = choose(case.widest, device())
    return tuple(prepared(case.widest, config, device(), dependent) for dependent in (True, False))


def run_chain(launch: Launch, found: Problem, first: Tensor, links: int, between: bool) -> Tensor:
    """What comes out when each kernel reads what the one before has written, in a graph."""
    buffers = [first.clone(), torch.full_like(first, float("nan"))]
    graph = torch.cuda.CUDAGraph()
    torch.mul(buffers[0], 1.0, out=buffers[0])
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for link in range(links):
            x, y = buffers[link % 2], buffers[(link + 1) % 2]
            _, weight, scales, *rest = found.arguments(link, y)
            launch(stream, x.data_ptr(), weight, scales, *rest)
            if between and link % 3 == 0:
                torch.mul(y, 0.5, out=y)  # a kernel that knows nothing of dependent launch
    graph.replay()
    return buffers[links % 2].clone()


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
@pytest.mark.parametrize("kind", [Kind.W16, Kind.INT4, Kind.W16_48, Kind.INT4_48, Kind.INT4_ALL])
def test_a_dependent_chain_gives_the_plain_chains_bits(
    kind: Kind, tokens: int, between: bool
) -> None:
    """Each result is the next input; a kernel that began to read too early would show."""
    case = Case(kind, kind.numbers is Kind.INT4, torch.bfloat16, 4096, 4096, tokens)
    found = problem(case, device(), cold_bytes=300 * 2**20)
    # so scaled that results neither grow nor die: |y| ~ |x| at a factor of 1 in the mean
    first = torch.randn_like(found.x)
    gain = float(found.exact.norm() / found.x.double().norm())
    scaled = scale_weights(found, 1 / gain)
    dependent, plain = launches(case)
    for links in (2, 60):
        expected = run_chain(plain, scaled, first, links, between)
        assert expected.isfinite().all() and expected.abs().max() > 0
        for _ in range(5):
            assert torch.equal(run_chain(dependent, scaled, first, links, between), expected)


def scale_weights(found: Problem, factor: float) -> Problem:
    """The same problem with weights times a power of two near the factor, in the arranged bytes."""
    power = torch.tensor(factor).log2().round().exp2()
    units = found.weights
    if found.case.kind.numbers is Kind.W16:
        units[..., :2048] = (units[..., :2048].view(torch.bfloat16) * power).view(torch.uint8)
    else:
        units[..., -32:] = (units[..., -32:].view(torch.bfloat16) * power).view(torch.uint8)
    torch.cuda.synchronize()
    return found


def test_weights_written_by_the_kernel_just_before() -> None:
    """Weights are read before the wait for that kernel, which is safe because it has ended."""
    layer = layer_of("semi24", torch.bfloat16, (1024, 2048))
    x = inputs(1, 2048, torch.bfloat16)
    expected = layer(x)
    for _ in range(200):
        assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_layers_of_different_formats_in_one_chain() -> None:
    layers = [layer_of(format, torch.bfloat16, (2048, 2048)) for format in FORMATS]
    x = inputs(4, 2048, torch.bfloat16)
    expected = x
    for layer in layers:
        torch.cuda.synchronize()
        expected = layer(expected)
    torch.cuda.synchronize()
    for _ in range(20):
        y = x
        for layer in layers:
            y = layer(y)
        assert torch.equal(y, expected)


# ---- through SparseLinear -----------------------------------------------------------------------


@pytest.mark.parametrize("format", ["semi24_int4", "semi48", "semi48_int4", "int4"])
def test_a_captured_layer_reads_its_input_anew(format: str) -> None:
    layer = layer_of(format, torch.bfloat16, (1024, 2048))
    x = inputs(3, 2048, torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        x.copy_(inputs(3 + seed, 2048, torch.bfloat16)[:3])
        graph.replay()
        assert torch.equal(y, layer(x))


def test_an_uncompiled_kernel_is_refused_in_a_capture() -> None:
    layer = layer_of("semi24", torch.bfloat16, (96, 320))
    x = inputs(1, 320, torch.bfloat16)
    _load.cache_clear()  # another layer may have loaded the same kernel
    with pytest.raises(RuntimeError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x * 1)  # torch warns of a graph with nothing in it
    held_to_float64(layer, x)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_state_and_files(format: str, tmp_path: Path) -> None:
    model = nn.Sequential(layer_of(format, torch.bfloat16, (1024, 2048)))
    x = inputs(2, 2048, torch.bfloat16)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    moved = copy.deepcopy(model).to("cpu")
    assert "decode" not in moved[0].dispatch
    moved = moved.to("cuda")
    assert moved[0].dispatch.startswith("decode<=64 ")
    assert torch.equal(moved(x), y)
    blank = copy.deepcopy(model)
    for buffer in blank.buffers():
        buffer.zero_()
    blank.load_state_dict(model.state_dict())
    assert torch.equal(blank(x), y)
    sc.save(model, tmp_path / "packed")
    skeleton = nn.Sequential(nn.Linear(2048, 1024, device="cuda", dtype=torch.bfloat16))
    loaded = sc.load(tmp_path / "packed", skeleton).to("cuda")
    assert torch.equal(loaded(x), y)


def test_gradients_reach_the_input() -> None:
    layer = layer_of("semi24", torch.bfloat16, (1024, 2048))
    x = inputs(2, 2048, torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    expected = dequantised(layer.packed).sum(0).to(torch.bfloat16)
    torch.testing.assert_close(x.grad[0], expected, rtol=2e-2, atol=2e-2)


# ---- other ways to compile it -------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "grouped"), FORMATS.values(), ids=FORMATS)
def test_the_portable_form_is_right(
    kind: Kind, grouped: bool, dtype: torch.dtype, tokens: int
) -> None:
    """What older GPUs run, compiled for this one."""
    case = Case(kind, grouped, dtype, 272, 448, tokens)
    kernel = load(SOURCE, PORTABLE.defines(case.widest, portable=True), device())
    grid = PORTABLE.clusters(case)
    shared_bytes = PORTABLE.shared_bytes(case.widest)
    launch = prepare(kernel, grid, 1, PORTABLE.threads, shared_bytes, False, ARGUMENTS)
    assert error(problem(case, device(), 1), launch, device()) < 2e-3


@pytest.mark.parametrize(("case", "config"), GIVEN, ids=str)
def test_every_kind_of_launch_config_is_right(case: Case, config: LaunchConfig) -> None:
    if config.warpgroup and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90 for wgmma")
    launch = prepared(case.widest, config, device())
    assert error(problem(case, device(), 1), launch, device()) < 2.5e-3
