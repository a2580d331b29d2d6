"""`prune_`, `reconstruct_`, `check`: what they change, never change, and refuse."""

import copy
import functools
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import secateur as sc
from secateur.core.disk.checkpoint import Checkpoint
from secateur.patterns import Pattern
from secateur.reconstruct import Solution
from tests.models import ConvNet, Decoder

METHODS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (sc.prune_, sc.magnitude),
    (sc.prune_, sc.wanda),
    (sc.reconstruct_, sc.sparsegpt),
]
each_method = pytest.mark.parametrize(
    ("verb", "method"), METHODS, ids=["magnitude", "wanda", "sparsegpt"]
)


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(4)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def squared_norms(
    model: nn.Module, layers: dict[str, nn.Linear], batches: list[Tensor]
) -> dict[str, Tensor]:
    """Each layer's sum of squared inputs over all tokens, in float64, from plain hooks."""
    sums = {name: torch.zeros(m.in_features, dtype=torch.float64) for name, m in layers.items()}

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[name] += args[0].flatten(0, 1).double().square().sum(0)

    handles = [m.register_forward_pre_hook(partial(add, n)) for n, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).square().sum() / expected.square().sum())


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@each_method
@pytest.mark.parametrize(
    "pattern",
    ["2:4", "1:4", "unstructured:0.6", "unstructured:0.6@layer", "block:4x4@0.5", "channels:0.25"],
)
def test_leaves_an_ordinary_model_with_the_planned_zeros(verb, method, pattern: str) -> None:
    model = decoder()
    dense, parameters = state(model), dict(model.named_parameters())
    plan = sc.plan(model, pattern)
    report = verb(model, plan, method, tokens())
    sc.check(model, plan)
    assert list(model.state_dict()) == list(dense)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in plan.layers:
            assert torch.equal(tensor, dense[name])
    assert [r.layer for r in report.layers] == list(plan.layers)
    for result in report.layers:
        weight = model.get_submodule(result.layer).weight
        assert result.sparsity == pytest.approx(float((weight == 0).float().mean()))
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert_unchanged(other, model.state_dict())


def test_pruning_never_changes_a_kept_weight() -> None:
    model = decoder()
    dense = state(model)
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan, sc.wanda, tokens())
    for name in plan.layers:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight[weight != 0], dense[name + ".weight"][weight != 0])


def test_wanda_equals_the_formula_on_each_blocks_own_inputs() -> None:
    """Block by block, with the norms that the pruned blocks before it produce."""
    model, batches = decoder(), tokens()
    expected = copy.deepcopy(model)
    for block in expected.blocks:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        for name, total in squared_norms(expected, linears, batches).items():
            weight = linears[name].weight.data
            weight.mul_(sc.Unstructured(0.5).mask(weight.double().abs() * total.sqrt()))
    sc.prune_(model, sc.plan(model, "unstructured:0.5"), sc.wanda, batches)
    assert_unchanged(model, expected.state_dict())


def test_reconstruction_loses_less_output_than_pruning_the_same_model() -> None:
    """It says how much, too: the reported error is the error of the layer's outputs."""
    torch.manual_seed(0)
    mix = torch.randn(32, 32) @ torch.diag(torch.linspace(2, 0.05, 32))
    batches = [torch.randn(200, 32) @ mix for _ in range(3)]
    losses = {}
    for verb, method in METHODS:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 24, bias=False))
        dense = copy.deepcopy(model)
        report = verb(model, sc.plan(model, "2:4"), method, batches)
        x = torch.cat(batches)
        losses[method] = relative_error(model(x), dense(x))
        if method is sc.sparsegpt:
            assert report.layers[0].error == pytest.approx(losses[method], rel=1e-3)
        else:
            assert report.layers[0].error is None
    assert losses[sc.sparsegpt] < 0.8 * losses[sc.wanda] < 0.8 * losses[sc.magnitude]


def test_convolutions_are_pruned_along_their_input_channels() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    plan = sc.plan(model, "2:4")
    images = [torch.randn(2, 4, 10, 10)]
    sc.reconstruct_(model, plan, sc.sparsegpt, images)
    sc.check(model, plan)
    kept = (model.stage2[0].conv1.weight != 0).view(16, 4, 4, 3, 3).sum(2)
    assert (kept <= 2).all()


def test_bf16_weights_stay_bf16() -> None:
    model = decoder().bfloat16()
    plan = sc.plan(model, "block:4x4@0.5")
    sc.reconstruct_(model, plan, sc.sparsegpt, tokens())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    sc.check(model, plan)
    assert model(tokens()[0]).dtype == torch.bfloat16


@each_method
def test_offloading_changes_nothing(verb, method) -> None:
    one, other = decoder(), decoder()
    verb(one, sc.plan(one, "2:4"), method, tokens())
    verb(other, sc.plan(other, "2:4"), method, tokens(), offload=True)
    assert_unchanged(one, other.state_dict())


def test_options_of_an_algorithm_are_fixed_by_partial() -> None:
    one, other = decoder(), decoder()
    sc.reconstruct_(one, sc.plan(one, "2:4"), sc.sparsegpt, tokens())
    damped = functools.partial(sc.sparsegpt, damping=10.0)
    report = sc.reconstruct_(other, sc.plan(other, "2:4"), damped, tokens())
    assert report.method == "sparsegpt(damping=10.0)"
    name = "blocks.0.up_proj"
    assert not torch.equal(one.get_submodule(name).weight, other.get_submodule(name).weight)


def test_the_report_prints_a_line_a_layer_and_is_plain_data() -> None:
    model = decoder()
    report = sc.reconstruct_(model, sc.plan(model, "2:4"), sc.sparsegpt, tokens())
    text = str(report)
    assert text.count("2:4") == 18
    assert "sparsegpt: 18 layers in " in text
    assert len(report.rows()[0]) == len(report.columns)
    assert json.loads(json.dumps(report.to_dict()))["method"] == "sparsegpt"


# --- nothing is changed by what raises -----------------------------------------------------------


def interrupting(
    criterion: Callable[..., Any], after: int, error: BaseException
) -> Callable[..., Any]:
    """The criterion, except that its n-th call raises."""
    calls = iter(range(after + 1))

    @functools.wraps(criterion)
    def wrapped(*args: Any, **arguments: Any) -> Any:
        if next(calls, after) >= after:
            raise error
        return criterion(*args, **arguments)

    return wrapped


@each_method
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("boom")], ids=["ctrl-c", "error"]
)
def test_an_interrupted_run_leaves_the_model_as_it_was(verb, method, error) -> None:
    model = decoder().train()
    before = state(model)
    with pytest.raises(type(error)):
        verb(model, sc.plan(model, "2:4"), interrupting(method, 11, error), tokens())
    assert_unchanged(model, before)
    assert model.training
    assert all(not m._forward_pre_hooks for m in model.modules())


@each_method
def test_an_interrupted_run_goes_on_from_its_checkpoint(verb, method, tmp_path: Path) -> None:
    whole, model, folder = decoder(), decoder(), tmp_path / "run"
    expected = verb(whole, sc.plan(whole, "2:4"), method, tokens())
    plan = sc.plan(model, "2:4")
    with pytest.raises(KeyboardInterrupt):
        verb(
            model, plan, interrupting(method, 11, KeyboardInterrupt()), tokens(), checkpoint=folder
        )
    done = len(list(folder.glob("layers-*.safetensors")))
    finished = sum(len(load_file(file)) for file in folder.glob("layers-*.safetensors"))
    assert 0 < done <= finished < 18
    calls: list[int] = []
    counting = functools.wraps(method)(lambda *a, **k: calls.append(1) or method(*a, **k))
    report = verb(model, plan, counting, tokens(), checkpoint=folder)
    assert len(calls) == 18 - finished
    assert_unchanged(model, whole.state_dict())
    assert report.layers == expected.layers


def test_a_finished_checkpoint_needs_no_work_in_a_new_process(tmp_path: Path) -> None:
    model, again = decoder(), decoder()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan, sc.wanda, tokens(), checkpoint=tmp_path / "run")
    handles = [m.register_forward_hook(never) for m in again.modules()]
    sc.prune_(again, plan, functools.wraps(sc.wanda)(never), tokens(), checkpoint=tmp_path / "run")
    for handle in handles:
        handle.remove()
    assert_unchanged(again, model.state_dict())


def never(*args: object, **options: object) -> None:
    raise AssertionError("nothing is left to be done")


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    model, folder = decoder(), tmp_path / "run"
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan, sc.wanda, tokens(), checkpoint=folder)
    other = decoder()
    with pytest.raises(ValueError, match="belongs to another run, its method differs"):
        sc.prune_(other, plan, sc.magnitude, checkpoint=folder)
    with pytest.raises(ValueError, match="belongs to another run, its plan differs"):
        sc.prune_(other, sc.plan(other, "1:4"), sc.wanda, tokens(), checkpoint=folder)
    other.blocks[0].up_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="belongs to another run, its weights differs"):
        sc.prune_(other, plan, sc.wanda, tokens(), checkpoint=folder)


def test_a_folder_with_other_files_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="needs an empty folder or its own"):
        Checkpoint(tmp_path, {})
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress.json is not a checkpoint"):
        Checkpoint(tmp_path, {})


# --- bad input -----------------------------------------------------------------------------------


def test_a_method_that_needs_data_says_so() -> None:
    model = decoder()
    before = state(model)
    with pytest.raises(
        ValueError, match="wanda needs calibration data for input_norm: pass batches"
    ):
        sc.prune_(model, sc.plan(model, "2:4"), sc.wanda)
    assert_unchanged(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    model = decoder()
    model.blocks[1].up_proj.weight.data[2, 3] = bad
    with pytest.raises(ValueError, match=r"blocks.1.up_proj.weight holds 1 NaN or infinite values"):
        sc.prune_(model, sc.plan(model, "2:4"))


def test_parametrized_and_empty_weights_are_named() -> None:
    model = decoder()
    plan = sc.plan(model, "2:4")
    parametrize.register_parametrization(model.blocks[0].up_proj, "weight", nn.Identity())
    with pytest.raises(
        ValueError, match=r"blocks.0.up_proj.weight is computed by a parametrization"
    ):
        sc.prune_(model, plan)
    with torch.device("meta"):
        empty = Decoder()
    with pytest.raises(ValueError, match="has no data"):
        sc.prune_(empty, sc.plan(empty, "2:4"))


def test_a_plan_for_another_model_is_refused_before_anything() -> None:
    model = decoder()
    before = state(model)
    with pytest.raises(ValueError, match="made for another model"):
        sc.prune_(model, sc.plan(ConvNet(), "2:4"))
    assert_unchanged(model, before)


def test_a_criterion_that_asks_for_the_unknown_is_told_what_there_is() -> None:
    def mine(weight: Tensor, curvature: Tensor) -> Tensor:
        return weight * curvature

    model = decoder()
    with pytest.raises(ValueError, match="mine asks for 'curvature', which is no statistic"):
        sc.prune_(model, sc.plan(model, "2:4"), mine, tokens())


def test_scores_of_the_wrong_shape_or_nan_are_refused_and_nothing_is_lost() -> None:
    model = decoder()
    before = state(model)
    for wrong in (lambda weight: weight.sum(0), lambda weight: weight / 0 * 0):
        with pytest.raises(
            ValueError, match=r"layer blocks.0.attention.q_proj: criterion .* needs to give scores"
        ):
            sc.prune_(model, sc.plan(model, "2:4"), wrong)
    assert_unchanged(model, before)


def test_an_algorithm_that_misses_the_pattern_is_refused_and_nothing_is_lost() -> None:
    def careless(weight: Tensor, pattern: sc.NM) -> Solution:
        return Solution(weight, torch.ones_like(weight, dtype=torch.bool))

    model = decoder()
    before = state(model)
    message = r"layer blocks.0.attention.q_proj: careless needs to give a mask of 2:4, .* 64 groups"
    with pytest.raises(ValueError, match=message):
        sc.reconstruct_(model, sc.plan(model, "2:4"), careless, tokens())
    assert_unchanged(model, before)


def test_a_pattern_stands_for_the_plan_that_gives_it_to_every_layer() -> None:
    one, other = decoder(), decoder()
    sc.prune_(one, "2:4")
    sc.prune_(other, sc.plan(other, "2:4"))
    assert_unchanged(one, other.state_dict())


def test_criteria_and_algorithms_are_not_mixed_up(unchecked: None) -> None:
    model = decoder()
    with pytest.raises(ValueError, match="sparsegpt refits weights, prune_ .*: use reco"):
        sc.prune_(model, "2:4", sc.sparsegpt, tokens())
    with pytest.raises(ValueError, match="wanda only scores weights, .*: use prune_"):
        sc.reconstruct_(model, "2:4", sc.wanda, tokens())
    with pytest.raises(ValueError, match="take functions such as sc.wanda, got 'wanda'"):
        sc.prune_(model, "2:4", "wanda", tokens())


# --- check ---------------------------------------------------------------------------------------


def test_check_names_every_layer_that_breaks_the_plan() -> None:
    model = decoder()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    assert set(sc.check(model, plan).values()) == {0.5}
    weight = model.blocks[2].up_proj.weight.data
    weight[3, 4:8] = 1
    with pytest.raises(ValueError) as error:
        sc.check(model, plan)
    assert "1 of 18 layers break the plan: blocks.2.up_proj (2:4) has 1 groups of 4" in str(
        error.value
    )
    assert "first columns 4..7 of row 3, keeping 4" in str(error.value)


def test_check_takes_anybodys_zeros_and_a_pattern_for_a_plan() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data = torch.tensor([[1.0, 0, 0, 1], [0, -0.0, 1, 0]])
    assert sc.check(model, "2:4") == {"0": 5 / 8}
    with pytest.raises(ValueError, match="layers break the plan"):
        sc.check(model, "1:4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", [sc.magnitude, sc.wanda, sc.ria, sc.criteria.random])
def test_a_kept_weight_is_the_same_to_the_bit_in_every_dtype(criterion, dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(4, 8, 3), nn.Embedding(8, 4)).to(dtype)
    model.forward = lambda x: model[0](x)
    weight = model[0].weight.detach().clone()
    batches = [torch.randn(8, 16, dtype=dtype)]
    sc.prune_(model, sc.plan(model, "2:4", layers=["0"]), criterion, batches)
    kept = model[0].weight != 0
    assert (kept.view(8, 4, 4).sum(-1) == 2).all()
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight[kept], weight[kept])


def test_float64_weights_that_float32_cannot_tell_apart_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64))
    rows = [
        [1 + 3e-16, 1 + 9e-16, 1.0, 1 + 6e-16],
        [1e-60, 3e-60, 2e-60, 0.0],
        [1e200, 2, 3, 1e201],
    ]
    model[0].weight.data.copy_(torch.tensor(rows, dtype=torch.float64))
    report = sc.prune_(model, "2:4")
    wanted = [[0, rows[0][1], 0, rows[0][3]], [0, 3e-60, 2e-60, 0], [1e200, 0, 0, 1e201]]
    assert model[0].weight.tolist() == wanted
    assert report.layers[0].sparsity_before == pytest.approx(1 / 12)
    assert sc.check(model, "2:4") == {"0": 0.5}


@pytest.mark.parametrize(
    "algorithm",
    [sc.sparsegpt, sc.alps, sc.refit(sc.wanda), sc.swap(sc.wanda), sc.best],
    ids=["sparsegpt", "alps", "refit", "swap", "best"],
)
def test_what_an_algorithm_leaves_as_it_was_stays_to_the_bit_in_float64(algorithm) -> None:
    """A row that drops nothing has nothing to make up for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight[3].view(4, 4)[:, :2] = 0
    before = model[0].weight.detach().clone()
    batches = [torch.randn(32, 16, dtype=torch.float64) for _ in range(4)]
    sc.reconstruct_(model, "2:4", algorithm, batches)
    assert torch.equal(model[0].weight[3], before[3])
    assert not torch.equal(model[0].weight[0], before[0])
    assert sc.check(model, "2:4") == {"0": 0.5}
    dense, masked, found = (
        sum(float((x @ w.T).square().sum()) for x in batches)
        for w in (before, before * (model[0].weight == 0), before - model[0].weight.detach())
    )
    assert 0 < found <= masked < dense


class Uncopyable(nn.Sequential):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")


def test_a_model_that_cannot_be_copied_is_told_to_take_best() -> None:
    torch.manual_seed(0)
    model = Uncopyable(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    batches = [torch.randn(8, 16) for _ in range(4)]
    before = state(model)
    with pytest.raises(ValueError) as error:
        sc.reconstruct_(model, "2:4", sc.thorough, batches)
    assert "copy of the dense model, and this Uncopyable cannot be copied (cannot pickle" in str(
        error.value
    )
    assert "take sc.best" in str(error.value)
    assert_unchanged(model, before)
    sc.reconstruct_(model, "2:4", sc.best, batches)
    assert sc.check(model, "2:4") == {"0": 0.5, "2": 0.5}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 16, device="meta"), r"batch 1, .*, is on the meta device, which holds no"),
        ((torch.ones(2, 16, device="meta"),), r"batch 1, .*, is on the meta device"),
        ({"input": torch.ones(2, 16, device="meta")}, r"batch 1, .*, is on the meta device"),
    ],
)
def test_batches_without_data_are_named(batch, message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    before = state(model)
    for verb in (
        lambda: sc.prune_(model, "2:4", sc.wanda, [torch.ones(2, 16), batch]),
        lambda: sc.reconstruct_(model, "2:4", sc.sparsegpt, [torch.ones(2, 16), batch]),
    ):
        with pytest.raises(ValueError, match=message):
            verb()
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", [sc.wanda, sc.sparsegpt, sc.best])
def test_batches_made_in_inference_mode_are_as_good(method) -> None:
    results = []
    for made in (torch.no_grad(), torch.inference_mode()):
        with made:
            generator = torch.Generator().manual_seed(0)
            batches = [(torch.randn(8, 16, generator=generator),) for _ in range(4)]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        if method is sc.wanda:
            sc.prune_(model, "2:4", method, batches)
        else:
            sc.reconstruct_(model, "2:4", method, batches)
        results.append(state(model))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_wrapped_model_is_pruned_inside() -> None:
    batches = [torch.randint(20, (2, 6)) for _ in range(3)]
    plain = decoder()
    expected = sc.reconstruct_(plain, "2:4", sc.sparsegpt, batches)
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model = decoder()
        report = sc.reconstruct_(wrap(model), "2:4", sc.sparsegpt, batches)
        assert report.layers == expected.layers
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
        assert sc.check(wrap(model), "2:4") == sc.check(model, "2:4")


# --- weights that are zero already ---------------------------------------------------------------

AGAIN: dict[str, tuple[Callable[..., Any], Any]] = {
    "random": (sc.prune_, sc.criteria.random),
    "wanda": (sc.prune_, sc.wanda),
    "sparsegpt": (sc.reconstruct_, sc.sparsegpt),
    "sparsegpt in int4": (sc.reconstruct_, partial(sc.sparsegpt, grid=sc.Int4(16))),
    "alps": (sc.reconstruct_, sc.alps),
    "refit(swap(wanda))": (sc.reconstruct_, sc.refit(sc.swap(sc.wanda))),
    "best": (sc.reconstruct_, sc.blockwise(sc.alps, epochs=1)),
    "thorough": (sc.reconstruct_, sc.blockwise(sc.sparsegpt, epochs=1, distil=1)),
    "thorough in int4": (
        sc.reconstruct_,
        sc.blockwise(sc.sparsegpt, epochs=1, distil=1, grid=sc.Int4(16)),
    ),
}


def thinned(share: float) -> Decoder:
    """A decoder with this share of zeros in its linear layers, anywhere."""
    model = decoder()
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            zeros = torch.rand(module.weight.shape, generator=generator) < share
            module.weight.data.masked_fill_(zeros, 0)
    return model


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.5", "unstructured:0.5@layer"])
def test_a_second_pass_keeps_the_zeros_and_counts_them(again: str, pattern: str) -> None:
    verb, method = AGAIN[again]
    model = thinned(0.4)
    before = state(model)
    plan = sc.plan(model, pattern)
    report = verb(model, plan, method, tokens(), keep_zeros=True)
    sc.check(model, plan)
    for row in report.layers:
        was, now = before[f"{row.layer}.weight"], model.get_submodule(row.layer).weight
        assert not now[was == 0].any()
        assert row.sparsity_before == pytest.approx(float((was == 0).float().mean()))
        if "int4" not in again:  # where a kept weight may round to zero
            groups = {"2:4": was.reshape(-1, 4), "unstructured:0.5": was}.get(
                pattern, was.view(1, -1)
            )
            asked = groups.shape[1] // 2
            assert int((now == 0).sum()) == int((groups == 0).sum(1).clamp(min=asked).sum())


@pytest.mark.parametrize("method", [sc.sparsegpt, sc.alps])
def test_a_refit_that_loses_zeros_warns_before_and_tells_after(method: Any) -> None:
    model = thinned(0.5)
    before = state(model)
    with pytest.warns(UserWarning, match="18 of 18 layers .* keep_zeros=True") as told:
        report = sc.reconstruct_(model, "2:4", method, tokens())
    assert len(told) == 1
    lost = 0
    for row in report.layers:
        was, now = before[f"{row.layer}.weight"], model.get_submodule(row.layer).weight
        lost += int(now[was == 0].count_nonzero())
        count = int(now[was == 0].count_nonzero())
        assert (f"{count} weights that were zero are not any more" in row.note) == bool(count)
    assert lost > 100
    assert [row[2] for row in report.rows()] == [f"{r.sparsity_before:.2%}" for r in report.layers]


def test_a_plan_that_the_zeros_meet_loses_none_and_warns_of_nothing() -> None:
    """Warnings are errors here. Training would give values to zeros that the plan keeps."""
    for method in (sc.sparsegpt, sc.alps):
        model = thinned(0.9)
        before = state(model)
        report = sc.reconstruct_(model, "unstructured:0.5", method, tokens())
        assert all("not any more" not in row.note for row in report.layers)
        assert all(not now[before[name] == 0].any() for name, now in model.state_dict().items())
    sc.prune_(thinned(0.7), "2:4", sc.wanda, tokens())
    with pytest.warns(UserWarning, match="keep_zeros=True"):
        sc.reconstruct_(thinned(0.9), "unstructured:0.5", sc.blockwise(sc.wanda), tokens())


def test_an_algorithm_that_keeps_zeros_by_a_mask_of_its_own_is_named() -> None:
    def first_half(weight: Tensor, gram: Tensor, pattern: Pattern) -> Solution:
        mask = torch.arange(weight.shape[1]).expand_as(weight) % 4 < 2
        return Solution(weight * mask, mask)

    model = thinned(0.2)
    before = state(model)
    needs = r"layer blocks\.0\.[\w.]+: first_half needs to give a mask of 2:4, its mask keeps \d+ "
    with pytest.raises(ValueError, match=f"{needs}weights that were zero, first row 0, column "):
        sc.reconstruct_(model, "2:4", first_half, tokens(), keep_zeros=True)
    assert_unchanged(model, before)


def test_a_checkpoint_is_of_a_run_that_keeps_zeros_or_of_one_that_does_not(tmp_path: Path) -> None:
    sc.prune_(thinned(0.2), "2:4", sc.wanda, tokens(), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="keep_zeros"):
        sc.prune_(
            thinned(0.2), "2:4", sc.wanda, tokens(), checkpoint=tmp_path / "run", keep_zeros=True
        )
