"""Which weights are ordinary, what to do about others, and which weights share memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import secateur as sc
from secateur.allocation import erk
from secateur.core.weights import require_module, tied_weights, why_computed, why_not_ordinary
from secateur.report.inspection import inspect
from secateur.train.movement import movement
from secateur.train.schedules import cubic

X = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def with_weight(weight: Tensor) -> nn.Sequential:
    model = net()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def scripted(model: nn.Module) -> nn.Module:
    with pytest.warns(DeprecationWarning):
        made: nn.Module = torch.jit.script(model)
    return made


# --- what computes a weight ----------------------------------------------------------------------

COMPUTED: dict[str, tuple[Callable[[nn.Module], object], str, Callable[[nn.Module], object]]] = {
    "a mask": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.9),
        "torch.nn.utils.prune.remove(layer, 'weight')",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "two masks": (
        lambda layer: [prune.random_unstructured(layer, "weight", 0.5) for _ in range(2)],
        "torch.nn.utils.prune.remove(layer, 'weight')",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "weight_norm": (
        weight_norm,
        "torch.nn.utils.remove_weight_norm(layer, 'weight')",
        lambda layer: nn.utils.remove_weight_norm(layer, "weight"),
    ),
    "spectral_norm": (
        spectral_norm,
        "torch.nn.utils.remove_spectral_norm(layer, 'weight')",
        lambda layer: nn.utils.remove_spectral_norm(layer, "weight"),
    ),
    "a parametrization": (
        parametrizations.weight_norm,
        "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}

VERBS: dict[str, Callable[[nn.Module], object]] = {
    "prune_": lambda m: sc.prune_(m, "2:4"),
    "reconstruct_": lambda m: sc.reconstruct_(m, "2:4", sc.sparsegpt, X),
    "check": lambda m: sc.check(m, "2:4"),
    "pack_": lambda m: sc.pack_(m, "bitmap"),
    "pack_ by name": lambda m: sc.pack_(m, "bitmap", ["0"]),
    "accelerate_": lambda m: sc.accelerate_(m, (1,)),
    "accelerate_ by name": lambda m: sc.accelerate_(m, (1,), layers=["0"]),
    "hold with a rule": lambda m: sc.hold(
        m, torch.optim.SGD(m.parameters()), sc.gradual(sc.plan(m, "2:4"), lambda step: 0.5)
    ),
    "movement": lambda m: movement(
        m, sc.plan(m, "2:4"), torch.optim.SGD(m.parameters()), cubic(0.5, 0, 10)
    ),
    "sensitivity": lambda m: sc.sensitivity(
        m, ["2:4"], lambda model: float(model(X[0]).square().mean())
    ),
    "erk": lambda m: erk(m, "unstructured:0.5"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(("attach", "remedy", "detach"), COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_refused_with_the_remedy_that_applies(
    attach, remedy: str, detach, verb
) -> None:
    model = net()
    attach(model[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        verb(model)
    assert str(error.value).startswith("0.weight ")
    assert remedy in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    detach(model[0])
    assert why_not_ordinary(model[0]) is None
    sc.prune_(model, "2:4")
    assert sc.check(model, "2:4")["0"] >= 0.5


def test_hold_refuses_a_mask_and_passes_over_what_has_no_zeros() -> None:
    model = net()
    sc.prune_(model, sc.plan(model, "2:4", layers=["2"]))
    parametrizations.weight_norm(model[0])
    held = sc.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(held.masks) == ["2"]
    prune.l1_unstructured(model[2], "weight", 0.9)
    with pytest.raises(ValueError, match=r"2.weight has a mask of torch.nn.utils.prune"):
        sc.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_thorough_minds_no_mask_on_a_layer_that_it_does_not_train() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16))
    prune.l1_unstructured(model[3], "weight", 0.9)
    masked = model[3].weight.clone()
    plan = sc.plan(model, "2:4", ignore=["3"])
    sc.reconstruct_(model, plan, sc.thorough, [torch.randn(8, 16) for _ in range(4)])
    assert sc.check(model, plan) == {"0": 0.5, "2": 0.5}
    assert torch.equal(model[3].weight, masked)


def test_a_mask_on_the_bias_is_no_matter_but_for_packing() -> None:
    model = net()
    prune.l1_unstructured(model[0], "bias", 0.5)
    sc.prune_(model, "2:4")
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}
    with pytest.raises(ValueError, match=r"layer '0': its bias has a mask .*\(layer, 'bias'\)"):
        sc.pack_(model, "semi24", ["0"])


def test_a_packed_weight_is_unpacked_first() -> None:
    model = net()
    sc.prune_(model, "2:4")
    plan = sc.plan(model, "2:4")
    sc.pack_(model, "semi24")
    with pytest.raises(ValueError, match=r"0.weight is packed: unpack_\(model\) first"):
        sc.prune_(model, plan)


def test_a_weight_that_is_a_plain_tensor_is_told() -> None:
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    assert "is no parameter of its own, Linear computes it" in str(why_computed(layer))


# --- data, dtype, memory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_weight(torch.randn(1, 16).expand(16, 16)), "strides (0, 1), as expand makes"),
        (
            lambda: with_weight(torch.randn(16, 16).to(torch.float8_e4m3fn)),
            "is float8_e4m3fn: cast",
        ),
        (lambda: with_weight(torch.randn(16, 16).to(torch.float8_e5m2)), "is float8_e5m2: cast"),
        (lambda: with_weight(torch.randn(16, 16).to(torch.complex64)), "is complex64: "),
        (lambda: with_weight(torch.ones(16, 16, dtype=torch.int8)), "is int8: "),
        (lambda: with_weight(torch.randn(16, 16).to_sparse_csr()), "is stored as torch.sparse_csr"),
        (lambda: torch.inference_mode()(net)(), "was made in torch.inference_mode"),
        (lambda: net().to("meta"), "has no data (meta device): load the weights first"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_weights_that_cannot_be_pruned_are_named_with_the_remedy(make, message: str) -> None:
    for verb in (
        lambda m: sc.prune_(m, sc.plan(m, "2:4")),
        lambda m: sc.reconstruct_(m, sc.plan(m, "2:4"), sc.sparsegpt, X),
    ):
        model = make()
        with pytest.raises(ValueError) as error:
            verb(model)
        assert f"0.weight {message}" in str(error.value) or message in str(error.value)
        assert str(error.value).startswith("0.weight ")


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_a_weight_in_a_sparse_layout_is_refused_by_what_reads_it(layout: str) -> None:
    def made() -> nn.Sequential:
        return with_weight(getattr(torch.randn(16, 16).relu(), layout)())

    for verb in (inspect, sc.pack_, lambda m: sc.accelerate_(m, (1,))):
        with pytest.raises(
            ValueError, match=r"0.weight is stored as .*: make it dense, .*to_dense"
        ):
            verb(made())
    model = made()
    with pytest.raises(ValueError, match=r"0.weight is stored as"):
        sc.hold(model, torch.optim.SGD(model.parameters()))


def test_an_empty_weight_is_left_alone_and_said() -> None:
    model = net()
    with pytest.warns(UserWarning, match="zero-element"):
        model.extend([nn.Linear(0, 8), nn.Linear(8, 0)])
    plan = sc.plan(model, "2:4")
    assert plan.skipped == {"3": "its weight is empty", "4": "its weight is empty"}
    with pytest.raises(ValueError, match="3 cannot be pruned: its weight is empty"):
        sc.plan(model, "2:4", layers=["3"])


def test_the_remedies_are_enough() -> None:
    for made in (
        torch.randn(1, 16).expand(16, 16).contiguous(),
        torch.randn(16, 16).to(torch.float8_e4m3fn).to(torch.bfloat16).float(),
        torch.randn(16, 16).to_sparse_csr().to_dense(),
    ):
        model = with_weight(made)
        sc.prune_(model, "2:4")
        assert sc.check(model, "2:4")["0"] >= 0.5
    model = copy.deepcopy(torch.inference_mode()(net)())
    sc.prune_(model, "2:4")
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_a_model_made_in_inference_mode_can_be_read() -> None:
    model = torch.inference_mode()(net)()
    with pytest.raises(ValueError, match="2 of 2 layers break the plan"):
        sc.check(model, "2:4")
    assert inspect(model).zeros == 0
    assert sc.accelerate_(model, (1,), formats=["csr"]).changed == ()


def test_an_offloaded_model_is_told_how_to_be_loaded() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    model = net()
    sc.prune_(model, "2:4")
    plan = sc.plan(model, "2:4")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for verb in (
        lambda: sc.prune_(model, plan),
        lambda: sc.check(model, plan),
        lambda: sc.hold(model, torch.optim.SGD(model.parameters())),
        lambda: sc.pack_(model),
        lambda: sc.accelerate_(model, (1,)),
        lambda: inspect(model),
    ):
        with pytest.raises(ValueError, match=r"0.weight has no data \(meta device\), accelerate"):
            verb()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert sc.check(model, plan) == {"0": 0.5, "2": 0.5}, "as the message says"


@pytest.mark.parametrize(
    "other",
    ["model", None, {"weight": torch.ones(4, 4)}],
    ids=["str", "None", "state dict"],
)
def test_what_is_no_module_is_refused(other) -> None:
    with pytest.raises(ValueError, match="a model needs to be an nn.Module, got .*: load it"):
        require_module(other)


def test_a_scripted_model_is_refused() -> None:
    other = scripted(net())
    for verb in (
        lambda: sc.plan(other, "2:4"),
        lambda: sc.prune_(other, "2:4"),
        lambda: sc.check(other, "2:4"),
        lambda: sc.pack_(other),
        lambda: sc.unpack_(other),
        lambda: sc.accelerate_(other),
        lambda: inspect(other),
        lambda: sc.hold(other, torch.optim.SGD(net().parameters())),
    ):
        with pytest.raises(ValueError, match="needs to be an ordinary nn.Module, .* TorchScript"):
            verb()


def test_a_scripted_part_is_left_alone_and_said() -> None:
    model = nn.Sequential(nn.Linear(16, 16), scripted(nn.Linear(16, 16)))
    plan = sc.plan(model, "2:4")
    assert list(plan.layers) == ["0"]
    assert plan.skipped["1"].startswith("a ScriptModule, which cannot be changed")


# --- shared storage ------------------------------------------------------------------------------


def two(first: Tensor, second: Tensor) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(*reversed(first.shape), bias=False),
        nn.Linear(*reversed(second.shape), bias=False),
    )
    model[0].weight, model[1].weight = nn.Parameter(first), nn.Parameter(second)
    return model


BASE = torch.randn(16, 32)
TIED = {
    "transposed": (BASE, BASE.t()),
    "same data": (BASE, BASE.view(16, 32)),
    "a part": (BASE, BASE[4:8]),
    "the end and the beginning": (BASE[:9], BASE[8:]),
    "columns": (BASE[:, 4:20], BASE[:, 16:]),
    "every other row": (BASE[::2], BASE[::4]),
}
APART = {
    "two": (BASE, BASE.clone()),
    "halves": (BASE[:8], BASE[8:]),
    "columns": (BASE[:, :16], BASE[:, 16:]),
    "rows in turn": (BASE[::2], BASE[1::2]),
    "a row of other columns": (BASE[:, 16:], BASE[1:2, :16]),
}


@pytest.mark.parametrize(("first", "second"), TIED.values(), ids=TIED)
def test_overlapping_views_are_tied(first: Tensor, second: Tensor) -> None:
    model = two(first, second)
    assert tied_weights(model) == {"0": "1", "1": "0"}
    with pytest.raises(ValueError, match=r"no layer is left .*: 0 \(its weight is tied to 1\)"):
        sc.prune_(model, "unstructured:0.5")
    with pytest.raises(ValueError, match="1 cannot be pruned: its weight is tied to 0"):
        sc.plan(model, "unstructured:0.5", layers=["1"])
    with pytest.raises(ValueError, match="layer '0': its weight is tied to '1'"):
        sc.pack_(model, "bitmap", ["0"])
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())  # as the message says
    sc.prune_(model, "unstructured:0.5")
    assert all(sc.check(model, "unstructured:0.5").values())


@pytest.mark.parametrize(("first", "second"), APART.values(), ids=APART)
def test_views_beside_one_another_are_not(first: Tensor, second: Tensor) -> None:
    assert tied_weights(two(first, second)) == {}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 7), st.integers(1, 4), st.integers(0, 7), st.integers(1, 4)
        ).filter(lambda s: s[0] + s[1] <= 8 and s[2] + s[3] <= 8),
        min_size=2,
        max_size=4,
    ),
    st.booleans(),
)
def test_tied_is_what_shares_an_element(boxes, transposed: bool) -> None:
    """Checked by writing to one tensor and looking at the others."""
    base = torch.zeros(8, 8)
    parts = [base[a : a + b, c : c + d] for a, b, c, d in boxes]
    parts[-1] = parts[-1].t() if transposed else parts[-1]
    model = nn.Sequential()
    for part in parts:
        model.append(nn.Linear(1, 1))
        model[-1].weight = nn.Parameter(part)
    tied = tied_weights(model)
    for i, part in enumerate(parts):
        base.zero_()
        part.fill_(1)
        shares = [str(j) for j, other in enumerate(parts) if j != i and other.any()]
        assert (str(i) in tied) == bool(shares)
        assert tied.get(str(i)) in (shares or [None])


def test_tied_to_what_is_no_weight_of_a_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_parameter("own", nn.Parameter(model[0].weight.data.t()))
    model[2].bias = nn.Parameter(model[1].weight.data[0])
    assert tied_weights(model) == {"0": "own", "own": "0", "1": "2.bias", "2.bias": "1"}
    assert sc.plan(model, "2:4").skipped == {
        "0": "its weight is tied to own",
        "1": "its weight is tied to 2.bias",
    }


def test_weights_without_data_are_tied_by_their_storage() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(4, 8))
    assert tied_weights(model) == {}
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    assert tied_weights(model) == {"0": "1", "1": "0"}


def test_what_was_reported_holds() -> None:
    """A decoder tied to its encoder as weight.T used to be reported as 2:4, which it was not."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = nn.Parameter(model[0].weight.data.t())
    report = sc.reconstruct_(model, "2:4", sc.sparsegpt, X)
    assert [r.layer for r in report.layers] == ["3"]
    assert sc.check(model, "2:4") == {"3": 0.5}
