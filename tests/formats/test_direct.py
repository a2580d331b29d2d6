"""Calls without the operator: the same bits, only where nothing looks, and of the tensors held."""

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.formats import SparseLinear
from secateur.formats import linear as linear_file
from secateur.formats.kernels import simd
from secateur.formats.op import linear_operator
from tests.formats.weights import FORMATS, sparse_linear, tokens_in

pytestmark = pytest.mark.skipif(
    simd._loaded()[1] is not None, reason=f"no library: {simd._loaded()[1]}"
)
BOUND = tuple(name for name in FORMATS if sparse_linear(name).dispatch.startswith("simd"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each operator that a layer calls from now on."""
    made: list[str] = []

    def operator(name: str) -> Any:
        made.append(name)
        return linear_operator(name)

    monkeypatch.setattr(linear_file, "linear_operator", operator)
    return made


def by_operator(layer: SparseLinear, x: Tensor) -> Tensor:
    operator = linear_operator(layer.format.name)
    result: Tensor = operator(x, *layer._parts(), layer.bias, *layer.shape, layer.dispatch, "")
    return result.detach()


def test_there_are_formats_to_test() -> None:
    assert {"semi24", "semi24_int4", "semi24_int8", "block:4x8"} <= set(BOUND)


@pytest.mark.parametrize("format", BOUND)
@given(data=st.data())
def test_results_are_the_operator_s_bit_for_bit(format: str, data: st.DataObject) -> None:
    lead = data.draw(st.lists(st.integers(0, 7), max_size=3), label="lead")
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"
    )
    layer = sparse_linear(format, 16, 24, dtype, bias=data.draw(st.booleans(), label="bias"))
    x = tokens_in(*lead, 24, dtype=dtype) if lead else tokens_in(24, dtype=dtype)
    if data.draw(st.booleans(), label="strided"):
        x = torch.stack([x, x], -1)[..., 0]
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (*lead, 16) and found.is_contiguous()
    assert torch.equal(found, by_operator(layer, x))


@pytest.mark.parametrize("format", BOUND)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_looks_and_no_operator_runs(
    format: str, mode: Callable[[], Any], calls: list[str]
) -> None:
    layer, x = sparse_linear(format), tokens_in(3, 24)
    with mode():
        layer(x)
        layer(layer(x).new_ones(2, 24))
    assert calls == []
    sparse_linear(format, bias=False)(x)  # nor where gradients are on and nothing asks for any
    assert calls == []
    layer.use((("simd", 2), ("reference", None)))
    with mode():
        layer(x[:2])
        assert calls == []
        layer(x)
    assert calls == [layer.format.name]


# ---- what looks ---------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


OPERATOR = "secateur.semi24_linear.default"


@torch.no_grad()
def test_modes_see_the_operator() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    for mode in (Dispatched(), Called()):
        with mode:
            layer(x)
        assert OPERATOR in mode.names
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert type(layer(fake.from_tensor(x))) is torch._subclasses.FakeTensor


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    layer(x)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x).graph
        assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == [OPERATOR]
    assert "secateur::semi24_linear" in str(torch.jit.trace(layer, (x,)).inlined_graph)
    program = torch.export.export(layer, (x,), strict=False)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [OPERATOR]


@torch.no_grad()
def test_a_profiler_counts_the_operator() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    with torch.autograd.profiler.profile() as seen:
        layer(x)
    assert "secateur::semi24_linear" in {event.name for event in seen.function_events}


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated"
)  # torch's own, for forward AD
def test_transforms_reach_the_operator(calls: list[str]) -> None:
    layer, x = sparse_linear("semi24"), tokens_in(5, 24)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(row) for row in x]))
    assert calls == ["semi24"]
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
    assert calls == ["semi24", "semi24"]


def test_gradients_reach_the_operator(calls: list[str]) -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.bias)
    assert torch.equal(grad, torch.full((16,), 3.0)) and calls == ["semi24"]
    bare, asks = sparse_linear("semi24", bias=False), tokens_in(3, 24).requires_grad_()
    (grad,) = torch.autograd.grad(bare(asks).sum(), asks)
    assert torch.allclose(grad, bare.weight.sum(0).expand(3, 24), atol=1e-6)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad and calls == ["semi24", "semi24"]


@torch.no_grad()
def test_views_that_are_negated_lazily_are_seen() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


@torch.no_grad()
def test_autocast_is_obeyed() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


# ---- what is held -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_layer_that_has_run_is_changed_in_every_way(calls: list[str]) -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    first = layer(x)
    layer.bias.add_(1)
    assert torch.equal(layer(x), by_operator(layer, x)) and not torch.equal(layer(x), first)
    layer.bias = nn.Parameter(torch.zeros(16))
    assert torch.equal(layer(x), by_operator(layer, x))
    layer.bias.data = torch.full((16,), 5.0)
    assert torch.equal(layer(x), by_operator(layer, x))
    layer.bias = nn.Parameter(torch._neg_view(layer.bias))  # at the same address
    assert torch.equal(layer(x), by_operator(layer, x)) and calls.pop()
    layer.bias = None
    assert torch.equal(layer(x), by_operator(layer, x))
    layer.values.mul_(2)
    assert torch.equal(layer(x), by_operator(layer, x))
    layer.values.share_memory_()  # moves them
    assert torch.equal(layer(x), by_operator(layer, x))
    layer._buffers["values"] = layer.values * 2
    assert torch.equal(layer(x), by_operator(layer, x))
    assert calls == []
    layer._buffers["values"] = torch._neg_view(layer.values)
    assert torch.equal(layer(x), by_operator(layer, x)) and calls
    layer._buffers["values"] = layer.values.clone()
    other = sparse_linear("semi24", seed=1)
    lent = functional_call(layer, {"values": other.values, "metadata": other.metadata}, (x,))
    assert torch.allclose(lent, by_operator(other, x) - other.bias, atol=1e-5)
    layer.load_state_dict(sparse_linear("semi24", bias=False, seed=2).state_dict())
    assert torch.equal(layer(x), by_operator(layer, x))
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), by_operator(layer, x.bfloat16()))


@torch.no_grad()
def test_a_bias_that_is_computed_or_of_another_dtype_is_used() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    layer(x)

    class Twice(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    parametrize.register_parametrization(layer, "bias", Twice())
    assert torch.equal(layer(x), by_operator(layer, x))
    layer = sparse_linear("semi24", dtype=torch.bfloat16)
    layer.bias = nn.Parameter(layer.bias.float() + 1e-4)
    assert torch.equal(layer(x.bfloat16()), by_operator(layer, x.bfloat16()))
    layer.bias = nn.Parameter(layer.bias.double())
    assert torch.equal(layer(x.bfloat16()), by_operator(layer, x.bfloat16()))


@torch.no_grad()
def test_copies_run_their_own_tensors() -> None:
    layer, x = sparse_linear("block:4x8"), tokens_in(3, 24)
    expected = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        made._buffers[made._names[0]].zero_()
        made.bias.zero_()
        assert not made(x).any() and torch.equal(layer(x), expected)


@torch.no_grad()
def test_what_was_laid_out_holds_no_weight() -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    layer(x)
    gone = weakref.ref(layer.values)
    layer._buffers["values"] = layer.values.clone()
    assert gone() is None


@torch.no_grad()
def test_a_weight_that_is_not_contiguous_is_read_by_the_operator(calls: list[str]) -> None:
    layer, x = sparse_linear("semi24"), tokens_in(3, 24)
    expected = layer(x)
    layer._buffers["values"] = layer.values.t().contiguous().t()
    assert torch.equal(layer(x), expected) and calls == ["semi24"]


@torch.no_grad()
def test_errors_are_the_same(calls: list[str]) -> None:
    layer = sparse_linear("semi24")
    with pytest.raises(ValueError, match="needs float32 input, got bfloat16"):
        layer(tokens_in(3, 24, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="needs input of width 24"):
        layer(tokens_in(3, 20))
