"""Compilers and exporters, each in a plain process: dynamo and shape checking do not mix.

The runtime checks wrap every function, which breaks graphs (pytorch#122093).

Run as a script with the name of a check, this file runs that check.
"""

import copy
import io
import itertools
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from math import log2
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if __name__ == "__main__":  # the checks import the same helpers as the tests
    sys.path.insert(0, str(Path(__file__).parents[2]))
    WITH_TORCH = frozenset(sys.modules)  # it imports the driver's bindings where they are installed

from secateur import unpack_
from secateur.core.undo import Undo
from secateur.formats import SparseLinear
from secateur.formats.fuse import Fused, fuse_activations_
from secateur.formats.kernels import decode24
from secateur.formats.op import linear_operator
from tests.formats.weights import (
    DYNAMIC,
    FORMATS,
    QUANTISED,
    fitting_weight,
    packed_weight,
    sparse_linear,
    tokens_in,
)


class Block(nn.Module):
    """Two packed layers of one format with something between them."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.up = sparse_linear(format, 32, 24)
        self.down = sparse_linear(format, 24, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def check_fullgraph() -> None:
    """One graph a model, the same results, gradients to the input and the bias, any tokens."""
    for format in FORMATS:
        model = Block(format)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (3, 5, 17):
            x = tokens_in(tokens, 24).requires_grad_()
            grads, results = [], []
            for run in (model, compiled):
                results.append(run(x))
                grads.append(torch.autograd.grad(results[-1].square().sum(), (x, model.up.bias)))
            assert torch.allclose(*results, atol=1e-6)
            assert torch.allclose(grads[0][0], grads[1][0], atol=1e-4)
            assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, format


def check_one_form() -> None:
    """A layer that holds what the decode kernel reads, at more tokens than it takes."""
    able = decode24.why_not
    os.environ["SECATEUR_CPU_BODY"] = "none"  # as on a GPU
    decode24.why_not = lambda shape, dtype, device, tokens: None if tokens <= 4 else "too many"
    try:
        for format in (name for name in FORMATS if name.startswith("semi24")):
            if format in DYNAMIC:
                continue
            layer = sparse_linear(format, 32, 192, torch.bfloat16)
            assert "units" in layer.held_bytes and layer.dispatch == "decode<=4 reference"
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            x = tokens_in(5, 192, dtype=torch.bfloat16).requires_grad_()
            grads = [torch.autograd.grad(run(x).sum(), x)[0] for run in (layer, compiled)]
            assert torch.equal(layer(x), compiled(x)) and torch.equal(*grads)
            exported = torch.export.export(nn.Sequential(layer), (x.detach(),)).module()
            assert torch.equal(exported(x.detach()), layer(x))
    finally:
        decode24.why_not = able
        del os.environ["SECATEUR_CPU_BODY"]


def check_autocast() -> None:
    """One graph under autocast too, with its dtype; a 16-bit weight of another dtype included."""
    for format in FORMATS:
        for dtype in (torch.float32, torch.float16):
            model = Block(format).to(dtype)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            x = tokens_in(5, 24).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results = [run(x) for run in (model, compiled)]
            assert torch.allclose(*results, atol=1e-1, rtol=2e-2)  # fused, it rounds elsewhere
            assert all(result.dtype == torch.float32 for result in results)  # x + ...
            grads = [torch.autograd.grad(r.square().sum(), (x, model.up.bias)) for r in results]
            for one, other in zip(*grads, strict=True):
                assert one.dtype == other.dtype
                assert torch.allclose(one, other, atol=1.0, rtol=5e-2)


def check_inductor() -> None:
    """The default compiler, once; it needs a C++ compiler, and so does whoever calls it."""
    model = Block("block:4x8").eval()
    x = tokens_in(5, 24)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-6)


def check_export() -> None:
    """A program with a free number of tokens holds one operator a layer, and survives a file."""
    for format in FORMATS:
        model = Block(format).eval()
        free = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}}
        program = torch.export.export(model, (tokens_in(3, 24),), dynamic_shapes=free)
        name = str(linear_operator(model.up.format.name))
        called = [node for node in program.graph.nodes if str(node.target) == name]
        assert len(called) == 2
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, Path(folder) / "model.pt2")
            loaded = torch.export.load(Path(folder) / "model.pt2")
        for tokens in (3, 40):
            x = tokens_in(tokens, 24)
            assert torch.equal(loaded.module()(x), model(x))


class Every(nn.Module):
    """A layer of each format, side by side, with and without a bias."""

    def __init__(self, formats: Sequence[str], out: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            sparse_linear(format, out, width, dtype, bias=i % 2 == 0)
            for i, format in enumerate(formats)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.relu(layer(x)) for layer in self.layers])


def aot_inductor(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as AOTInductor runs it from a file, for any number of tokens."""
    tokens = torch.export.Dim("tokens", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: tokens}})
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "model.pt2")
        )
        loaded: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(path)
    return loaded


def check_aot_inductor() -> None:
    """A program compiled to a shared library runs every format, and what a kernel arranged."""
    model = Every(FORMATS, 32, 24, torch.float32).eval()
    compiled = aot_inductor(model, tokens_in(3, 24))
    for tokens in (3, 40):
        x = tokens_in(tokens, 24)
        for format, found, wanted in zip(FORMATS, compiled(x), model(x), strict=True):
            assert torch.equal(found, wanted), (format, tokens)
    able = decode24.why_not
    decode24.why_not = lambda shape, dtype, device, tokens: None if tokens <= 2 else "too many"
    try:
        of_units = ["semi24", *(name for name in QUANTISED if name.startswith("semi"))]
        held = Every(of_units, 32, 192, torch.bfloat16).eval()
        assert all("units" in layer.held_bytes for layer in held.layers)
        x = tokens_in(5, 192, dtype=torch.bfloat16)
        assert torch.equal(aot_inductor(held, x)(x), held(x))
    finally:
        decode24.why_not = able


def check_a_whole_llama() -> None:
    """One graph of a model with a layer of every format, compiled and exported: equal logits."""
    model, ids = packed_llama(FORMATS, 32, torch.float32), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        program = torch.export.export(model, (ids,), {"use_cache": False})
        assert torch.equal(program.module()(ids, use_cache=False).logits, expected)


def packed_llama(formats: Sequence[str], width: int, dtype: torch.dtype) -> nn.Module:
    """A tiny Llama whose linear layers have these formats, in turn.

    Weights are of the size that keeps activations: larger ones make attention choose one position,
    and another by the next rounding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    names = [name for name, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    assert len(names) >= len(formats)
    for name, format in zip(names, itertools.cycle(formats)):
        out, inputs = model.model.get_submodule(name).weight.shape
        weight = fitting_weight(format, out, inputs, dtype) / 2.0 ** round(log2(inputs) / 2)
        layer = SparseLinear(packed_weight(format, weight), None, name)
        model.model.set_submodule(name, layer)
    return model


def check_onnx_is_refused() -> None:
    """By both exporters of torch, with the remedy; a plain trace is not, and keeps its results."""
    model, x = Block("semi24").eval(), tokens_in(3, 24)
    for dynamo in (True, False):
        try:
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
        except Exception as error:
            assert "ONNX needs dense weights, got layers packed as semi24" in str(error)
            assert "secateur.unpack_(dense)" in str(error)
        else:
            raise AssertionError(dynamo)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))


def check_dispatch_is_not_baked_in() -> None:
    """A program traced with one token still chooses by the tokens of each call."""
    model = Block("block:4x8").eval()
    for layer in (model.up, model.down):
        layer.use((("cpu", 4), ("reference", None)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    seen: list[int] = []
    multiply = torch.bmm

    def watched(left: Tensor, right: Tensor) -> Tensor:
        seen.append(left.shape[1])
        return multiply(left, right)

    torch.bmm = watched
    with torch.no_grad():
        for tokens, calls in ((4, 2), (40, 0), (2, 2)):
            seen.clear()
            compiled(tokens_in(tokens, 24))
            assert len(seen) == calls, (tokens, seen)


class Asking(nn.Module):
    """Asks its layer's weight for the dtype, as T5 in transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = sparse_linear("semi24")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x.to(self.fc.weight.dtype))
        return result


def check_a_weight_can_be_asked_for_its_dtype() -> None:
    """In a full graph and in an exported program."""
    model, x = Asking().eval(), tokens_in(3, 24, dtype=torch.float64)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def check_decode_on_a_gpu() -> None:
    """The default compiler around the decode kernel, with what can be fused left to it."""
    for format in ("semi24", "semi24_int4"):
        layer = sparse_linear(format, 128, 256, torch.bfloat16)
        norm = nn.LayerNorm(256, dtype=torch.bfloat16)
        model = nn.Sequential(norm, layer, nn.GELU()).cuda().eval()
        assert layer.dispatch.startswith("decode<=64"), layer.dispatch
        x = tokens_in(5, 256, dtype=torch.bfloat16).cuda()
        with torch.no_grad():
            compiled, eager = torch.compile(model, fullgraph=True)(x), model(x)
        assert torch.allclose(compiled, eager, rtol=2e-2, atol=2e-2)


def check_blocks_on_a_gpu() -> None:
    """The default compiler around a layer of blocks, whose weight trains."""
    layer = sparse_linear("block:16x32", 128, 256, torch.bfloat16)
    model = nn.Sequential(nn.LayerNorm(256, dtype=torch.bfloat16), layer, nn.GELU()).cuda()
    layer.unfreeze_()
    assert layer.dispatch == "decode<=64 prefill", layer.dispatch
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (5, 300):
        x = tokens_in(tokens, 256, dtype=torch.bfloat16).cuda()
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), rtol=2e-2, atol=2e-2)
        found, wanted = (
            torch.autograd.grad(run(x).float().square().sum(), list(model.parameters()))
            for run in (compiled, model)
        )
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).norm()) <= 2e-2 * float(other.norm())


def check_dynamic_on_a_gpu() -> None:
    """By whatever runs so many tokens here, with the activation behind it; the bits of eager."""
    for format in DYNAMIC:
        layer = sparse_linear(format, 128, 256, torch.bfloat16)
        model = nn.Sequential(layer, nn.GELU()).cuda().eval()
        plain = model(tokens_in(300, 256, dtype=torch.bfloat16).cuda()).detach()
        fuse_activations_(model, Undo())
        assert isinstance(model[1], Fused) == ("prefill" in layer.dispatch), layer.dispatch
        compiled = torch.compile(model, fullgraph=True)
        for tokens in (7, 300):
            x = tokens_in(tokens, 256, dtype=torch.bfloat16).cuda()
            with torch.no_grad():
                found, eager = compiled(x), model(x)
            if layer.activation:
                assert torch.equal(found, eager), (format, layer.dispatch, tokens)
            assert torch.allclose(found, eager, rtol=1e-2, atol=1e-2)
        assert torch.allclose(eager, plain, rtol=1e-2, atol=1e-2), format


def check_aot_inductor_on_a_gpu() -> None:
    """By whatever runs so many tokens here: the bits of eager, in every format that it has."""
    model = Every(FORMATS, 128, 256, torch.bfloat16).cuda().eval()
    compiled = aot_inductor(model, tokens_in(5, 256, dtype=torch.bfloat16).cuda())
    for tokens in (2, 40, 300):
        x = tokens_in(tokens, 256, dtype=torch.bfloat16).cuda()
        with torch.no_grad():
            results = zip(model.layers, compiled(x), model(x), strict=True)
            for layer, found, wanted in results:
                assert torch.equal(found, wanted), (layer, tokens)


def check_a_whole_llama_on_a_gpu() -> None:
    """One graph by the default compiler, which rounds elsewhere between the layers than eager."""
    formats = ("semi24", *QUANTISED)
    model = packed_llama(formats, 256, torch.bfloat16).cuda()
    for layer in (m for m in model.modules() if hasattr(m, "dispatch")):
        assert layer.dispatch.startswith("decode"), layer
    exact = copy.deepcopy(model)
    unpack_(exact)
    exact.double()
    for length in (1, 6):
        ids = torch.arange(2 * length, device="cuda").view(2, length)
        with torch.no_grad():
            wanted = exact(ids, use_cache=False).logits
            eager = model(ids, use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        error = (compiled - wanted).norm() / wanted.norm()
        assert error <= 2 * (eager - wanted).norm() / wanted.norm() + 1e-3, (length, error)


def check_import_is_cheap() -> None:
    """The formats import neither a kernel language nor a model library, beyond what torch does."""
    heavy = ("triton", "cuda", "transformers", "scipy", "pandas")
    new = sorted(set(sys.modules) - WITH_TORCH)
    assert not [name for name in new if name.partition(".")[0] in heavy], new


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_import_is_cheap,  # first: what the others import is no concern of it
        check_fullgraph,
        check_export,
        check_autocast,
        check_one_form,
        check_dispatch_is_not_baked_in,
        check_a_weight_can_be_asked_for_its_dtype,
        check_aot_inductor,
        check_a_whole_llama,
        check_onnx_is_refused,
        check_inductor,
        check_decode_on_a_gpu,
        check_blocks_on_a_gpu,
        check_dynamic_on_a_gpu,
        check_aot_inductor_on_a_gpu,
        check_a_whole_llama_on_a_gpu,
    )
}


SLOW = "inductor"  # half a minute, most of it the C++ compiler
ON_GPU = [name for name in CHECKS if name.endswith("_on_a_gpu")]
IN_ONE_PROCESS = [name for name in CHECKS if name not in (SLOW, *ON_GPU)]
# A process that loads such a package with this version ends by a segmentation fault, on a CPU too.
NOT_LOADED = [n for n in CHECKS if "aot" in n] if torch.__version__.startswith("2.11.") else []


def skip_what_ends_the_process(name: str) -> None:
    if name in NOT_LOADED:
        pytest.skip(f"torch {torch.__version__} crashes when it loads AOTInductor's package")


def run_apart(*names: str) -> str:
    """What a plain process prints when it runs these checks; starting one costs seconds."""
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", __file__, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


@pytest.fixture(scope="module")
def printed() -> str:
    return run_apart(*(name for name in IN_ONE_PROCESS if name not in NOT_LOADED))


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_in_a_plain_process(name: str, printed: str) -> None:
    skip_what_ends_the_process(name)
    assert f"{name} holds" in printed.splitlines(), printed[-3000:]


@pytest.mark.slow
def test_inductor_in_a_plain_process() -> None:
    printed = run_apart(SLOW)
    assert f"{SLOW} holds" in printed.splitlines(), printed[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_in_a_plain_process(name: str) -> None:
    skip_what_ends_the_process(name)
    printed = run_apart(name)
    assert f"{name} holds" in printed.splitlines(), printed[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        try:
            CHECKS[name]()
            print(f"{name} holds")
        except Exception:
            print(f"{name} fails")
            traceback.print_exc()
