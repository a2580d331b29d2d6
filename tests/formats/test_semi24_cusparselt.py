"""The implementations `cusparselt` and `dense` of semi24, and what a layer runs by default."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear, parse_format
from secateur.formats.kernels import cusparselt_child
from secateur.formats.kernels.cusparselt import Setting
from secateur.formats.kernels.gpu import why_no_gpu
from secateur.formats.semi24 import Semi24, cusparselt, dense
from tests.formats.kernels.fake_cusparselt import Fake, forget, install
from tests.formats.weights import (
    allowed_error,
    exact_linear,
    fitting_weight,
    layer_on_gpu,
    tokens_in,
    tokens_on_gpu,
)

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

OUT, WIDTH = 48, 64
TYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    """The library on this CPU, with an algorithm that is wrong and one that is fastest."""
    us = {Setting(0): 3.0, Setting(1): 1.0, Setting(2): 2.0}
    yield install(monkeypatch, tmp_path / "cache", Fake(us, wrong={Setting(1)}))
    forget()


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No implementation asks for a GPU; decode keeps to its 64 tokens."""

    def few(packed: object, tokens: int) -> str | None:
        return None if tokens <= 64 else "at most 64 tokens"

    def any_number(packed: object, tokens: int) -> str | None:
        return None

    asked = {"decode": few, "cusparselt": any_number, "dense": any_number}
    here = tuple(
        replace(entry, why_not=asked.get(entry.name, entry.why_not))
        for entry in Semi24.implementations
    )
    monkeypatch.setattr(Semi24, "implementations", here)


def layer_in(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> SparseLinear:
    packed = parse_format("semi24").pack(fitting_weight("semi24", OUT, WIDTH, dtype))
    offset = nn.Parameter(tokens_in(OUT, dtype=dtype, seed=5)) if bias else None
    return SparseLinear(packed, offset, "layer", (("cusparselt", None),))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 100])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_right(fake: Fake, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    layer = layer_in(dtype, bias)
    x = tokens_in(tokens, WIDTH, dtype=dtype)
    y = layer(x).detach()
    weight = fitting_weight("semi24", OUT, WIDTH, dtype)
    error = (y.double() - exact_linear(x, weight, layer.bias)).abs().max()
    assert float(error) <= allowed_error(x, weight, layer.bias)
    assert fake.seen[-1] == Setting(2)  # 1 is faster, and wrong
    assert fake.tokens[-1] == -(-tokens // 16) * 16


@pytest.mark.usefixtures("anywhere")
def test_a_bucket_is_searched_once(fake: Fake) -> None:
    layer = layer_in()
    layer(tokens_in(40, WIDTH, dtype=torch.bfloat16))
    count = len(fake.seen)
    assert count > 10
    layer(tokens_in(2, 32, WIDTH, dtype=torch.bfloat16))  # as many, in two dimensions
    copy.deepcopy(layer)(tokens_in(33, WIDTH, dtype=torch.bfloat16))
    assert len(fake.seen) == count + 2
    layer(tokens_in(65, WIDTH, dtype=torch.bfloat16))
    assert len(fake.seen) > count + 10


@pytest.mark.usefixtures("anywhere")
def test_gradients_reach_input_and_bias(fake: Fake) -> None:
    layer = layer_in()
    x = tokens_in(3, WIDTH, dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    weight = fitting_weight("semi24", OUT, WIDTH, torch.bfloat16)
    ones = torch.ones(3, OUT, dtype=torch.bfloat16)
    assert torch.equal(x.grad, ones @ weight)
    assert torch.equal(layer.bias.grad, ones.sum(0))


@pytest.mark.usefixtures("anywhere")
def test_the_arrangements_are_never_saved_and_are_counted(fake: Fake) -> None:
    layer = layer_in()
    dense_bytes = 2 * OUT * WIDTH
    assert set(layer.state_dict()) == {"values", "metadata", "bias"}
    layer.use((("dense", None),))
    assert layer.nbytes == 0.5625 * dense_bytes + dense_bytes
    layer.use((("dense", 16), ("cusparselt", None)))
    assert set(layer.state_dict()) == {"values", "metadata", "bias"}
    assert layer.nbytes == 0.5625 * dense_bytes + 2 * dense_bytes  # the fake's blob is dense
    x = tokens_in(16, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert fake.seen == []
    layer(tokens_in(17, WIDTH, dtype=torch.bfloat16))
    assert fake.seen


@pytest.mark.usefixtures("anywhere")
def test_another_weight_is_arranged_anew(fake: Fake) -> None:
    layer, other = layer_in(), layer_in()
    other.load_state_dict(
        {name: tensor * (name != "bias") for name, tensor in layer_in().state_dict().items()}
        | {"values": -layer.values}
    )
    assert other.dispatch == "decode<=64 reference" and set(other.held_bytes) == {"units"}
    other.use((("cusparselt", None),))
    x = tokens_in(80, WIDTH, dtype=torch.bfloat16)
    weight = fitting_weight("semi24", OUT, WIDTH, torch.bfloat16)
    assert torch.equal(other(x), -(x.double() @ weight.double().t()).bfloat16())
    half = layer_in().to(torch.float16)  # the opaque blob is not what is cast
    assert half.dispatch == "decode<=64 reference"  # which holds no second copy
    half.use((("cusparselt", None),))
    weight = fitting_weight("semi24", OUT, WIDTH, torch.bfloat16).half()
    x = x.half()
    error = (half(x).detach().double() - exact_linear(x, weight, half.bias)).abs().max()
    assert float(error) <= allowed_error(x, weight, half.bias)


@pytest.mark.usefixtures("anywhere")
def test_a_capture_needs_a_call_before_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_in()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = tokens_in(100, WIDTH, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"48x64 bias bfloat16 at up to 128 tokens.*warmup\("):
        layer(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sc.warmup(layer, tokens=(70,))  # of the same bucket
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert layer(x).shape == (100, OUT)


# ---- where they can run -------------------------------------------------------------------------


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)


class Elsewhere:
    """A packed weight as `why_not` reads it: shape, dtype and device."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.values = self
        self.device = torch.device("cuda:0")


@pytest.mark.usefixtures("unchecked")
def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    for dtype in TYPES:
        for tokens in (1, 10**6):
            assert cusparselt.why_not(Elsewhere((48, 64), dtype), tokens) is None
            assert dense.why_not(Elsewhere((40, 60), dtype), tokens) is None
    assert "got 40 x 64: pad" in cusparselt.why_not(Elsewhere((40, 64), torch.float16), 1)
    assert "got float32" in cusparselt.why_not(Elsewhere((48, 64), torch.float32), 1)
    reason = dense.why_not(Elsewhere((48, 64), torch.float32), 1)
    assert reason == (
        "running dense needs bfloat16 or float16, got torch.float32: leave the layer unpacked, "
        "nothing multiplies it sparse"
    )


def test_on_a_cpu_neither_runs() -> None:
    packed = parse_format("semi24").pack(fitting_weight("semi24", OUT, WIDTH, torch.bfloat16))
    told = why_no_gpu(torch.device("cpu"))
    assert told is not None and cusparselt.why_not(packed, 100) == told
    assert dense.why_not(packed, 100) == told
    layer = SparseLinear(packed)
    assert layer.dispatch == "reference"
    for name in ("cusparselt", "dense"):
        with pytest.raises(ValueError, match=f"cannot run {name} here: .*needs a CUDA GPU"):
            layer.use(((name, None),))


# ---- on a GPU -----------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not torch.backends.cusparselt.is_available(), reason="needs a torch with cuSPARSELt"
    ),
]


def gpu(test):  # type: ignore[no-untyped-def]
    """The test runs on a GPU whose torch has the library, else it is skipped."""
    for mark in on_gpu:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache in place of the user's: what is tested is searched here, among a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cusparselt_child, "MODULE", "tests.formats.kernels.small_child")
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SECATEUR_CACHE", str(folder))
        forget()
        yield folder
    cusparselt_child.end_child()
    forget()


def gpu_layer(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (256, 512),
    bias: bool = True,
) -> SparseLinear:
    """A packed layer of random weights that runs cuSPARSELt alone."""
    return layer_on_gpu("semi24", dtype, shape, bias, (("cusparselt", None),))


def gpu_inputs(tokens: int, width: int = 512, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return tokens_on_gpu(tokens, width, dtype)


def held_to_float64(layer: SparseLinear, x: Tensor) -> None:
    """An error of at most twice the reference's, and one rounding of the result and of its sums."""
    weight = torch.Tensor(layer.weight).double()
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = x.double() @ weight.T + bias
    theirs = nn.functional.linear(x, weight.to(x.dtype), layer.bias)
    error = (theirs.double() - exact).abs().max()
    magnitude = (x.double().abs() @ weight.abs().T).max()
    rounding = torch.finfo(x.dtype).eps * exact.abs().max() + 2.0**-23 * magnitude
    assert (layer(x).double() - exact).abs().max() <= 2 * (error + rounding)


@gpu
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("tokens", [1, 17, 100, 256, 1000, 4096])
@pytest.mark.parametrize("shape", [(256, 512), (6144, 4096)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_right_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> None:
    bias = (tokens % 2 == 1) == (dtype == torch.bfloat16)  # each with and without
    layer = gpu_layer(dtype, shape, bias)
    held_to_float64(layer, gpu_inputs(tokens, shape[1], dtype))


@gpu
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("bias", [False, True])
def test_a_whole_bucket_is_right_on_a_gpu(bias: bool) -> None:
    """All of it runs what was searched for its most tokens."""
    layer = gpu_layer(shape=(1024, 2048), bias=bias)
    for tokens in (257, 300, 400, 500, 511, 512):
        for _ in range(3):
            held_to_float64(layer, gpu_inputs(tokens, 2048))


@gpu
@pytest.mark.usefixtures("cache")
def test_shapes_of_the_input_on_a_gpu() -> None:
    layer = gpu_layer()
    x = gpu_inputs(100)
    y = layer(x)
    assert y.is_contiguous() and y.shape == (100, 256)
    assert layer(x[:0]).shape == (0, 256)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(100, 512)
    assert shifted.data_ptr() % 16
    for other in (x.view(2, 5, 10, 512), x.T.contiguous().T, shifted):
        torch.testing.assert_close(layer(other).view(100, 256), y, rtol=1e-2, atol=1e-2)
    held_to_float64(layer, shifted)


@gpu
def test_a_setting_is_searched_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = gpu_layer(shape=(320, 512)), gpu_inputs(100)
    layer(x)
    assert "bfloat16 320x512 bias bfloat16" in (cache / "cusparselt.json").read_text()

    def never(*arguments: object) -> object:
        raise AssertionError("searched again")

    monkeypatch.setattr("secateur.formats.kernels.cusparselt_settings.searched", never)
    forget()
    held_to_float64(layer, x)


@gpu
@pytest.mark.usefixtures("cache")
def test_a_graph_is_captured_after_a_warm_up() -> None:
    layer, x = gpu_layer(shape=(352, 512)), gpu_inputs(90)
    with (
        pytest.raises(RuntimeError, match=r"call warmup\(model"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x * 1)  # torch warns of a graph with nothing in it
    sc.warmup(layer, tokens=(128,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        x.copy_(gpu_inputs(90 + seed)[:90])
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=1e-2, atol=1e-2)


@gpu
@pytest.mark.usefixtures("cache")
def test_copies_state_and_devices() -> None:
    layer, x = gpu_layer(), gpu_inputs(100)
    held_to_float64(copy.deepcopy(layer), x)
    moved = copy.deepcopy(layer).to("cpu")
    assert moved.dispatch == "reference" and moved.nbytes == 0.5625 * 2 * 256 * 512
    moved = moved.to("cuda")
    assert "cusparselt" not in moved.dispatch  # a default holds no second copy of the weight
    held_to_float64(moved, x)
    blank = copy.deepcopy(layer)
    for buffer in blank.buffers():
        buffer.zero_()
    blank.load_state_dict(layer.state_dict())
    held_to_float64(blank, x)
    held_to_float64(copy.deepcopy(layer).to(torch.float16), x.half())


@gpu
@pytest.mark.usefixtures("cache")
def test_the_blob_has_the_documented_bytes() -> None:
    for shape in ((256, 512), (6144, 4096)):
        layer = gpu_layer(shape=shape)
        assert layer.nbytes == 2 * 0.5625 * 2 * shape[0] * shape[1]


@gpu
@pytest.mark.usefixtures("cache")
def test_dense_between_the_two() -> None:
    layer = gpu_layer()
    layer.use((("dense", 512), ("cusparselt", None)))
    x = gpu_inputs(200)
    weight = torch.Tensor(layer.weight)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    held_to_float64(layer, gpu_inputs(600))


@gpu
@pytest.mark.usefixtures("cache")
def test_gradients_reach_the_input_on_a_gpu() -> None:
    layer = gpu_layer()
    x = gpu_inputs(100).requires_grad_()
    layer(x).sum().backward()
    expected = torch.Tensor(layer.weight).float().sum(0).to(torch.bfloat16)
    torch.testing.assert_close(x.grad[0], expected, rtol=2e-2, atol=2e-2)


@gpu
@pytest.mark.usefixtures("cache")
def test_a_search_inside_inference_mode_and_autocast() -> None:
    layer, x = gpu_layer(torch.float16, (384, 512)), gpu_inputs(100, dtype=torch.float16)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        layer(x)
    held_to_float64(layer, x)
