"""Self-distillation finds the best kept weights, holds zeros, and resumes to the same bits."""

import copy
import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from secateur.model.evaluate import compare
from secateur.train import WithTask
from secateur.train.distil import distil_

# By its path, as the package may have the function under the file's name.
distil_module = importlib.import_module("secateur.train.distil")


def data(batches: int = 4, seed: int = 0, width: int = 8) -> list[Tensor]:
    """Inputs whose features are correlated, so that kept weights can make up for dropped ones."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return [torch.randn(16, width, generator=generator) @ mix for _ in range(batches)]


def pair(width: int = 8, seed: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    """A model at 2:4 with dropout, and its dense self."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = nn.Sequential(
            nn.Linear(width, 16), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4)
        )
    model = copy.deepcopy(teacher)
    sc.prune_(model, sc.plan(model, "2:4"))
    return model, teacher


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())


def test_a_linear_layer_reaches_the_least_squares_solution_of_its_kept_weights() -> None:
    teacher = nn.Sequential(nn.Linear(8, 1, bias=False))
    nn.init.constant_(teacher[0].weight, 1.0)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    batches = data(1)
    x, y = batches[0], teacher(batches[0]).detach()
    best = torch.linalg.lstsq(x[:, 1::2], y).solution[:, 0]
    report = distil_(model, teacher, batches, steps=600, learning_rate=0.05)
    assert model[0].weight[0, ::2].tolist() == [0.0] * 4
    assert torch.allclose(model[0].weight[0, 1::2], best, atol=1e-3)
    lost = float((x[:, 1::2] @ best - y[:, 0]).square().sum() / y.square().sum())
    assert report.last_loss == pytest.approx(lost, rel=1e-3)
    assert (report.steps, report.loss, report.seed) == (600, "output_loss", 0)
    assert report.first_loss > report.last_loss > 0


def test_zeros_stay_and_everything_but_the_model_s_parameters_is_untouched() -> None:
    model, teacher = pair()
    model[4].bias.requires_grad_(False)
    model[0].bias.grad = torch.full((16,), 7.0)
    model.train()
    teacher[0].train(False)
    before, taught = state(model), state(teacher)
    random = torch.random.get_rng_state()
    report = distil_(model, teacher, data(), steps=20, learning_rate=0.01)
    sc.check(model, "2:4")
    for name in ("0.weight", "4.weight"):
        assert torch.equal(model.state_dict()[name] == 0, before[name] == 0)
        assert not torch.equal(model.state_dict()[name], before[name])
    for name in ("4.bias", "3.running_mean", "3.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert same(teacher, taught)
    assert all(p.grad is None for p in teacher.parameters())
    assert model[0].bias.grad.tolist() == [7.0] * 16 and model[4].weight.grad is None
    assert all(m.training for m in model.modules())
    assert [m.training for m in teacher] == [False, True, True, True, True]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert report.last_loss < report.first_loss


def test_the_same_call_gives_the_same_bits_and_another_seed_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        model, teacher = pair()
        distil_(model, teacher, data(), steps=7, seed=seed)
        runs.append(state(model))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert any(not torch.equal(runs[0][n], runs[2][n]) for n in runs[0])


def test_it_trains_under_no_grad_and_on_any_loss() -> None:
    model, teacher = pair()
    seen: list[Any] = []

    def first_column(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        seen.append((output.requires_grad, target.requires_grad, batch.shape))
        return (output - target)[:, 0].square().mean()

    with torch.no_grad():
        report = distil_(model, teacher, data(), steps=3, loss=first_column)
    assert seen == [(True, False, (16, 8))] * 3
    assert report.loss == "first_column"


def test_a_language_model_comes_closer_to_its_dense_self() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(config)
    model = copy.deepcopy(teacher)
    sc.prune_(model, sc.plan(model, "2:4"))
    ids = torch.randint(24, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    before = compare(model, teacher, rows).kl
    report = distil_(model, teacher, rows, steps=40, learning_rate=3e-3)
    after = compare(model, teacher, rows).kl
    assert after < before / 2
    assert report.first_loss == pytest.approx(before, rel=0.3)  # it is this very measure
    sc.check(model, "2:4")


# --- interrupted ---------------------------------------------------------------------------------


def failing_at(step: int, error: BaseException) -> Callable[..., Tensor]:
    """The default loss, but it raises when it is asked for the given time."""
    calls = 0

    def output_loss(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == step + 1:
            raise error
        return distil_module.output_loss(output, target, batch)

    return output_loss


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("full")])
def test_whatever_is_raised_the_model_is_as_it_was(error: BaseException) -> None:
    model, teacher = pair()
    gradient = torch.ones(16)
    model[0].bias.grad = gradient
    before = state(model)
    with pytest.raises(type(error)):
        distil_(model, teacher, data(), steps=9, loss=failing_at(5, error))
    assert same(model, before)
    assert model[0].bias.grad is gradient
    assert model.training and teacher.training


def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, teacher = pair()
    expected = distil_(whole, teacher, data(), steps=11)
    monkeypatch.setattr(distil_module, "CHECKPOINT_SECONDS", 0.0)
    model, _ = pair()
    start = state(model)
    for stop, kept in ((4, 4), (3, 7)):  # stopped twice
        with pytest.raises(KeyboardInterrupt):
            loss = failing_at(stop, KeyboardInterrupt())
            distil_(model, teacher, data(), steps=11, loss=loss, checkpoint=tmp_path)
        assert same(model, start)
        assert (tmp_path / f"step-{kept:08}.safetensors").is_file()
    report = distil_(model, teacher, data(), steps=11, checkpoint=tmp_path)
    assert same(model, state(whole))
    assert (report.first_loss, report.last_loss) == (expected.first_loss, expected.last_loss)
    finished, _ = pair()  # done already: the same call takes no step
    never = failing_at(0, AssertionError())
    again = distil_(finished, teacher, data(), steps=11, loss=never, checkpoint=tmp_path)
    assert same(finished, state(whole))
    assert again.last_loss == report.last_loss


def test_a_checkpoint_is_only_written_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    model, teacher = pair()
    with pytest.raises(KeyboardInterrupt):
        loss = failing_at(5, KeyboardInterrupt())
        distil_(model, teacher, data(), steps=9, loss=loss, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())
    distil_(model, teacher, data(), steps=2, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "progress.json",
        "step-00000002.safetensors",
    ]


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    model, teacher = pair()
    distil_(copy.deepcopy(model), teacher, data(), steps=2, checkpoint=tmp_path)
    before = state(model)
    other_model, other_teacher = pair(seed=3)
    for arguments, options, what in [
        ((model, teacher, data()), {"steps": 3}, "steps"),
        ((model, teacher, data()), {"steps": 2, "learning_rate": 1e-3}, "learning_rate"),
        ((model, teacher, data(seed=1)), {"steps": 2}, "data"),
        ((other_model, teacher, data()), {"steps": 2}, "model"),
        ((model, other_teacher, data()), {"steps": 2}, "teacher"),
        ((model, teacher, data()), {"steps": 2, "loss": WithTask()}, "loss"),
    ]:
        with pytest.raises(ValueError, match=rf"belongs to another run, its {what} differs"):
            distil_(*arguments, checkpoint=tmp_path, **options)
    assert same(model, before)
    shares = [distil_module._name(WithTask(share)) for share in (0.5, 0.25)]
    assert shares == ["WithTask(share=0.5)", "WithTask(share=0.25)"]


# --- how a step is taken -------------------------------------------------------------------------


def test_gradients_are_clipped_and_held_zeros_do_not_use_up_the_norm(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.constant_(teacher[0].weight, 1.0)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 3.0]]))
    batches = [torch.tensor([[1e6, 1e3]])]  # the gradient of the held weight is 1000 times larger

    def steep(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        return (output - target).square().sum()

    distil_(model, teacher, batches, steps=1, loss=steep, checkpoint=tmp_path)
    kept = load_file(tmp_path / "step-00000001.safetensors")
    # Adam's first moment after one step is 0.1 of the gradient it was given.
    assert kept["exp_avg/0.weight"][0].tolist() == pytest.approx([0.0, -0.1], rel=1e-5)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [distil_module._rate(step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5 + 19] == pytest.approx((1 + math.cos(math.pi * 0.2)) / 2)
    assert rates[99] == pytest.approx(0, abs=1e-3) and min(rates) > 0
    assert [distil_module._rate(0, 1)] == [1.0]


def test_a_step_is_as_long_as_the_learning_rate_says() -> None:
    model, teacher = pair()
    biases: list[Tensor] = []

    def watched(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        biases.append(model[4].bias.detach().clone())
        # the bias has a gradient that never changes, too small to clip: Adam steps by the rate
        return 1e-4 * output.sum()

    distil_(model, teacher, data(1), steps=40, learning_rate=0.01, loss=watched)
    moved = [float((b - a).abs().max()) for a, b in itertools.pairwise(biases)]
    rates = [0.01 * distil_module._rate(step, 40) for step in range(39)]
    assert moved == pytest.approx(rates, rel=1e-3, abs=1e-6)
    assert moved[0] == pytest.approx(0.005, rel=1e-3)


def test_every_batch_comes_once_in_a_round() -> None:
    order = distil_module._shuffled(5, 13, seed=0)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]


# --- errors --------------------------------------------------------------------------------------


def test_errors_come_before_anything_is_changed() -> None:
    model, teacher = pair()
    before = state(model)

    def refused(message: str, *arguments: Any, steps: int = 2, **options: Any) -> None:
        model_, teacher_, batches = arguments or (model, teacher, data())
        with pytest.raises(ValueError, match=message):
            distil_(model_, teacher_, batches, steps=steps, **options)

    refused("needs a model with zeros, this Sequential has none: prune_ it", *pair()[::-1], data())
    refused("calibration needs at least one batch, got none", model, teacher, [])
    refused("needs an iterable of batches, got one Tensor: wrap it", model, teacher, data()[0])
    refused("at least 1 step and a learning rate above 0, got 0 and 0.0003", steps=0)
    refused("at least 1 step and a learning rate above 0, got 2 and nan", learning_rate=math.nan)
    refused(r"a teacher of its own, 0.weight is the teacher's too: pass a", model, model, data())
    frozen = copy.deepcopy(model).requires_grad_(False)
    refused("this Sequential has none: call model.requires_grad_", frozen, teacher, data())
    half = copy.deepcopy(model).bfloat16()
    refused(r"float32 parameters, 0.weight is torch.bfloat16, where small", half, teacher, data())
    refused(
        "cannot run the batch of step 0 .the teacher., Tensor .*: mat1",
        model,
        teacher,
        [torch.ones(2, 3)],
    )
    assert same(model, before)


def test_losses_that_cannot_be_trained_on_are_refused() -> None:
    model, teacher = pair()
    before = state(model)

    def refused(message: str, loss: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=message):
            distil_(model, teacher, data(), steps=5, loss=loss)
        assert same(model, before)

    refused(r"got shape \(16, 4\) with requires_grad=True", lambda o, t, b: o)
    refused(r"got shape \(\) with requires_grad=False", lambda o, t, b: t.sum())
    refused("finite loss, got inf at step 0: lower", lambda o, t, b: o.sum() * math.inf)
    calls = [0]

    def late(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] < 3:
            return output.square().sum()
        return (output - output.detach()).square().sum().sqrt()  # 0, its gradient NaN

    refused("needs finite gradients, got nan at step 2: lower the learning rate", late)


def test_the_report_is_plain_data_and_a_table() -> None:
    report = distil_module.DistilReport("output_loss", 1000, 3.21, 0.5, 0.25, 3e-4, 0)
    assert report.to_dict()["last_loss"] == 0.25
    lines = str(report).splitlines()
    assert lines[0].split() == "loss steps learning rate first loss last loss seconds".split()
    assert lines[2].split() == ["output_loss", "1,000", "0.0003", "0.5", "0.25", "3.2"]
