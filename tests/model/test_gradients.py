"""Gradients: compared with autograd row by row, and the model is left as it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.criteria import fisher, snip, taylor, wanda_regional
from secateur.model import layers as _layers
from secateur.model.gradients import gradients, model_loss
from secateur.model.statistics import GRADIENTS
from tests.models import Decoder


def squares(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def decoder() -> tuple[nn.Module, dict[str, nn.Module], list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 20, (rows, 7), generator=generator) for rows in (3, 1, 4)]
    return model, dict(_layers.select(model).layers), batches


def each_row(model: nn.Module, batches: list[Tensor], layer: nn.Module) -> Tensor:
    """The gradient of each row's next-token loss, [rows, out, in], in plain autograd."""
    model.eval()
    found = []
    for row in torch.cat(batches):
        logits = model(row[None])[0, :-1]
        loss = F.cross_entropy(logits, row[1:])
        found.append(torch.autograd.grad(loss, layer.weight)[0])
    return torch.stack(found)


def test_means_of_gradients_and_of_their_squares_over_single_rows() -> None:
    model, layers, batches = decoder()
    found = gradients(model, layers, batches, ["squared_gradient", "gradient", "gram"])
    alone = gradients(model, layers, batches, ["gradient"])
    for name, layer in layers.items():
        assert found[name].keys() == {"gradient", "squared_gradient"}
        rows = each_row(model, batches, layer)
        assert rows.abs().sum() > 0
        torch.testing.assert_close(found[name]["gradient"], rows.mean(0))
        torch.testing.assert_close(alone[name]["gradient"], rows.mean(0))
        torch.testing.assert_close(found[name]["squared_gradient"], rows.square().mean(0))


def test_regional_gradients_are_those_of_a_blocks_own_output_norm() -> None:
    model, layers, batches = decoder()
    found = gradients(model, layers, batches, ["regional_gradient"])
    model.eval()
    for index, block in enumerate(model.blocks):
        sums = {name: 0.0 for name in layers if name.startswith(f"blocks.{index}.")}
        for row in torch.cat(batches):
            x = model.embed(row[None])
            mask = torch.ones(7, 7, dtype=torch.bool).tril()
            for earlier in model.blocks[:index]:
                x = earlier(x, mask=mask)[0]
            norm = block(x.detach(), mask=mask)[0].norm()
            for name in sums:
                sums[name] += torch.autograd.grad(norm, layers[name].weight, retain_graph=True)[
                    0
                ].square()
        for name, total in sums.items():
            torch.testing.assert_close(found[name]["regional_gradient"], (total / 8).sqrt())


def test_padding_is_in_no_regional_gradient() -> None:
    torch.manual_seed(0)
    model = Decoder(blocks=2)
    layers = {"blocks.0.up_proj": model.blocks[0].up_proj}
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def found(batches: Any) -> Tensor:
        (of_layer,) = gradients(model, layers, batches, ["regional_gradient"]).values()
        return of_layer["regional_gradient"]

    expected = found([ids[:1, :3], ids[1:]])
    padded = found([{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(padded, expected)
    assert not torch.allclose(found([ids]), expected)


def test_a_layer_outside_blocks_is_a_region_of_its_own() -> None:
    layer = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = gradients(model, {"0": layer}, [x], ["regional_gradient"])["0"]["regional_gradient"]
    y = x @ layer.weight.detach().T
    expected = (y / y.norm(dim=1, keepdim=True))[:, :, None] * x[:, None, :]
    torch.testing.assert_close(found, expected.square().mean(0).sqrt())


def test_a_convolutions_gradient_has_its_matrixs_columns() -> None:
    layer = nn.Conv2d(4, 3, 2)
    model = nn.Sequential(layer, nn.Flatten())
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    found = gradients(model, {"0": layer}, [x], ["gradient"], squares)["0"]["gradient"]
    assert not found.requires_grad
    squares(model(x), x).backward()
    torch.testing.assert_close(found, _layers.matrix(layer, layer.weight.grad))


@pytest.mark.parametrize("names", [["gradient"], ["squared_gradient"], ["regional_gradient"]])
def test_the_model_is_left_as_it_was(names: list[str]) -> None:
    model, layers, batches = decoder()
    model.train()
    frozen, other = layers["blocks.0.up_proj"].weight, layers["blocks.1.up_proj"].weight
    frozen.requires_grad_(False)
    other.grad = torch.full_like(other, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def spoilt(output: Tensor, batch: Any) -> Tensor:
        raise ArithmeticError

    for loss in (None, spoilt):
        try:
            found = gradients(model, layers, batches, names, loss)
            assert found["blocks.0.up_proj"][names[0]].any()
        except ArithmeticError:
            assert loss is spoilt
        assert model.training and all(m.training for m in model.modules())
        assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
        assert torch.equal(other.grad, torch.full_like(other, 3.0)) and frozen.grad is None
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_of_bfloat16_weights_are_summed_in_float32() -> None:
    """Summed in bfloat16, 600 equal rows would stall at 256 times the first."""
    layer = nn.Linear(2, 1, bias=False).bfloat16()
    x = torch.ones(600, 2, dtype=torch.bfloat16)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.mean()

    names = ["gradient", "squared_gradient"]
    found = gradients(nn.Sequential(layer), {"0": layer}, [x], names, loss)["0"]
    for name in names:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], torch.ones(1, 2))


def test_an_expert_that_no_row_reaches_has_no_gradient() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    model = Routed()
    layers = {"one": model.one, "other": model.other}
    found = gradients(model, layers, [torch.ones(2, 4)], list(GRADIENTS), squares)
    assert found["one"]["squared_gradient"].any()
    assert not any(value.any() for value in found["other"].values())


# --- batches and losses --------------------------------------------------------------------------


def test_labels_give_the_models_own_loss() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor, labels: Tensor, scale: float) -> SimpleNamespace:
            logits = scale * self.layer(x)
            return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))

    model = Labelled()
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(5, 4, generator=generator), "labels": torch.arange(5) % 3}
    found = gradients(
        model, {"layer": model.layer}, [{**batch, "scale": 2.0}], ["squared_gradient"]
    )["layer"]["squared_gradient"]
    expected = torch.zeros(3, 4)
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        p = (2 * x @ model.layer.weight.detach().T).softmax(-1) - F.one_hot(label, 3)
        expected += (2 * p[:, None] * x).square() / 5
    torch.testing.assert_close(found, expected)


def test_padding_is_not_predicted() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = model_loss(logits, {"input_ids": ids, "attention_mask": mask})
    p = logits.log_softmax(-1)
    expected = -(p[0, 0, 2] + p[0, 1, 3] + p[0, 2, 4] + p[1, 0, 3]) / 4
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, model_loss(logits, {"input_ids": ids}))
    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # the padding before it predicts no token
    found = model_loss(logits, {"input_ids": ids, "attention_mask": left})
    expected = -(p[0, 0, 2] + p[0, 1, 3] + p[0, 2, 4] + p[1, 2, 0]) / 4
    torch.testing.assert_close(found, expected)


def test_a_pair_of_inputs_and_labels_gives_the_cross_entropy_of_a_model_of_one_argument() -> None:
    """As an image DataLoader gives them; the labels never reach the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    rows, labels = torch.randn(5, 2, 2), torch.tensor([0, 2, 1, 1, 0])
    loss = F.cross_entropy(model(rows), labels)
    (expected,) = torch.autograd.grad(loss, [model[1].weight])
    found = gradients(model, {"1": model[1]}, [(rows, labels)], ["gradient"])["1"]["gradient"]
    torch.testing.assert_close(found, expected)
    squared = gradients(model, {"1": model[1]}, [[rows, labels]], ["squared_gradient"])
    singles = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), [model[1].weight])[0]
        for x, y in zip(rows, labels, strict=True)
    ]
    torch.testing.assert_close(
        squared["1"]["squared_gradient"], torch.stack(singles).square().mean(0)
    )
    report = sc.prune_(model, "2:4", snip, [(rows, labels)])
    assert report.layers[0].sparsity == 0.5


def test_a_tensor_with_one_row_for_all_goes_to_every_row() -> None:
    layer = nn.Linear(3, 3, bias=False)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.layer(x + shift)

    x, shift = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3)
    one = gradients(Shifted(), {"layer": layer}, [(x, shift)], ["squared_gradient"], squares)
    other = gradients(
        Shifted(), {"layer": layer}, [(x, shift.expand(4, 3))], ["squared_gradient"], squares
    )
    torch.testing.assert_close(one["layer"]["squared_gradient"], other["layer"]["squared_gradient"])


@pytest.mark.parametrize(
    ("batches", "loss", "said"),
    [
        ([], squares, "at least one batch"),
        (torch.ones(2, 4), squares, "an iterable of batches, got one Tensor"),
        ([(torch.ones(2, 4), torch.ones(3, 4))], squares, r"batch 0 has \[2, 3\]: give batches of"),
        ([torch.ones(2, 4)], None, "gradients need a loss, and Tensor has none: give the batches"),
        ([torch.ones(2, 4)], lambda y, batch: y, r"one number made .* got \(2, 4\) for batch 0"),
        ([torch.ones(2, 4)], lambda y, batch: y.sum() * torch.inf, "a finite loss, got -?inf"),
        (
            [torch.ones(2, 4)],
            lambda y, batch: (y - y).sum().sqrt(),
            "gradient of layer 0 hol",
        ),
        ([torch.ones(2, 5)], squares, "Sequential cannot run batch 0"),
    ],
)
def test_what_gives_no_gradient_says_why(batches: Any, loss: Any, said: str) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=said):
        gradients(nn.Sequential(layer), {"0": layer}, batches, ["gradient"], loss)


# --- through the verbs ---------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [snip, taylor, fisher, wanda_regional])
def test_pruning_scores_by_the_gradients_of_the_dense_model(criterion) -> None:  # type: ignore[no-untyped-def]
    model, layers, batches = decoder()
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    asked = ["gradient", "squared_gradient", "regional_gradient"]
    found = gradients(model, layers, batches, asked)
    sc.prune_(model, "2:4", criterion, iter(batches))
    for name, layer in layers.items():
        if criterion is wanda_regional:
            continue  # its norms come from pruned inputs
        statistic = found[name]["squared_gradient" if criterion is fisher else "gradient"]
        mask = sc.NM(2, 4).mask(criterion(dense[name], statistic))
        assert torch.equal(layer.weight.detach(), dense[name].masked_fill(~mask, 0))
    sc.check(model, "2:4")


def test_an_interrupted_run_goes_on_with_gradients_of_the_dense_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    whole, _, batches = decoder()
    sc.prune_(whole, "2:4", fisher, batches)
    model, _, _ = decoder()
    count = 0

    def interrupted(weight: Tensor, squared_gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return fisher(weight, squared_gradient)

    with pytest.raises(KeyboardInterrupt):
        sc.prune_(model, "2:4", interrupted, batches, checkpoint=tmp_path / "run")
    sc.prune_(model, "2:4", interrupted, batches, checkpoint=tmp_path / "run")
    assert 5 < count < 2 * len(sc.plan(model, "2:4").layers)
    assert all(map(torch.equal, whole.parameters(), model.parameters()))


def test_a_refit_takes_a_mask_by_gradients_and_a_loss_of_the_users() -> None:
    calls = 0

    def loss(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return output.square().mean()

    model, _, batches = decoder()
    report = sc.reconstruct_(model, "2:4", sc.refit(snip), batches, loss=loss)
    assert report.method == "refit(snip)" and calls == len(batches)
    sc.check(model, "2:4")


def test_a_sensitivity_by_gradients() -> None:
    model, layers, batches = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def nll(model: nn.Module) -> float:
        return sc.evaluate.perplexity(model, batches).nll

    found = sc.sensitivity(model, ["2:4"], nll, criterion=fisher, batches=iter(batches))
    assert found.increase.keys() == layers.keys()
    name = "blocks.1.down_proj"
    sc.prune_(model, sc.plan(model, "2:4", layers=[name]), fisher, batches)
    assert found.increase[name]["2:4"] == pytest.approx(nll(model) - found.loss, abs=1e-6)
    model.load_state_dict(before)
