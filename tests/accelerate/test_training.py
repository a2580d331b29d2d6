"""Training layers: what is measured, which layers change and from how many tokens, and back."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.accelerate import accelerate_training_
from secateur.accelerate import training as module
from secateur.formats import training
from secateur.formats.kernels.timing import Calls, Timing
from secateur.formats.training import TrainingLinear
from secateur.patterns import NM
from secateur.train import hold, learn_masks_
from secateur.train.straight_through import StraightThrough

DENSE_US = 100.0


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    return model.bfloat16()


def sparse() -> nn.Sequential:
    model = small()
    for layer in (model[0], model[2]):
        weight = layer.weight.data
        weight.mul_(NM(2, 4).mask(weight.abs()))
    return model


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU whose packed steps take 50, 80, 99 us and so on where dense ones take 100."""
    monkeypatch.setattr(training, "why_not", lambda *_: None)
    packed: list[int] = []

    def timer(calls: Mapping[str, Calls], device: torch.device) -> Mapping[str, Timing]:
        for steps in calls.values():
            steps[0]()
        times = {"dense": DENSE_US, "2:4": float(packed.pop(0))}
        return {name: Timing(times[name], times[name], times[name], 1) for name in calls}

    monkeypatch.setattr(module, "compare", timer)
    return packed


def test_without_kernels_everything_stays_dense() -> None:
    model = sparse()
    found = accelerate_training_(model)
    assert [row.least_tokens for row in found.layers] == [None, None]
    assert all("needs a CUDA GPU" in row.reason for row in found.layers)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    ("packed", "least"),
    [
        ([120, 80, 50], 32),
        ([80, 120, 50], 64),
        ([50, 50, 96], None),
        ([95, 95, 95], 8),
    ],
)
def test_layers_change_from_where_all_more_tokens_gain(
    on_kernels: list[int], packed: list[int], least: int | None
) -> None:
    on_kernels += packed * 2
    model = sparse()
    parameters = dict(model.named_parameters())
    with accelerate_training_(model, tokens=(64, 8, 32)) as found:
        assert [row.least_tokens for row in found.layers] == [least, least]
        assert dict(found.layers[0].microseconds) == {
            count: (DENSE_US, us) for count, us in zip((8, 32, 64), packed, strict=True)
        }
        wanted = nn.Linear if least is None else TrainingLinear
        assert type(model[0]) is wanted and type(model[2]) is wanted
        assert all(now is parameters[name] for name, now in model.named_parameters())
        assert list(model.state_dict()) == list(parameters)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(now is parameters[name] for name, now in model.named_parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_alike_layers_are_measured_once(on_kernels: list[int]) -> None:
    on_kernels += [50]
    model = nn.Sequential(sparse()[0], sparse()[0], sparse()[0])
    found = accelerate_training_(model, tokens=(16,), layers=["0", "2"])
    assert [row.layer for row in found.layers] == ["0", "2"]
    assert [type(layer) for layer in model] == [TrainingLinear, nn.Linear, TrainingLinear]


def test_what_cannot_change_says_why(on_kernels: list[int]) -> None:
    model = small()
    model[2].requires_grad_(False)
    found = accelerate_training_(model)
    first, last = (row.reason for row in found.layers)
    assert "training in 2:4 needs at most 2 nonzeros in every 4" in first
    assert "its weight is frozen" in last
    with pytest.raises(ValueError, match="no layer is named 'body'"):
        accelerate_training_(model, layers=["body"])
    with pytest.raises(ValueError, match="numbers of tokens from 1 upwards"):
        accelerate_training_(model, tokens=(0,))


def test_a_wrong_kernel_is_not_used(on_kernels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.linear

    def wrong(x: Tensor, *rest: object) -> Tensor:
        return right(x, *rest) + 0.1  # type: ignore[arg-type]

    monkeypatch.setattr(training, "linear", wrong)
    found = accelerate_training_(sparse())
    assert all(row.least_tokens is None and "wrong by" in row.reason for row in found.layers)


def test_few_tokens_and_calls_without_gradients_run_dense(
    on_kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_kernels += [50, 50]
    model, plain, packed = sparse(), sparse(), list[int]()
    accelerate_training_(model, tokens=(16,))
    right = training.linear

    def counted(x: Tensor, *rest: object) -> Tensor:
        packed.append(len(x))
        return right(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "linear", counted)
    x = torch.randn(16, 64).bfloat16()
    grads = []
    for given in (x, x[:15]):
        both = [given.clone().requires_grad_() for _ in range(2)]
        results = [run(one) for run, one in zip((model, plain), both, strict=True)]
        assert torch.equal(*results)  # on a CPU units are multiplied as a dense weight
        for result in results:
            result.sum().backward()
        grads.append([one.grad for one in both])
    assert packed == [16, 16]  # two layers
    assert not torch.equal(*grads[0])  # pruned once more along columns
    assert torch.equal(*grads[1])
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert packed == [16, 16]


@pytest.mark.parametrize("learns", [False, True])
def test_training_keeps_zeros_and_trains(on_kernels: list[int], learns: bool) -> None:
    on_kernels += [50, 50]
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    plan = sc.plan(model, "2:4", ignore=())
    held = (
        learn_masks_(model, plan, optimizer, StraightThrough(decay=1e-3))
        if learns
        else hold(model, optimizer)
    )
    x, target = torch.randn(2, 32, 64).bfloat16()
    losses = []
    with held, accelerate_training_(model, tokens=(32,)) as found:
        assert all(row.least_tokens == 32 for row in found.layers)
        for _ in range(20):
            loss = (model(x) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for layer in (model[0], model[2]):
        groups = layer.weight.detach().unflatten(1, (-1, 4))
        assert int((groups != 0).sum(2).max()) <= 2
