"""Activations that layers apply themselves: the same results, and nothing fused that is not alike.

The kernel that applies them is replaced by torch, as there is no GPU here.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.undo import Undo
from secateur.formats import dynamic, unpack_
from secateur.formats.activations import ACTIVATIONS
from secateur.formats.fuse import Fused, fuse_activations_
from secateur.formats.kernels import prefill24
from secateur.formats.linear import SparseLinear
from secateur.formats.op import linear_operator
from secateur.formats.two_of_four import gather, metadata_of, scatter
from tests.formats.weights import sparse_linear, tokens_in

FORMAT = "semi24_int8_dynamic"
seen: list[str] = []


@pytest.fixture(autouse=True)
def prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefill` runs here: the definition, then the activation, in float32."""

    def arrange(values: Tensor, metadata: Tensor) -> Tensor:
        return scatter(values, metadata).view(torch.uint8)[None]

    def restore(tiles: Tensor, shape: tuple[int, int], codes: torch.dtype) -> tuple[Tensor, Tensor]:
        metadata = metadata_of(tiles[0])
        return gather(tiles[0], metadata).view(codes), metadata

    def linear(
        x: Tensor,
        tiles: Tensor,
        scales: Tensor,
        bias: Tensor,
        codes: torch.dtype,
        activation: str = "",
    ) -> Tensor:
        seen.append(activation)
        result = dynamic.linear(x.float(), tiles[0].view(codes), scales.float(), bias.float())
        return (ACTIVATIONS[activation](result) if activation else result).to(x.dtype)

    seen.clear()
    monkeypatch.setattr(prefill24, "why_not", lambda *layer: None)
    monkeypatch.setattr(prefill24, "arrange", arrange)
    monkeypatch.setattr(prefill24, "restore", restore)
    monkeypatch.setattr(prefill24, "linear", linear)


def packed(out: int = 32, width: int = 48, runs: str = "prefill") -> SparseLinear:
    layer = sparse_linear(FORMAT, out, width, torch.bfloat16)
    layer.use(((runs, None),))
    return layer


def near(found: Tensor, wanted: Tensor, share: float) -> bool:
    """Within this share of the largest: what rounds the sums moves the activations as much."""
    return bool((found - wanted).abs().max() <= share * wanted.abs().max())


class OfItsOwn(nn.Module):
    """An activation of a model's own, known by its values."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (OfItsOwn(), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
    ],
    ids=str,
)
def test_the_layer_applies_what_the_module_computed(module: nn.Module, name: str) -> None:
    model = nn.Sequential(packed(), module).eval()
    x = tokens_in(5, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        assert fuse_activations_(model, Undo()) == {"0": name}
        found = model(x)
    assert seen == ["", name]
    assert near(found, wanted, 2**-8)
    assert f"activation={name}" in repr(model[0])


def test_gradients_are_those_of_both() -> None:
    model = nn.Sequential(packed(), nn.GELU())
    x = tokens_in(5, 48, dtype=torch.bfloat16).requires_grad_()
    bias = model[0].bias
    results, grads = [], []
    for _ in range(2):
        results.append(model(x))
        grads.append(torch.autograd.grad(results[-1].square().sum(), (x, bias)))
        fuse_activations_(model, Undo())
    assert model[0].activation == "gelu" and torch.equal(*results)
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    with pytest.raises(ValueError, match="no gradients through 'gelu': call it without activation"):
        layer = model[0]
        held = (
            *(layer._buffers.get(name) for name in layer.format.tensors),
            [layer.get_buffer("tiles")],
        )
        linear_operator(layer.format.name)(x, *held, bias, 32, 48, "prefill", "gelu")


def test_what_cannot_apply_it_is_followed_by_it() -> None:
    """A table of several implementations: one applies the activation, the other does not."""
    layer = packed()
    layer.use((("reference", 4), ("prefill", None)))
    model = nn.Sequential(layer, nn.SiLU()).eval()
    few, many = tokens_in(4, 48, dtype=torch.bfloat16), tokens_in(5, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(few)
        fuse_activations_(model, Undo())
        assert torch.equal(model(few), wanted) and seen == []
        model(many)
    assert seen == ["silu"]


class MLP(nn.Module):
    """An MLP whose parts are used as `run` says."""

    def __init__(self, run: Callable[..., Tensor], act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act, self.out = packed(), act, nn.Linear(32, 8).bfloat16()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class NearlyGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) + 1e-3


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.out(m.act(h := m.fc(x)) + h),
        lambda m, x: m.out(m.act(m.act(m.fc(x)))),
        lambda m, x: m.out(m.act(m.fc(x)) + m.fc(x)),
        lambda m, x: m.out(m.act(m.fc(x) + 1)),
        lambda m, x: m.out(m.act(m.fc(x)) if x.sum() > 0 else m.fc(x)),
    ],
)
def test_nothing_is_joined_that_is_used_otherwise(run: Callable[..., Tensor]) -> None:
    stays(MLP(run, nn.GELU()))


@pytest.mark.parametrize("act", [NearlyGELU(), nn.PReLU(), nn.Dropout(), nn.Softplus()], ids=str)
def test_nothing_is_joined_that_computes_something_else(act: nn.Module) -> None:
    stays(MLP(lambda m, x: m.out(m.act(m.fc(x))), act))


def stays(model: MLP) -> None:
    act, random = model.act, torch.get_rng_state()
    assert fuse_activations_(model, Undo()) == {}
    assert model.act is act and model.fc.activation == ""
    assert torch.equal(random, torch.get_rng_state())


def test_a_gate_applies_its_activation_and_the_product_stays() -> None:
    """As in a Llama MLP: act(gate(x)) * up(x)."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.act = packed(), packed(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.act(self.gate(x)) * self.up(x)
            return result

    model = nn.ModuleDict({"mlp": Gated()}).eval()
    x = tokens_in(3, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model["mlp"](x)
        assert fuse_activations_(model, Undo()) == {"mlp.gate": "silu"}
        assert near(model["mlp"](x), wanted, 2**-7)


def test_a_layer_of_two_places_and_a_forward_put_in_place_stay() -> None:
    """Elsewhere no activation may follow; a trace does not see the other forward."""
    shared = packed()
    model = nn.ModuleList([nn.Sequential(shared, nn.GELU()), nn.Sequential(shared)])
    x = tokens_in(3, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model[1](x)
        assert fuse_activations_(model, Undo()) == {} and torch.equal(model[1](x), wanted)
    replaced = nn.Sequential(packed(), nn.GELU())
    replaced.forward = lambda x: replaced[0](x)  # type: ignore[method-assign]
    assert fuse_activations_(replaced, Undo()) == {}


def test_hooks_and_what_cannot_apply_it_stay() -> None:
    hooked, slow = packed(), packed(runs="reference")
    hooked.register_forward_hook(lambda module, args, output: None)
    assert fuse_activations_(nn.Sequential(hooked, nn.GELU()), Undo()) == {}
    assert fuse_activations_(nn.Sequential(slow, nn.GELU()), Undo()) == {}


def test_it_is_undone_with_the_packing_and_joined_once() -> None:
    act = nn.GELU()
    model = nn.Sequential(packed(), act, packed(16, 32))
    keys = list(model.state_dict())
    fuse_activations_(model, Undo())
    assert isinstance(model[1], Fused) and fuse_activations_(model, Undo()) == {}
    other = copy.deepcopy(model)
    x = tokens_in(3, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert list(model.state_dict()) == keys
    unpack_(model)
    assert model[1] is act
    with torch.no_grad():
        assert near(model(x), other(x), 0.03)  # inputs are no longer rounded
