"""Holding zeros through training, whatever the optimizer does."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import optimizer as _optimizer
from torch.optim.swa_utils import AveragedModel

import secateur as sc
from secateur.patterns import keep_top
from secateur.train import movement, release
from secateur.train.schedules import constant, cubic, linear
from secateur.train.steps import as_optimizers
from tests.models import ConvNet
from tests.train import two_processes
from tests.train.trainers import OPTIMIZERS, all_of, inputs, plainly

ROOT = Path(__file__).parents[2]


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def pruned(pattern: str = "2:4") -> nn.Sequential:
    model = dense()
    sc.prune_(model, sc.plan(model, pattern))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 100) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()


SOME = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
def test_zeros_stay_zero_and_the_rest_learns(make) -> None:
    model = pruned()
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    optimizer = make(model.parameters())
    sc.hold(model, optimizer)
    train(model, optimizer)
    for layer, old in zip((model[0], model[2]), before, strict=True):
        assert torch.equal(layer.weight == 0, old == 0)
        assert not torch.equal(layer.weight, old)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_without_holding_they_do_not() -> None:
    model = pruned()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), steps=5)
    with pytest.raises(ValueError, match=r"2 of 2 layers break the plan.*without sc.hold"):
        sc.check(model, "2:4")


def test_released_zeros_are_free() -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sc.hold(model, optimizer) as held:
        train(model, optimizer, 3)
        assert held.steps == 3
    sc.check(model, "2:4")
    train(model, optimizer, 3)
    assert held.steps == 3
    with pytest.raises(ValueError, match="break the plan"):
        sc.check(model, "2:4")


def test_nothing_is_attached_to_the_model() -> None:
    model = pruned()
    keys = list(model.state_dict())
    sc.hold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
        )


def test_two_models_do_not_share_masks_after_loading() -> None:
    """Loading one torch.ao sparsifier's state into another made both models share one mask."""
    one, other = pruned(), pruned("1:4")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, other)]
    held = [sc.hold(m, o) for m, o in zip((one, other), optimizers, strict=True)]
    other.load_state_dict(one.state_dict())
    train(one, optimizers[0], 3)
    assert all(held[0].masks[n].data_ptr() != held[1].masks[n].data_ptr() for n in held[0].masks)
    train(other, optimizers[1], 3)
    sc.check(one, "2:4")
    sc.check(other, "1:4")


def test_resumed_training_equals_uninterrupted_training() -> None:
    def run(restart: bool) -> dict[str, torch.Tensor]:
        model = pruned()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        held = sc.hold(model, optimizer)
        train(model, optimizer, 10)
        if restart:
            held.release()
            saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
            weights, moments = pickle.loads(saved)
            model = pruned()
            model.load_state_dict(weights)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            optimizer.load_state_dict(moments)
            sc.hold(model, optimizer)
        train(model, optimizer, 10)
        return model.state_dict()

    whole, resumed = run(False), run(True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_convolutions_and_embeddings_are_held_too() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 4))
    sc.prune_(model, sc.plan(model, "2:4", layers=[nn.Embedding]))
    conv = ConvNet()
    sc.prune_(conv, sc.plan(conv, "2:4", layers=[nn.Conv2d]))
    for net, x in ((model, torch.randint(10, (3, 2))), (conv, torch.randn(2, 4, 8, 8))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        held = sc.hold(net, optimizer)
        net(x).sum().backward()
        optimizer.step()
        for name, mask in held.masks.items():
            assert not net.get_submodule(name).weight[~mask].any()


def test_a_nan_gradient_does_not_reach_a_held_zero() -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = sc.hold(model, optimizer)
    model[0].weight.grad = torch.full_like(model[0].weight, float("nan"))
    optimizer.step()
    assert (model[0].weight[~held.masks["0"]] == 0).all()


def test_refuses_a_model_without_zeros_and_a_foreign_optimizer() -> None:
    dense = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="this Sequential has none: prune_ it first"):
        sc.hold(dense, torch.optim.SGD(dense.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the optimizer updates none of the 2 sparse weights"):
        sc.hold(pruned(), torch.optim.SGD(dense.parameters(), lr=0.1))


class LowRank(nn.Module):
    """A layer with an adapter as LoRA begins it: the second factor is zero."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low: torch.Tensor = self.lora_B["default"](self.lora_A["default"](x))
        out: torch.Tensor = self.base_layer(x) + low
        return out


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    sc.prune_(base, "2:4")
    return nn.Sequential(LowRank(base[0]), nn.Linear(16, 4))


@pytest.mark.parametrize("ruled", [False, True])
def test_the_zeros_that_an_adapter_begins_with_are_free(ruled: bool) -> None:
    model = adapted()
    base = model[0].base_layer.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = sc.gradual(sc.plan(model, "2:4"), lambda step: 0.5) if ruled else None
    held = sc.hold(model, optimizer, rule)
    assert "0.lora_B.default" not in held.masks
    train(model, optimizer, steps=3)
    assert (model[0].lora_B["default"].weight != 0).all()
    assert ((base != 0).view(16, 4, 4).sum(-1) == 2).all()


def test_an_adapter_that_was_pruned_by_name_is_held() -> None:
    model = adapted()
    plan = sc.plan(model, "2:4", layers=["0.lora_A.default"])
    sc.prune_(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    held = sc.hold(model, optimizer)
    assert list(held.masks) == ["0.base_layer", "0.lora_A.default"], "and not the unpruned"
    train(model, optimizer, steps=3)
    assert sc.check(model, plan) == {"0.lora_A.default": 0.5}


class Handing(torch.optim.Optimizer):
    """As accelerate's: an optimizer by its class alone, which hands everything on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):  # type: ignore[no-untyped-def, override]
        return self.optimizer.param_groups

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        return self.optimizer.step(closure)


class Alone(Handing):
    """One that keeps what it wraps for itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = lambda: optimizer

    @property
    def param_groups(self):  # type: ignore[no-untyped-def, override]
        return self.inner().param_groups


def test_an_optimizer_that_is_wrapped_holds_as_it_does_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sc.prune_(model, "2:4")
    optimizer = Handing(Handing(torch.optim.AdamW(model.parameters(), lr=0.1)))
    before = model[0].weight.detach().clone()
    with sc.hold(model, optimizer) as held:
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert held.steps == 1 and not torch.equal(model[0].weight, before)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}
    with pytest.raises(ValueError, match="Alone calls no hooks at its steps: pass the torch.optim"):
        sc.hold(model, Alone(torch.optim.SGD(model.parameters())))


# --- what it refuses ------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_an_optimizer_that_was_not_given_takes_no_step_of_weights_with_zeros() -> None:
    model = pruned()
    one, other = sgd(model[0]), sgd(model[2])
    with sc.hold(model, one) as held:
        train(model, one, 1)
        before = model[2].weight.detach().clone()
        with pytest.raises(
            ValueError,
            match=r"given another optimizer, and this SGD updates 2.weight: .* hold\(model, \[a",
        ):
            other.step()
        assert torch.equal(model[2].weight, before)
    with sc.hold(model, [one, other]) as held:
        train(model, one, 2)
        other.step()
        assert held.steps == 2
    other.step()
    sgd(nn.Linear(3, 3)).step()
    assert sc.check(model[0], "2:4") == {"": 0.5}


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_copy_of_the_optimizer_takes_no_step(is_gone: bool) -> None:
    """Copies have no hooks: a shallow one, and a deep one whose parameters are the model's."""
    model = pruned()
    optimizer = sgd(model)
    sc.hold(model, optimizer)
    train(model, optimizer, 1)
    same = {id(parameter): parameter for parameter in model.parameters()}
    copies = copy.copy(optimizer), copy.deepcopy(optimizer, same)
    if is_gone:
        del optimizer, same  # which the copying has put everything copied into
    for other in copies:
        with pytest.raises(ValueError, match="is gone, and" if is_gone else "given another optim"):
            train(model, other, 1)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}
    with pytest.raises(ValueError, match=r"end it with secateur.train.release\(model\)"):
        copies[0].step()
    release(model)
    copies[0].step()


def test_a_model_is_held_once_at_a_time() -> None:
    model = pruned()
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    for verb in (
        lambda: sc.hold(model, sgd(model)),
        lambda: movement(model, sc.plan(model, "2:4"), optimizer, constant(0.5)),
        lambda: sc.distil_(model, copy.deepcopy(model), [torch.randn(4, 16)], steps=1),
    ):
        with pytest.raises(
            ValueError, match=r"0.weight is held already: call release\(\) of what hold"
        ):
            verb()
    held.release()
    sc.hold(model, optimizer)
    del optimizer
    optimizer = sgd(model)
    sc.hold(model, optimizer)
    train(model, optimizer, 1)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_a_model_is_not_pruned_further_while_it_is_held() -> None:
    """Its new zeros would not be in the masks."""
    model = pruned()
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    before = model[2].weight.detach().clone()
    data = [torch.randn(8, 16) for _ in range(4)]
    for verb in (
        lambda: sc.prune_(model, "1:4"),
        lambda: sc.prune_(model, sc.plan(model, {"2": "1:4"})),
        lambda: sc.reconstruct_(model, "1:4", sc.thorough, data),
    ):
        with pytest.raises(ValueError, match=r"0.weight is held .*, new ones would be lost: call"):
            verb()
        assert torch.equal(model[2].weight, before)
    held.release()
    sc.prune_(model, "1:4")
    sc.hold(model, optimizer)
    train(model, optimizer, 1)
    assert sc.check(model, "1:4") == {"0": 0.75, "2": 0.75}


def test_a_function_that_trained_leaves_nothing_held() -> None:
    """What refers to an optimizer and is referred to keeps it until garbage is collected."""

    def trained(model: nn.Module) -> None:
        optimizer = sgd(model)
        optimizer.trainer = SimpleNamespace(optimizer=optimizer)
        sc.hold(model, optimizer)
        train(model, optimizer, 1)

    model = pruned()
    gc.disable()
    try:
        trained(model)
        trained(model)
        sc.prune_(model, "1:4")
        trained(model)
    finally:
        gc.enable()
    assert sc.check(model, "1:4") == {"0": 0.75, "2": 0.75}


def test_what_is_held_ends_with_its_optimizer() -> None:
    model = pruned()
    optimizer = sgd(model)
    held = weakref.ref(sc.hold(model, optimizer))
    gone = weakref.ref(model)
    assert held() is not None
    hooks = len(_optimizer._global_optimizer_pre_hooks)
    del model, optimizer
    assert held() is None and gone() is None  # at once, without the garbage collector
    assert len(_optimizer._global_optimizer_pre_hooks) == hooks - 1


def test_parameters_that_were_replaced_are_named_before_the_step() -> None:
    for replace in (
        lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().clone())),
        lambda m: m.__setitem__(2, nn.Linear(32, 4)),
        lambda m: m.__delitem__(2),
    ):
        model = pruned()
        optimizer = sgd(model)
        sc.hold(model, optimizer)
        replace(model)
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.ones_like(before)
        with pytest.raises(ValueError, match=r"2.weight has been replaced since hold began"):
            optimizer.step()
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("kept", ["nothing", "what hold returned", "the optimizer"])
def test_what_takes_a_held_weights_place_is_updated_by_no_new_optimizer(kept: str) -> None:
    """As sharding does, after which the optimizer is made anew: nothing calls the first one."""
    model = pruned()
    first = sgd(model)
    held = sc.hold(model, first)
    if kept != "the optimizer":
        del first
    if kept != "what hold returned":
        del held
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    second = sgd(model)
    with pytest.raises(ValueError, match=r"0.weight has been replaced since hold began, and this"):
        train(model, second, 1)
    if kept == "the optimizer":
        with pytest.raises(ValueError, match=r"0.weight is held already"):
            sc.hold(model, second)
        release(model)
    with sc.hold(model, second):
        train(model, second, 1)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_weights_that_left_the_optimizer_are_missed() -> None:
    model = pruned()
    optimizer = sgd(model)
    sc.hold(model, optimizer)
    optimizer.param_groups[0]["params"] = [model[0].bias]
    with pytest.raises(ValueError, match="updates none of the 2 held weights any more"):
        optimizer.step()


@pytest.mark.parametrize("mask", [torch.ones(3, 3, dtype=torch.bool), torch.ones(32, 16), None])
def test_a_mask_of_the_wrong_kind_is_named(mask) -> None:
    model = pruned()
    optimizer = sgd(model)
    with sc.hold(model, optimizer) as held:
        held.masks["0"] = mask
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=r"mask of 0 needs to be torch.bool of \(32, 16\)"):
            train(model, optimizer, 1)
        assert torch.equal(model[0].weight, before)
    with (
        sc.hold(model, optimizer, lambda *_: mask),
        pytest.raises(ValueError, match=r"mask of 0 needs to be torch.bool of \(32, 16\)"),
    ):
        train(model, optimizer, 1)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_what_is_no_optimizer_is_refused() -> None:
    for other in ([], "sgd", [sgd(pruned()), None]):
        with pytest.raises(ValueError, match=r"needs a torch.optim.Optimizer or a list of them"):
            as_optimizers(other)
    lightning = SimpleNamespace(optimizer=(inner := sgd(pruned())))
    assert as_optimizers([lightning]) == [inner]


def stand_in(package: str, name: str, base: type) -> type:
    return type(name, (base,), {"__module__": package})


def test_trainers_that_flatten_parameters_are_refused_by_name() -> None:
    model = pruned()
    optimizer = sgd(model)
    engine = stand_in("deepspeed.runtime.engine", "DeepSpeedEngine", nn.Sequential)(model)
    with pytest.raises(ValueError, match="DeepSpeedEngine is of DeepSpeed: train with fully_shard"):
        sc.hold(engine, optimizer)
    kind = stand_in("accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper", Handing)
    with pytest.raises(ValueError, match="DeepSpeedOptimizerWrapper is of DeepSpeed: use"):
        sc.hold(model, kind(optimizer))
    fsdp = pytest.importorskip("torch.distributed.fsdp").FullyShardedDataParallel
    sharded = nn.Sequential(model)
    sharded.__class__ = type("Sharded", (nn.Sequential, fsdp), {})
    with pytest.raises(ValueError, match="Sharded is of FSDP1: shard with fully_shard"):
        sc.hold(sharded, optimizer)
    with pytest.raises(ValueError, match="Sharded is of FSDP1"):
        movement(sharded, sc.plan(model, "2:4"), optimizer, constant(0.5))


# --- in a checkpoint ------------------------------------------------------------------------------


class Dropping:
    """A rule that drops the kept weight nearest to zero every third step, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, name: str, weight: Tensor, mask: Tensor, step: int) -> Tensor:
        self.calls += 1
        if self.calls % 3:
            return mask
        scores = weight.abs().masked_fill(~mask, -1).flatten()
        return keep_top(scores, int(mask.sum()) - 1).view_as(mask)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def by_schedule(model: nn.Module) -> Any:
    plan = sc.plan(model, {"0": "unstructured:0.8@layer", "2": "1:4"})
    return sc.gradual(plan, cubic(0.8, 2, 24), every=4)


RULES: dict[str, Any] = {
    "none": lambda model: None,
    "gradual": by_schedule,
    "counting": lambda model: Dropping(),
}


def begun(kind: Any, rule: Any) -> tuple[nn.Module, Any, Any]:
    model = pruned()
    optimizer = kind(model)
    return model, optimizer, sc.hold(model, optimizer, RULES[rule](model))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@given(stopped=st.integers(1, 15))
@settings(max_examples=4, deadline=None)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(rule, name, stopped: int) -> None:
    def loss(x: Tensor) -> Tensor:
        return (model(x) - x[:, :4].sin()).square().mean()

    make, data = OPTIMIZERS[name], inputs(16)
    model, optimizer, held = begun(make, rule)
    plainly(loss, optimizer, held, data)
    whole, masks = model.state_dict(), held.masks

    model, optimizer, held = begun(make, rule)
    plainly(loss, optimizer, held, data[:stopped])
    several = all_of(optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), [o.state_dict() for o in several], held.state_dict()], file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)

    model = pruned("1:4")
    model.load_state_dict(weights)
    optimizer = make(model)
    held = sc.hold(model, optimizer, RULES[rule](model))
    for one, moment in zip(all_of(optimizer), moments, strict=True):
        one.load_state_dict(moment)
    held.load_state_dict(state)
    assert held.steps == stopped
    plainly(loss, optimizer, held, data[stopped:])
    assert all(torch.equal(whole[key], value) for key, value in model.state_dict().items())
    assert list(masks) == list(held.masks)
    assert all(torch.equal(masks[key], held.masks[key]) for key in masks)


def test_a_kept_weight_that_is_zero_by_chance_is_kept_after_resuming() -> None:
    model = nn.Sequential(*pruned(), nn.Linear(4, 4))
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    state = held.state_dict()
    assert state["free"] == ["3"]
    where = held.masks["0"].nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(where)] = 0
        model[3].weight[1, 2] = 0
    held.release()
    held = sc.hold(model, optimizer)
    assert "3" in held.masks
    held.load_state_dict(state)
    train(model, optimizer, 2)
    assert model[0].weight[tuple(where)] != 0 and model[3].weight[1, 2] != 0
    model[3] = nn.Linear(4, 4)  # free: it may be replaced
    train(model, optimizer, 1)
    assert sc.check(model, sc.plan(model, {"0": "2:4", "2": "2:4"}))


def test_a_layer_whose_zeros_are_all_gone_is_held_by_its_state() -> None:
    model = pruned()
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    state = held.state_dict()
    held.release()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    held = sc.hold(model, optimizer)
    assert list(held.masks) == ["2"]
    held.mask_gradients_early()
    held.load_state_dict(state, reapply=True)
    model(torch.randn(8, 16)).sum().backward()
    assert not model[0].weight.grad[~held.masks["0"]].any() and model[0].weight.grad.any()
    train(model, optimizer, 1)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


def test_a_state_that_does_not_belong_here_changes_nothing() -> None:
    model = pruned()
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    early = held.state_dict()
    train(model, optimizer, 2)
    state = held.state_dict()
    masks = state["masks"]
    for wrong, message in (
        (early, r"of step 0, training is at step 2 and cannot run backwards: load the weights"),
        (state | {"steps": [2, 2]}, "of 2 optimizers, hold has 1"),
        (state | {"rule": {}}, "no state of a hold without a rule that remembers"),
        ({"masks": masks}, "no state of a hold without a rule"),
        (state | {"masks": masks | {"7": masks["0"]}}, "holds 7, which the optimizer does not"),
        (state | {"masks": {"0": masks["0"]}}, "2 has zeros of which the state knows nothing"),
        (state | {"masks": masks | {"2": masks["0"]}}, r"mask of 2 needs .* of \(4, 32\)"),
        (state | {"masks": masks | {"2": ~masks["2"]}}, r"in 1 of 2 layers, 2 \(64\): load the"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            held.load_state_dict(wrong)
        assert all(torch.equal(before[key], v) for key, v in model.state_dict().items())
        assert held.steps == 2 and all(torch.equal(held.masks[n], masks[n]) for n in masks)
    held.load_state_dict(state | {"masks": masks | {"2": ~masks["2"]}}, reapply=True)
    assert not model[2].weight.any()


def test_a_state_is_loaded_by_torchs_distributed_checkpoints(tmp_path, one_process: None) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    model = pruned()
    fully_shard(model)
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    train(model, optimizer, 3)
    dcp.save({"model": model.state_dict(), "held": held}, checkpoint_id=tmp_path / "step")
    other = pruned()
    fully_shard(other)
    other_optimizer = sgd(other)
    other_held = sc.hold(other, other_optimizer)
    with torch.no_grad():
        other_held.masks["0"].copy_(other_held.masks["0"].logical_not())
    weights = other.state_dict()
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "step")
    other.load_state_dict(weights)
    dcp.load({"held": other_held}, checkpoint_id=tmp_path / "step")
    assert other_held.steps == 3
    assert torch.equal(other_held.masks["0"].full_tensor(), held.masks["0"].full_tensor())
    whole = held.state_dict(whole=True)
    assert type(whole["masks"]["0"]) is torch.Tensor
    other_held.load_state_dict(whole)
    assert torch.equal(other_held.masks["2"].full_tensor(), whole["masks"]["2"])
    assert other_held.masks["2"].placements == other[2].weight.placements


def test_distributed_checkpoints_bring_gradual_to_its_place(tmp_path, one_process: None) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
        plan = sc.plan(model, "unstructured:0.8@layer")
        sc.prune_(model, sc.plan(model, "unstructured:0.3@layer", layers=["0"]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = sc.gradual(plan, linear(0.8, 0, 20), every=3)
        return model, optimizer, sc.hold(model, optimizer, rule)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer, held = begun()
    train(model, optimizer, range(5))
    dcp.save({"model": model.state_dict(), "held": held}, checkpoint_id=tmp_path / "step")
    train(model, optimizer, range(5, 12))
    resumed, again_optimizer, again = begun()
    weights = resumed.state_dict()
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "step")
    resumed.load_state_dict(weights)
    dcp.load({"held": again}, checkpoint_id=tmp_path / "step")
    assert again.state_dict()["rule"]["taken"]["0"] > 0  # it had zeros before
    train(resumed, again_optimizer, range(5, 12))
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(held.masks[name], again.masks[name]) for name in held.masks)


# --- what came back -------------------------------------------------------------------------------


def test_a_check_says_which_weights_came_back_and_reapply_sets_them_back() -> None:
    model = pruned()
    optimizer = sgd(model)
    held = sc.hold(model, optimizer)
    held.check()
    where = (~held.masks["2"]).nonzero()[:3].unbind(1)
    with torch.no_grad():
        model[2].weight[where] = 1.0
    assert held.came_back() == {"2": 3}
    with pytest.raises(
        ValueError, match=r"came back in 1 of 2 layers, 2 \(3\): find what .*reapply"
    ):
        held.check()
    assert held.reapply() == {"2": 3}
    assert held.came_back() == held.reapply() == {}
    sc.check(model, "2:4")


def test_masks_go_onto_an_average_whose_steps_had_others() -> None:
    model = dense()
    average = AveragedModel(model)
    optimizer = sgd(model)
    plan = sc.plan(model, "1:4")
    with sc.hold(model, optimizer, sc.gradual(plan, linear(0.75, 0, 6), every=1)) as held:
        for _ in range(6):
            train(model, optimizer, 1)
            average.update_parameters(model)
    with pytest.raises(ValueError, match="break the plan"):
        sc.check(average.module, plan)
    kept = average.module[0].weight[held.masks["0"]].clone()
    held.apply_(average)
    assert sc.check(average.module, plan) == {"0": 0.75, "2": 0.75}
    assert torch.equal(average.module[0].weight[held.masks["0"]], kept)
    masked = pruned()
    prune.l1_unstructured(masked[0], "weight", 0.5)
    for other in (nn.Linear(3, 3), masked):
        with pytest.raises(ValueError, match=r"has no 0 of shape \(32, 16\): give a copy"):
            held.apply_(other)


@pytest.mark.parametrize("way", ["frozen", "elsewhere"])
def test_a_planned_layer_that_training_does_not_change_is_named(way: str) -> None:
    model = pruned()
    rule = sc.gradual(sc.plan(model, "1:4"), constant(0.75))
    optimizer = sgd(model[0] if way == "elsewhere" else model)
    model[2].weight.requires_grad_(way != "frozen")
    reason = "it is frozen" if way == "frozen" else "the optimizer does not update it"
    with pytest.raises(ValueError, match=f"2 is planned and would keep its weights, {reason}: "):
        sc.hold(model, optimizer, rule)


# --- in rounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rewinds", [False, True], ids=["iterative", "lottery ticket"])
def test_zeros_stay_from_round_to_round_and_kept_weights_go_back_to_early_ones(
    rewinds: bool,
) -> None:
    model = dense()
    early, zeros = copy.deepcopy(model.state_dict()), model[0].weight == 0
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 10)
    for sparsity in (0.5, 0.75, 0.9):
        plan = sc.plan(model, f"unstructured:{sparsity}@layer")
        sc.prune_(model, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with sc.hold(model, optimizer) as held:
            if rewinds:
                model.load_state_dict(early)
                back = held.reapply()
                assert back == {name: int((~mask).sum()) for name, mask in held.masks.items()}
                for name, mask in held.masks.items():
                    expected = early[f"{name}.weight"].masked_fill(~mask, 0)
                    assert torch.equal(model.get_submodule(name).weight, expected)
            train(model, optimizer, 10)
        sc.check(model, plan)
        now = model[0].weight == 0
        assert int(now.sum()) == int(sparsity * 512 + 0.5) and bool((now | ~zeros).all())
        zeros = now


# --- sharded --------------------------------------------------------------------------------------


def test_sharded_weights_are_held_each_process_its_part(one_process: None) -> None:
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    plain, sharded = pruned(), pruned()
    for part in (sharded[0], sharded[2], sharded):
        fully_shard(part)
    for model in (plain, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        held = sc.hold(model, optimizer)
        train(model, optimizer, 3)
    assert type(held.masks["0"]) is type(sharded[0].weight.data)
    for one, two in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, two.full_tensor())
    held.release()
    with pytest.raises(ValueError, match=r"0.weight is sharded: prune_ the model before"):
        sc.hold(sharded, optimizer, lambda name, weight, mask, step: mask)
    with pytest.raises(ValueError, match=r"0.weight is sharded: prune_ the model before"):
        movement(sharded, sc.plan(plain, "2:4"), optimizer, constant(0.5))


def test_one_process_goes_on_from_what_two_have_saved(tmp_path: Path, one_process: None) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    command = [sys.executable, "-m", "tests.train.two_processes"]
    both = [subprocess.Popen([*command, str(r), "2", str(tmp_path)], cwd=ROOT) for r in (0, 1)]
    whole = two_processes.sharded()
    optimizer, held = two_processes.begun(whole)
    two_processes.train(whole, optimizer, held, 6)
    assert [process.wait(timeout=120) for process in both] == [0, 0]

    resumed = two_processes.sharded()
    weights = resumed.state_dict()
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "checkpoint")
    resumed.load_state_dict(weights)
    optimizer, again = two_processes.begun(resumed)
    again.masks = {name: ~mask for name, mask in again.masks.items()}
    dcp.load({"held": again}, checkpoint_id=tmp_path / "checkpoint")
    assert again.steps == 3
    two_processes.train(resumed, optimizer, again, 3)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one.full_tensor(), two.full_tensor(), atol=1e-6)
    for name, mask in held.masks.items():
        assert torch.equal(mask.full_tensor(), again.masks[name].full_tensor())
    assert again.came_back() == {}


@pytest.fixture
def one_process():
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
