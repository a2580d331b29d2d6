"""Linear layers that train in 2:4: values and gradients held to dense ones with the same zeros."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import training
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.kernels.both_ways.reference import kept
from secateur.formats.training import TrainingLinear, linear
from tests.formats import two_training
from tests.formats.weights import allowed_error, exact_linear

SHAPE = (192, 320)


def operands(
    dtype: torch.dtype, stored: torch.dtype, tokens: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(SHAPE, generator=generator).to(stored) * SHAPE[1] ** -0.5
    bias = torch.randn(SHAPE[0], generator=generator).to(stored)
    x = torch.randn(tokens, SHAPE[1], generator=generator).to(dtype)
    return tuple(t.to(device).requires_grad_() for t in (x, weight, bias))  # type: ignore[return-value]


def held_to_float64(
    selection: Selection, dtype: torch.dtype, stored: torch.dtype, is_packed: bool, device: str
) -> None:
    x, weight, bias = operands(dtype, stored, 300, device)
    grad = torch.randn(300, SHAPE[0], device=device).to(dtype)
    found = linear(x, weight, bias, selection, is_packed)
    of_x, of_weight, of_bias = torch.autograd.grad(found, [x, weight, bias], grad)
    assert (found.dtype, of_x.dtype, of_weight.dtype, of_bias.dtype) == (
        dtype,
        dtype,
        stored,
        stored,
    )
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    of_rows, of_columns = kept(weight, selection)
    forward = weight.to(dtype).masked_fill(~of_rows, 0)
    back = forward.masked_fill(~of_columns, 0)
    for result, *given in (
        (found, x, forward, bias.to(dtype)),
        (of_x, grad, back.t(), None),
        (of_weight.to(dtype), grad.t(), x.t(), None),
    ):
        exact = exact_linear(*given)
        assert (result.double() - exact).abs().max() <= allowed_error(*given)
    wanted = grad.double().sum(0)
    assert (of_bias.double() - wanted).abs().max() <= 2 * torch.finfo(
        dtype
    ).eps * wanted.abs().max()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selection", Selection, ids=str)
def test_values_and_gradients(selection: Selection, stored: torch.dtype, is_packed: bool) -> None:
    held_to_float64(selection, torch.bfloat16, stored, is_packed, "cpu")


def test_under_autocast_it_runs_in_its_dtype() -> None:
    x, weight, bias = operands(torch.float32, torch.float32, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x, weight, bias, is_packed=True)
    wanted = linear(x.bfloat16(), weight, bias, is_packed=True)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    (of_weight,) = torch.autograd.grad(found, [weight], torch.ones_like(found))
    assert of_weight.dtype == torch.float32 and of_weight.all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("is_packed", [False, True])
def test_it_compiles_to_one_graph(is_packed: bool) -> None:
    given = operands(torch.bfloat16, torch.bfloat16, 24)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x.unflatten(0, (2, -1)), weight, bias, Selection.ROWS, is_packed)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [(y := run(*given), *torch.autograd.grad(y.sum(), given)) for run in (step, compiled)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_compiles_for_any_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "why_not", lambda *_: None)
    model = two_training.model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (two_training.TOKENS - 1, two_training.TOKENS, 50):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        grads = []
        for run in (model, compiled):
            given = x.clone().requires_grad_()
            run(given).float().square().sum().backward()
            grads.append(given.grad)
        assert torch.equal(*grads)


def test_two_processes_have_the_gradients_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "why_not", training.why_not)  # puts it back
    code = "import sys; from tests.formats.two_training import one_of_two as f; f(*sys.argv[1:])"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    wanted = two_training.gradients([0, 1])
    assert [process.wait() for process in processes] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for ours, whole in zip(found, wanted, strict=True):
            # each of the two, their mean and the whole are rounded once
            eps = torch.finfo(whole.dtype).eps
            assert (ours - whole).abs().max() <= 2 * eps * whole.abs().max()


def test_a_copy_of_a_layer_is_one() -> None:
    layer = two_training.model()[0]
    copied = copy.deepcopy(layer)
    assert type(copied) is TrainingLinear and copied.least_tokens == layer.least_tokens
    assert str(layer).endswith("bias=True, least_tokens=32)")
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.restore()
    assert type(layer) is nn.Linear and "least_tokens" not in str(layer)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x, weight, bias = operands(torch.float32, torch.float32, 8)
    (of_x,) = torch.autograd.grad(linear(x, weight, bias).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_x.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("selection", Selection, ids=str)
def test_values_and_gradients_by_kernels(
    selection: Selection, is_wide: bool, dtype: torch.dtype
) -> None:
    held_to_float64(selection, dtype, torch.float32 if is_wide else dtype, True, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_step_gives_the_same_bits() -> None:
    x, weight, bias = operands(torch.bfloat16, torch.bfloat16, 300, "cuda")

    def step() -> tuple[Tensor, ...]:
        y = linear(x, weight, bias, Selection.TILES, True)
        return torch.autograd.grad(y, [x, weight, bias], y.detach())

    wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(10):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
