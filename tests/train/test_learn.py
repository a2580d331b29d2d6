"""Masks that training learns: as a model whose forward prunes dense weights, under any trainer."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.core.conv1d import is_conv1d
from secateur.patterns import parse
from secateur.train import SoftThreshold, StraightThrough, Supermask, learn_masks_, movement
from secateur.train.learn import Learning
from secateur.train.schedules import constant
from secateur.train.straight_through import Learner, Learnt
from tests.models import ConvNet
from tests.train import two_processes
from tests.train.trainers import (
    LOOPS,
    OPTIMIZERS,
    SAM,
    Drive,
    accumulating,
    all_of,
    goal,
    in_closures,
    inputs,
    net,
    plainly,
    scaled,
)

ROOT = Path(__file__).parents[2]
RULES: dict[str, Learner] = {
    "STE": StraightThrough(),
    "SR-STE": StraightThrough(0.05),
    "AST": StraightThrough(0.05, ramp=3),
    "S-STE": SoftThreshold(),
    "supermask": Supermask(),
}
# Which parameter of trainers.Net each layer's matrix is.
PLACES = {"cell.weight_ih": "cell.weight_ih", "cell.weight_hh": "cell.weight_hh"}
PLACES["head"] = "head.weight"


class Through(torch.autograd.Function):
    """What the model computes with; its gradient passes to what is trained by the formula."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, computed: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return computed.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (g if ctx.factor is None else g * ctx.factor), None, None


def out_of_place(
    make: Callable[[nn.Module], Any], drive: Drive, rule: Learner, pattern: str, steps: int
) -> dict[str, Tensor]:
    """All parameters of a model that prunes its dense weights in each forward, written out.

    Masks are chosen behind steps, which a search within a step can tell from each forward.
    """
    model, how = net(), parse(pattern)
    parameters = dict(model.named_parameters())
    fixed = {}
    for name, place in PLACES.items():
        trained, fixed[place] = rule.begin(name, parameters[place].detach(), how)
        parameters[place].data.copy_(trained)
    optimizer = make(model)
    masks: dict[str, Tensor] = {}

    def choose(*ignored: Any) -> None:
        for place in PLACES.values():
            masks[place] = how.mask(parameters[place].detach().abs())

    def computed(place: str) -> Tensor:
        return rule.weight(Learnt(parameters[place].detach(), masks[place], fixed[place]), how)

    choose()
    for one in all_of(optimizer):
        one.register_step_post_hook(choose)

    def loss(x: Tensor) -> Tensor:
        pruned = {}
        for place in PLACES.values():
            S, W = parameters[place], fixed[place]
            factor = W * S.detach().sign() if isinstance(rule, Supermask) else None
            pruned[place] = Through.apply(S, computed(place), factor)
        return goal(torch.func.functional_call(model, pruned, (x,)), x)

    taken: dict[int, int] = {}

    def decay(one: Any, args: Any, kwargs: Any) -> None:
        assert isinstance(rule, StraightThrough)
        taken[id(one)] = taken.get(id(one), 0) + 1
        share = min(1.0, taken[id(one)] / rule.ramp) if rule.ramp else 1.0
        own = [p for group in one.param_groups for p in group["params"]]
        for place in PLACES.values():
            W = parameters[place]
            if any(W is p for p in own):
                W.grad += rule.decay * share * ~masks[place] * W.detach()

    if isinstance(rule, StraightThrough) and rule.decay:
        for one in all_of(optimizer):
            one.register_step_pre_hook(decay)
    drive(loss, optimizer, None, inputs(steps))
    places = PLACES.values()
    return {n: computed(n) if n in places else p.detach() for n, p in parameters.items()}


def learnt(
    make: Callable[[nn.Module], Any], drive: Drive, rule: Learner, pattern: str, steps: int
) -> dict[str, Tensor]:
    model = net()
    optimizer = make(model)
    with learn_masks_(model, sc.plan(model, pattern), optimizer, rule) as learning:
        drive(loss_of(model), optimizer, None, inputs(steps))
        assert learning.steps == steps - (drive is scaled)
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: goal(model(x), x)


def expect_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


# --- what is learnt -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["STE", "S-STE"])
@pytest.mark.parametrize("drive", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_a_model_whose_forward_prunes(make, drive, name: str) -> None:
    rule = RULES[name]
    expect_equal(learnt(make, drive, rule, "2:4", 4), out_of_place(make, drive, rule, "2:4", 4))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.6@layer", "block:2x2@0.5"])
@pytest.mark.parametrize("name", ["STE", "SR-STE", "supermask"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_rule_is_that_of_its_definition_for_every_pattern(
    make, name: str, pattern: str
) -> None:
    """A decay is added at the step: the plain loop has nothing between that and the backward."""
    rule = RULES[name]
    found = learnt(make, plainly, rule, pattern, 6)
    expect_equal(found, out_of_place(make, plainly, rule, pattern, 6))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon"])
def test_a_decay_rises_with_the_steps_that_an_optimizer_has_taken(name: str) -> None:
    found = learnt(OPTIMIZERS[name], plainly, RULES["AST"], "2:4", 6)
    expect_equal(found, out_of_place(OPTIMIZERS[name], plainly, RULES["AST"], "2:4", 6))


def test_a_decay_is_added_once_to_what_backwards_add_up() -> None:
    def make(model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.05)

    found = learnt(make, accumulating, RULES["SR-STE"], "2:4", 4)
    expect_equal(found, out_of_place(make, accumulating, RULES["SR-STE"], "2:4", 4))
    clipped = learnt(make, LOOPS["clipping"], RULES["SR-STE"], "2:4", 4)
    expect_equal(clipped, out_of_place(make, LOOPS["clipping"], RULES["SR-STE"], "2:4", 4))


def test_what_was_there_before_a_closure_is_taken_with_what_it_adds() -> None:
    def in_closures_too(loss: Any, optimizer: Any, held: Any, data: list[Tensor]) -> None:
        for x, y in zip(data, reversed(data), strict=True):
            loss(x).backward()

            def closure(y: Tensor = y) -> Tensor:
                value = loss(y)
                value.backward()
                return value

            optimizer.step(closure)
            optimizer.zero_grad()

    def make(model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.05)

    plain = learnt(make, accumulating, RULES["SR-STE"], "2:4", 4)
    expect_equal(learnt(make, in_closures_too, RULES["SR-STE"], "2:4", 4), plain)


def test_lbfgs_searches_among_the_dense_weights() -> None:
    """It calls its closure many times in a step, each time on weights pruned anew."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    for rule in (StraightThrough(), SoftThreshold()):
        found = learnt(make, in_closures, rule, "2:4", 3)
        expect_equal(found, out_of_place(make, in_closures, rule, "2:4", 3))


def test_sam_learns_through_the_optimizer_inside_it() -> None:
    """Its first step moves what the model computes with, its second the dense weights."""

    def with_a_backward_before(loss: Any, optimizer: Any, held: Any, data: list[Tensor]) -> None:
        for x in data:
            loss(x).backward()
            in_closures(loss, optimizer, held, [x])

    def make(model: nn.Module) -> SAM:
        return SAM(model.parameters())

    def by_hand(steps: int) -> Tensor:
        """A step of the definition: the gradient where weights are worst, for the dense ones."""
        layer, how = nn.Linear(16, 4), parse("2:4")
        layer.load_state_dict(start)
        W = layer.weight.detach().clone()
        optimizer = torch.optim.AdamW([dense := nn.Parameter(W), layer.bias], lr=0.01)
        for x in inputs(steps):
            pruned = dense.detach() * how.mask(dense.detach().abs())
            bias = layer.bias.detach().clone()
            slopes = torch.autograd.grad(
                goal(nn.functional.linear(x, p := pruned.requires_grad_(), layer.bias), x),
                (p, layer.bias),
            )
            norm = torch.stack([slope.norm() for slope in slopes]).norm() + 1e-12
            worst = (pruned.detach() + slopes[0] * (0.5 / norm)).requires_grad_()
            beside = (bias + slopes[1] * (0.5 / norm)).requires_grad_()
            found = torch.autograd.grad(
                goal(nn.functional.linear(x, worst, beside), x), (worst, beside)
            )
            dense.grad, layer.bias.grad = found
            optimizer.step()
        return dense.detach()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    start = copy.deepcopy(model[0].state_dict())
    optimizer, plan = make(model), sc.plan(model, "2:4", layers=["0"])
    with learn_masks_(model, plan, optimizer, StraightThrough()) as learning:
        with_a_backward_before(loss_of(model), optimizer, None, inputs(3))
        assert learning.steps == 3
        assert torch.equal(learning.state_dict()["trained"]["0"], by_hand(3))
    sc.check(model, plan)


class Twice(torch.optim.AdamW):
    """Calls each closure twice, as line searches do; torch's hooks are around both `step`s."""

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        closure()
        return super().step(closure)


@pytest.mark.parametrize("name", ["SR-STE", "supermask"])
def test_gradients_are_taken_to_what_trains_once_however_often_they_are_made(name: str) -> None:
    def make(kind: Any) -> Callable[[nn.Module], Any]:
        return lambda model: kind(model.parameters(), lr=0.01)

    plain = learnt(make(torch.optim.AdamW), plainly, RULES[name], "2:4", 4)
    expect_equal(learnt(make(torch.optim.AdamW), in_closures, RULES[name], "2:4", 4), plain)
    expect_equal(learnt(make(Twice), in_closures, RULES[name], "2:4", 4), plain)


def test_a_scaler_scales_the_decay_as_well() -> None:
    """Fused updates see scaled gradients; others are handed unscaled ones."""

    def make(fused: bool) -> Callable[[nn.Module], Any]:
        return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)

    one, two = (learnt(make(fused), scaled, RULES["SR-STE"], "2:4", 4) for fused in (True, False))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-6), name


def test_a_pruned_weight_comes_back_with_the_value_that_it_has_grown_to() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = sc.plan(model, "1:2")
    with learn_masks_(model, plan, optimizer, StraightThrough(0.5)) as learning:
        assert model[0].weight.tolist() == [[0.0, 2.0]]
        seen = []
        for slopes in ([-2.0, 0.0], [0.0, 0.0], [0.0, 0.0]):
            model[0].weight.grad = torch.tensor([slopes])
            optimizer.step()
            seen.append(model[0].weight.tolist())
        # 1 - (-2 + 0.5 * 1) = 2.5 overtakes; then 2 loses half of itself at each step.
        assert seen == [[[2.5, 0.0]], [[2.5, 0.0]], [[2.5, 0.0]]]
        assert learning.state_dict()["trained"]["0"].tolist() == [[2.5, 0.5]]
    assert model[0].weight.tolist() == [[2.5, 0.0]]


def test_masks_are_chosen_every_so_many_steps_and_moves_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    learning = learn_masks_(model, sc.plan(model, "2:4"), optimizer, StraightThrough(), every=3)
    assert learning.moves == {}
    last = learning.masks["0"].clone()
    for step, x in enumerate(inputs(7), 1):
        plainly(loss_of(model), optimizer, None, [x])
        mask = learning.masks["0"]
        assert torch.equal(model[0].weight != 0, mask)
        if step % 3:
            assert torch.equal(mask, last)
            continue
        changed = int((last & ~mask).sum())
        assert learning.moves["0"] == (step, changed, changed) and changed > 0
        trained = learning.state_dict()["trained"]["0"]
        assert torch.equal(mask, parse("2:4").mask(trained.abs()))
        last = mask.clone()


# --- laws -----------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    pattern=st.sampled_from(["2:4", "1:4", "unstructured:0.7", "block:2x4@0.5", "channels:0.5@in"]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    every=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_model_has_the_plans_zeros_at_every_step_and_ends_as_it_computed(
    name: str, pattern: str, optimizer: str, every: int, dtype: torch.dtype
) -> None:
    rule = RULES[name]
    if isinstance(rule, SoftThreshold):
        pattern = "2:4"
    model = layers().to(dtype)
    plan = sc.plan(model, pattern)
    keys, shared = list(model.state_dict()), model[0].weight
    given = OPTIMIZERS[optimizer](model)
    learning = learn_masks_(model, plan, given, rule, every=every)
    data = [x.to(dtype) for x in inputs(4)]
    for x in data:
        plainly(loss_of(model), given, None, [x])
        sc.check(model, plan)
        assert torch.equal(
            model[0].weight != 0, model[0].weight.masked_fill(~learning.masks["0"], 0) != 0
        )
    out = model(data[0])
    learning.release()
    assert torch.equal(model(data[0]), out)
    assert list(model.state_dict()) == keys and model[0].weight is shared
    assert type(model[0]) is nn.Linear and shared.dtype == dtype
    assert not model[0]._forward_hooks and not shared._backward_hooks


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    stop=st.integers(1, 5),
    every=st.integers(1, 3),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, optimizer: str, stop: int, every: int
) -> None:
    def begun() -> tuple[nn.Sequential, Any, Learning]:
        model = layers()
        given = OPTIMIZERS[optimizer](model)
        plan = sc.plan(model, "2:4")
        return model, given, learn_masks_(model, plan, given, RULES[name], every=every)

    data = inputs(7)
    model, given, learning = begun()
    plainly(loss_of(model), given, None, data[:stop])
    saved = [copy.deepcopy(one.state_dict()) for one in (model, learning, *all_of(given))]
    plainly(loss_of(model), given, None, data[stop:])

    again, other, resumed = begun()
    biases = {key: value for key, value in saved[0].items() if key.endswith("bias")}
    again.load_state_dict(biases, strict=False)  # the planned weights come with the masks
    for one, state in zip((resumed, *all_of(other)), saved[1:], strict=True):
        one.load_state_dict(state)
    assert resumed.steps == stop
    plainly(loss_of(again), other, None, data[stop:])
    expect_equal(dict(model.named_parameters()), dict(again.named_parameters()))
    expect_equal(learning.masks, resumed.masks)
    learning.release()
    resumed.release()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc(x).tanh()
        return out


def compiled(learns: bool, backend: str) -> tuple[int, Tensor]:
    """How many graphs four alike layers took in three steps, and a weight then."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if learns:
        learn_masks_(model, sc.plan(model, "2:4"), optimizer, StraightThrough())
    for layer in model if backend else ():
        layer.compile(backend=backend, fullgraph=True)
    for x in inputs(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return counters["stats"]["unique_graphs"], model[0].fc.weight.detach()


def check_compiled() -> None:
    (dense, _), (learnt, weight) = compiled(False, "aot_eager"), compiled(True, "aot_eager")
    assert dense == learnt == 2, (dense, learnt)  # inputs of the first need no gradient
    assert torch.equal(weight, compiled(True, "")[1])
    assert int((weight == 0).sum()) == 128


def test_nothing_is_attached_so_one_graph_serves_alike_layers_as_ever() -> None:
    """In a plain process: dynamo and the shape checks of a test run do not mix."""
    code = "from tests.train.test_learn import check_compiled; check_compiled()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- layers of other kinds ------------------------------------------------------------------------


def test_a_convolution_learns_too() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    plan = sc.plan(model, "1:4", layers=["down"])
    others = [p for p in model.parameters() if p is not model.down.weight]
    optimizers = [torch.optim.SGD(others, lr=0.1), torch.optim.AdamW([model.down.weight])]
    dense = model.down.weight.detach().clone()
    with learn_masks_(model, plan, optimizers, SoftThreshold()) as learning:
        assert torch.equal(learning.state_dict()["trained"]["down"], dense)
        for _ in range(3):
            model(torch.randn(1, 4, 8, 8)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert learning.steps == 3
    sc.check(model, plan)


def test_gpt2s_transposed_layer_learns_too() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(8, 16))
    assert is_conv1d(model[0])
    plan = sc.plan(model, "2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    W = model[0].weight.detach().clone()
    with learn_masks_(model, plan, optimizer, StraightThrough()):
        assert torch.equal(model[0].weight, W * parse("2:4").mask(W.abs().mT).mT)
        plainly(lambda x: model(x).square().mean(), optimizer, None, inputs(2))
    sc.check(model, plan)


def test_a_layer_without_a_gradient_waits() -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with learn_masks_(model, sc.plan(model, "2:4"), optimizer, StraightThrough()) as learning:
        before = model[2].weight.detach().clone(), learning.state_dict()["trained"]["2"]
        model[0](inputs(1)[0]).square().mean().backward()
        optimizer.step()
        assert torch.equal(model[2].weight, before[0])
        assert torch.equal(learning.state_dict()["trained"]["2"], before[1])
        assert set(learning.moves) == {"0"}


def test_what_an_error_in_a_step_left_is_taken_back() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            raise KeyboardInterrupt

    model = layers()
    plan, optimizer = sc.plan(model, "2:4"), Failing(model.parameters(), lr=0.1)
    with (
        pytest.raises(KeyboardInterrupt),
        learn_masks_(model, plan, optimizer, StraightThrough()),
    ):
        model(inputs(1)[0]).square().mean().backward()
        optimizer.step()
    sc.check(model, plan)


def test_an_average_over_steps_gets_the_zeros_of_the_last_masks() -> None:
    """Of masks that moved it had too few; a model that is one layer is known by no name."""
    for model in (layers(), nn.Linear(16, 4)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        average = torch.optim.swa_utils.AveragedModel(model)
        plan = sc.plan(model, "2:4")
        with learn_masks_(model, plan, optimizer, StraightThrough()) as learning:
            for batch in inputs(4):
                plainly(loss_of(model), optimizer, None, [batch])
                average.update_parameters(model)
            with pytest.raises(ValueError, match="keeping more than 2"):
                sc.check(average.module, plan)
            learning.apply_(average)
        sc.check(average.module, plan)
        kept = next(iter(average.module.parameters()))
        assert torch.equal(kept != 0, next(iter(learning.masks.values())))


def test_accelerates_wrapper_is_seen_through() -> None:
    accelerate = pytest.importorskip("accelerate", reason="the wrapper is accelerate's")
    found = []
    for wraps in (False, True):
        model = trained = layers()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        plan = sc.plan(model, "2:4")
        if wraps:
            trained, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
        with learn_masks_(trained, plan, optimizer, StraightThrough(0.01)) as learning:
            plainly(loss_of(trained), optimizer, None, inputs(4))
        assert learning.steps == 4
        found.append({name: p.detach() for name, p in model.named_parameters()})
    expect_equal(*found)


@pytest.mark.parametrize("moves", [False, True])
def test_a_plan_from_before_adapters_holds_for_the_layers_under_them(moves: bool) -> None:
    """For masks that are learnt, and for movement's."""
    peft = pytest.importorskip("peft")
    model = layers()
    plan = sc.plan(model, "unstructured:0.5@layer", layers=["0"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    adapted.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    if moves:
        begun: Any = movement(adapted, plan, optimizer, constant(0.5))
    else:
        begun = learn_masks_(adapted, plan, optimizer, StraightThrough())
    with begun:
        plainly(loss_of(adapted), optimizer, None, inputs(2))
        assert begun.steps == 2 and list(begun.masks) == ["0"]
    sc.check(adapted, plan)


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sr-ste", "s-ste", "supermask"])
def test_two_processes_agree_with_one_that_sees_both_batches(tmp_path: Path, name: str) -> None:
    code = "import sys; from tests.train.two_processes import learn; learn(*sys.argv[1:])"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(r), str(tmp_path), name], cwd=ROOT)
        for r in (0, 1)
    ]
    whole = two_processes.learnt(name, [0, 1])
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(whole["masks"][0], whole["masks"][-1])
    for first, second, alone in zip(*(f["masks"] for f in (*found, whole)), strict=True):
        assert torch.equal(first, second) and torch.equal(first, alone)
    for one, two in zip(found[0]["weights"], found[1]["weights"], strict=True):
        assert torch.equal(one, two)


# --- refused --------------------------------------------------------------------------------------


def refused(message: str, model: nn.Module, *args: Any, **options: Any) -> None:
    """It raises so, and the model is what it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        learn_masks_(model, *args, **options)
    expect_equal(before, model.state_dict())


def test_what_it_refuses_before_anything_has_changed() -> None:
    model, rule = layers(), StraightThrough()
    plan, optimizer = sc.plan(model, "2:4"), torch.optim.SGD(model.parameters(), lr=0.1)
    refused("learn_masks_ needs every >= 1 step, got 0", model, plan, optimizer, rule, every=0)
    elsewhere = torch.optim.SGD(layers().parameters(), lr=0.1)
    refused("the optimizer does not update 0: make it from", model, plan, elsewhere, rule)
    other = sc.plan(model, {"0": "2:4", "2": "unstructured:0.5"})
    refused("2 is planned unstructured:0.5, .* N:M alone", model, other, optimizer, SoftThreshold())
    nn.init.zeros_(model[2].weight)
    refused("2 has no weight larger than those", model, plan, optimizer, SoftThreshold())
    model[2].weight.requires_grad_(False)
    refused(r"2 is frozen \(requires_grad=False\)", model, plan, optimizer, rule)


def test_a_weight_of_two_layers_is_refused_and_so_are_sparse_gradients() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    plan = sc.plan(model, "2:4", layers=["table", "head"])
    model["head"].weight = model["table"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused("table and head share a weight: leave one", model, plan, optimizer, StraightThrough())
    rows = nn.Sequential(nn.Embedding(8, 8, sparse=True))
    plan = sc.plan(rows, "2:4", layers=["0"])
    optimizer = torch.optim.SGD(rows.parameters(), lr=0.1)
    refused("0 makes sparse gradients.*sparse=False", rows, plan, optimizer, StraightThrough())


def test_one_that_is_held_is_refused_and_holds_are_while_masks_are_learnt() -> None:
    model, rule = layers(), StraightThrough()
    plan, optimizer = sc.plan(model, "2:4"), torch.optim.SGD(model.parameters(), lr=0.1)
    with learn_masks_(model, plan, optimizer, rule):
        refused("0.weight is held already.*of what learn_masks_", model, plan, optimizer, rule)
        with pytest.raises(ValueError, match="held already.*of what learn_masks_ returned"):
            sc.hold(model, optimizer)
        with pytest.raises(ValueError, match="held already.*of what learn_masks_ returned"):
            movement(model, plan, optimizer, constant(0.5))
        with pytest.raises(ValueError, match="is held with the zeros that it had"):
            sc.prune_(model, plan)
    with sc.hold(model, optimizer):
        plainly(loss_of(model), optimizer, None, inputs(2))
    sc.check(model, plan)


def test_a_weight_that_something_else_wrote_into_is_named_before_the_step() -> None:
    model = layers()
    plan, optimizer = sc.plan(model, "2:4"), torch.optim.SGD(model.parameters(), lr=0.1)
    with learn_masks_(model, plan, optimizer, StraightThrough()):
        model[2].weight.data[0, 0] += 1
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="2.weight has been written into since the last step"):
            plainly(loss_of(model), optimizer, None, inputs(1))
        expect_equal(before, model.state_dict())


def test_a_run_that_has_diverged_is_not_taken_for_a_change_from_outside() -> None:
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with learn_masks_(model, sc.plan(model, "2:4"), optimizer, StraightThrough()) as learning:
        for _ in range(2):
            model[0].weight.grad = torch.full((24, 16), torch.nan)
            optimizer.step()
        assert learning.steps == 2 and bool(model[0].weight.isnan().any())


def test_states_of_other_runs_are_refused() -> None:
    model = layers()
    plan, optimizer = sc.plan(model, "2:4"), torch.optim.SGD(model.parameters(), lr=0.1)
    with learn_masks_(model, plan, optimizer, StraightThrough()) as learning:
        state = copy.deepcopy(learning.state_dict())
        with pytest.raises(ValueError, match="of no rule of masks .*, the rule is StraightThrough"):
            learning.load_state_dict({"steps": [0]})
        with pytest.raises(ValueError, match="is of Supermask, the rule is StraightThrough: load"):
            learning.load_state_dict({**state, "rule": "Supermask"})
        with pytest.raises(ValueError, match="the trained of this state are of other layers than"):
            learning.load_state_dict({**state, "trained": {"0": torch.zeros(1, 1)}})
        plainly(loss_of(model), optimizer, None, inputs(1))
        with pytest.raises(ValueError, match="is of step 0, training is at step 1"):
            learning.load_state_dict(state)
