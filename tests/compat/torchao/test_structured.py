"""Structured pruners: masks while training, and what `prune` leaves of the masked model."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.compat.torchao import (
    BaseStructuredSparsifier,
    FakeStructuredSparsity,
    LSTMSaliencyPruner,
    SaliencyPruner,
)
from tests.prune.channels.models import (
    Odd,
    ResNet,
    ViT,
    Words,
    all_but,
    images,
    inner_weights,
    lively,
    llama,
    numbers,
    sequences,
)


def config(*names: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"tensor_fqn": f"{name}.weight", **settings} for name in names]


def every_layer(model: nn.Module, output: str) -> list[dict[str, Any]]:
    return [{"tensor_fqn": name} for name in all_but(model, output)]


def test_what_is_pruned_computes_what_was_masked_and_reloads_plainly() -> None:
    model = lively(ResNet())
    dense = model(images())
    modules = {name: type(module) for name, module in model.named_modules()}
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, every_layer(model, "head"), example_inputs=images())
    sparsifier.step()
    masked = model(images())
    assert not torch.allclose(dense, masked), "something is masked"
    pruned = sparsifier.prune()
    assert pruned is model
    assert {name: type(module) for name, module in model.named_modules()} == modules
    torch.testing.assert_close(pruned(images()), masked, rtol=1e-9, atol=1e-9)
    fresh = ResNet((4, 6), (5, 3)).double().eval()
    fresh.load_state_dict(pruned.state_dict())
    assert numbers(fresh) == numbers(pruned)
    torch.testing.assert_close(fresh(images()), masked, rtol=1e-9, atol=1e-9)
    assert repr(model) == repr(ResNet((4, 6), (5, 3)))


def test_without_a_config_what_a_norm_runs_over_stays_and_says_why() -> None:
    model = lively(ViT())
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    with pytest.warns(UserWarning, match="takes head.weight, too, .* outputs of the ViT: name"):
        sparsifier.prepare(model, None, images())
    named = ["block.qkv.weight", "block.fc1.weight", "head.weight"]
    assert [g["tensor_fqn"] for g in sparsifier.groups] == named
    assert (
        "layer_norm.default of block.norm1 normalises over it"
        in sparsifier.left["block.fc2.weight"]
    )


def test_the_width_of_a_language_model_and_norms_of_what_is_left() -> None:
    """The masked model with norms over the kept channels, written down here once more."""
    model, tokens = lively(Words()), torch.arange(10).view(2, 5)
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, config("down"), tokens)
    sparsifier.step()
    kept = model.down.parametrizations.weight[0].mask
    reference = copy.deepcopy(model)

    def layer_norm(x: Tensor) -> Tensor:
        norm, part = reference.norm, x[..., kept]
        part = (part - part.mean(-1, keepdim=True)) / (
            part.var(-1, keepdim=True, correction=0) + norm.eps
        ).sqrt()
        return torch.zeros_like(x).index_copy(
            -1, kept.nonzero()[:, 0], part * norm.weight[kept] + norm.bias[kept]
        )

    def rms_norm(x: Tensor) -> Tensor:
        square = x[..., kept].pow(2).mean(-1, keepdim=True)
        eps = torch.finfo(torch.float64).eps
        return x / (square + eps).sqrt() * reference.last.weight

    reference.norm.register_forward_hook(lambda m, args, out: layer_norm(args[0]))
    reference.last.register_forward_hook(lambda m, args, out: rms_norm(args[0]))
    masked = reference(tokens)
    sparsifier.prune()
    torch.testing.assert_close(model(tokens), masked, rtol=1e-9, atol=1e-9)
    fresh = Words(width=4).double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(tokens), masked, rtol=1e-9, atol=1e-9)
    assert model.head.weight is model.embed.weight, "tied weights stay tied"


def test_outputs_that_are_named_become_fewer() -> None:
    model = lively(Odd(F.relu))
    sparsifier = SaliencyPruner({"sparsity_level": 0.34})
    sparsifier.prepare(model, config("first", "second"), sequences(4))
    sparsifier.step()
    masked, keep = model(sequences(4)), model.second.parametrizations.weight[0].mask
    assert keep.sum() == 2 and not masked[..., ~keep].any()
    sparsifier.prune()
    torch.testing.assert_close(model(sequences(4)), masked[..., keep], rtol=1e-9, atol=1e-9)
    assert (model.first.out_features, model.second.out_features) == (4, 2)


def test_hidden_units_that_are_an_output_as_well_go_from_it() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden, _ = self.lstm(x)
            return self.out(hidden), hidden

    model = lively(Both())
    names = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")
    sparsifier = LSTMSaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, [{"tensor_fqn": f"lstm.{name}"} for name in names])
    sparsifier.step()
    out, hidden = model(sequences(4))
    keep = model.lstm.parametrizations.weight_hh_l1[0].mask.view(4, 6)
    assert keep.sum(1).tolist() == [3] * 4 and (keep == keep[0]).all()
    sparsifier.prune()
    now = model(sequences(4))
    torch.testing.assert_close(now, (out, hidden[..., keep[0]]), rtol=1e-9, atol=1e-9)
    assert model.lstm.hidden_size == model.out.in_features == 3


# --- biases --------------------------------------------------------------------------------------


def test_the_bias_of_a_removed_row_goes_into_the_next_layer_or_is_dropped() -> None:
    for prune_bias in (True, False):
        model = lively(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)))
        first, second = copy.deepcopy(model[0]), copy.deepcopy(model[2])
        x = sequences(4)  # three dimensions, on which the old one failed
        sparsifier = SaliencyPruner({"sparsity_level": 0.5, "prune_bias": prune_bias})
        sparsifier.prepare(model, config("0"), x)
        sparsifier.step()
        keep = model[0].parametrizations.weight[0].mask
        masked = model(x)
        sparsifier.prune()
        torch.testing.assert_close(model(x), masked)
        constant = torch.sigmoid(torch.zeros(6) if prune_bias else first.bias)[~keep].double()
        wanted = second.bias + second.weight[:, ~keep] @ constant
        torch.testing.assert_close(model[2].bias.detach(), wanted.detach())
        assert torch.equal(model[0].bias, first.bias[keep])


class Added(nn.Module):
    """What is added to the channels of the first layer is another one's for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + x[..., :1])


@pytest.mark.parametrize(
    "make, layer, settings, why",
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
            "0",
            {"prune_bias": False},
            "2 reads them, and .* pads it with zeros: with prune_bias=True they may go",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False)),
            "0",
            {},
            "2 reads them, and it has no bias to take the constant .*: leave it out of the config",
        ),
        (Added, "first", {}, "second reads them, and what it reads depends on the input"),
    ],
)
def test_channels_whose_constant_nothing_can_take_stay_as_zeros(
    make: Callable[[], nn.Module], layer: str, settings: dict[str, Any], why: str
) -> None:
    model = lively(make())
    model.get_parameter(f"{layer}.bias").data.fill_(0.5)
    batch = sequences(4) if layer == "first" else images()
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sparsifier = SaliencyPruner({"sparsity_level": 0.5, **settings})
    stays = f"channels of {layer}.weight cannot be removed and stay as zeros: {why}"
    with pytest.warns(UserWarning, match=f"prepare: masked {stays}"):
        sparsifier.prepare(model, config(layer), batch)
    sparsifier.step()
    keep = model.get_submodule(layer).parametrizations.weight[0].mask
    masked = model(batch)
    with pytest.warns(UserWarning, match=f"prune: masked {stays}"):
        assert sparsifier.prune() is model
    torch.testing.assert_close(model(batch), masked, rtol=1e-12, atol=1e-12)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == sizes
    weight = model.get_parameter(f"{layer}.weight")
    assert not weight[~keep].any() and weight[keep].any()


def test_of_a_padded_layer_only_channels_with_a_bias_stay_as_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    lively(model)
    with torch.no_grad():
        model[0].bias[:] = torch.tensor([1.0, 0, 2, 0, 3, -4, 5, 6])  # ReLU makes 0 of -4
        model[0].weight *= torch.arange(8.0)[:, None, None, None] < 6  # 6 and 7 go first
    sparsifier = SaliencyPruner({"sparsity_level": 0.5, "prune_bias": False})
    with pytest.warns(UserWarning, match="prepare: masked channels of 0.weight cannot be removed"):
        sparsifier.prepare(
            model, config("0", mask=torch.tensor([0, 0, 1, 1, 1, 0, 1, 0])), images()
        )
    masked = model(images())
    with pytest.warns(UserWarning, match="prune: masked channels of 0.weight cannot be removed"):
        sparsifier.prune()
    assert model[0].bias.tolist() == [1, 2, 0, 3, 5, 6], "1 and 5 are gone, 0 and 7 are zeros"
    assert [bool(row.any()) for row in model[0].weight] == [False, True, True, True, False, False]
    torch.testing.assert_close(model(images()), masked, rtol=1e-12, atol=1e-12)


# --- what cannot be right is an error ------------------------------------------------------------


@pytest.mark.parametrize(
    "middle, why",
    [
        (lambda x: torch.sort(x, -1)[0], "no rule for aten.sort.default of the model itself"),
        (lambda x: x.softmax(-1), "softmax.int of the model itself runs along the channels"),
        (lambda x: x - x.mean(-1, keepdim=True), "mean.dim .* runs over the channels"),
        (lambda x: x + torch.arange(6.0, dtype=x.dtype), "joins it to channels that stay"),
        (lambda x: x.flip(-1) + x[..., :1], "slice.Tensor of the model itself"),
    ],
)
def test_channels_that_an_operation_needs_are_masked_and_stay(
    middle: Callable[[Tensor], Tensor], why: str
) -> None:
    model = lively(Odd(middle))
    sizes = [parameter.shape for parameter in model.parameters()]
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    stays = f"first.weight cannot be removed and stay as zeros: .*({why}).*: leave it out"
    with pytest.warns(UserWarning, match=f"prepare: masked channels of {stays}"):
        sparsifier.prepare(model, config("first"), sequences(4))
    sparsifier.step()
    masked, keep = model(sequences(4)), model.first.parametrizations.weight[0].mask
    with pytest.warns(UserWarning, match=f"prune: masked channels of {stays}"):
        sparsifier.prune()
    assert torch.equal(model(sequences(4)), masked)
    assert [parameter.shape for parameter in model.parameters()] == sizes
    assert keep.sum() == 3 and not model.first.weight[~keep].any()
    assert not model.first.bias[~keep].any() and model.first.bias[keep].all()
    model = nn.Sequential(lively(Odd(middle)), nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"found no channels in Sequential .*: 0\.first\.weight: "):
        SaliencyPruner({"sparsity_level": 0.5}).prepare(model, None, sequences(4))


def test_beside_channels_that_stay_others_are_removed() -> None:
    """As nets end that return logarithms of probabilities; another layer is added before them."""

    class Classes(nn.Module):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, width), nn.Linear(width, 5)
            self.other = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(self.second(F.relu(self.first(x))) + self.other(x), -1)

    model = lively(Classes())
    layers = [*config("first", "second", row=0), *config("other", row=3)]
    sparsifier = Row()
    with pytest.warns(UserWarning, match="channels of second.weight and of 1 more cannot be"):
        sparsifier.prepare(model, layers, sequences(4))
    sparsifier.step()
    masked = model(sequences(4))
    state = sparsifier.state_dict()["state"]
    assert [int((~values["mask"]).nonzero()) for values in state.values()] == [0, 0, 3]
    with pytest.warns(UserWarning, match="prune: masked channels of second.weight and of 1 more"):
        sparsifier.prune()
    torch.testing.assert_close(model(sequences(4)), masked, rtol=1e-9, atol=1e-9)
    fresh = Classes(5).double()
    fresh.load_state_dict(model.state_dict())
    assert not model.second.weight[0].any() and not model.other.weight[3].any()
    assert model.second.weight[3].all() and model.other.weight[0].all()


def test_a_size_written_into_the_forward_is_an_error_that_changes_nothing() -> None:
    model = lively(Odd(lambda x: F.relu(x.view(3, 5, 6)).view(3, 5, 2, 3).flatten(2)))
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, config("first"), sequences(4))
    sparsifier.step()
    masked, names = model(sequences(4)), list(model.state_dict())
    with pytest.raises(ValueError, match="the pruned Odd does not run"):
        sparsifier.prune()
    assert list(model.state_dict()) == names
    assert torch.equal(model(sequences(4)), masked)
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model(sequences(4)), masked)


def test_other_names_are_refused() -> None:
    model = lively(Odd(F.relu))
    with pytest.raises(ValueError, match="closest are 'first.weight'"):
        SaliencyPruner({"sparsity_level": 0.5}).prepare(model, config("firts"), sequences(4))


# --- the sparsifier ------------------------------------------------------------------------------


class Row(BaseStructuredSparsifier):
    """What users write: drops one row."""

    def update_mask(self, module: nn.Module, tensor_name: str, row: int) -> None:
        getattr(module.parametrizations, tensor_name)[0].mask[row] = False


def test_a_pruner_of_ones_own_drops_a_row_without_example_inputs() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    sparsifier = Row({"row": 1})
    sparsifier.prepare(model, config("0"))
    assert isinstance(model[0].parametrizations.weight[0], FakeStructuredSparsity)
    sparsifier.step()
    assert not model[0].bias[1]
    assert sparsifier.prune() is model
    assert model[0].weight.shape == (5, 4)
    assert model[2].in_features == 5


def test_a_mask_that_is_written_by_hand_is_pruned_with_all_that_goes_with_it() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)))
    before = copy.deepcopy(model)
    sparsifier = Row()
    sparsifier.prepare(model, config("0"), sequences(4))
    model[0].parametrizations.weight[0].mask[1] = False
    sparsifier.prune()
    with torch.no_grad():
        before[0].weight[1], before[0].bias[1] = 0, 0
    assert model[0].out_features == 5
    torch.testing.assert_close(model(sequences(4)), before(sequences(4)))


def test_half_a_unit_is_an_error_and_the_masks_are_as_they_were() -> None:
    model = lively(ResNet())
    sparsifier = Row()
    layers = [*config("stem", row=0), *config("a.conv2", row=1)]
    sparsifier.prepare(model, layers, images())
    before = model(images())
    with pytest.raises(ValueError, match="drops a channel that goes together with one that"):
        sparsifier.step()
    assert torch.equal(model(images()), before)


def test_masks_are_chosen_anew_and_come_back_when_the_level_falls() -> None:
    model = lively(Odd(F.relu))
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, config("first"), sequences(4))
    for level, dropped in ((0.5, 3), (0.84, 5), (0.0, 0)):
        sparsifier.groups[0]["sparsity_level"] = level
        sparsifier.step()
        assert int((~model.first.parametrizations.weight[0].mask).sum()) == dropped
    with pytest.raises(ValueError, match="a sparsity that leaves a channel, 6 of its 6"):
        sparsifier.groups[0]["sparsity_level"] = 1.0
        sparsifier.step()


def test_gradients_of_what_is_masked_are_zero_and_training_goes_on_after_prune() -> None:
    model = lively(Odd(F.relu)).train()
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, config("first"), sequences(4))
    assert model.training
    sparsifier.step()
    keep = model.first.parametrizations.weight[0].mask
    model(sequences(4)).square().sum().backward()
    gradient = model.first.parametrizations.weight.original.grad
    assert not gradient[~keep].any()
    assert gradient[keep].any()
    sparsifier.prune()
    assert model.first.weight.grad is None
    model(sequences(4)).square().sum().backward()
    assert model.first.weight.grad.shape == (3, 4)


def test_state_goes_to_another_sparsifier_and_through_pickle() -> None:
    sparsifiers = []
    for _ in range(2):
        model = lively(Odd(F.relu))
        sparsifiers.append(SaliencyPruner({"sparsity_level": 0.5}))
        sparsifiers[-1].prepare(model, config("first"), sequences(4))
    source, target = sparsifiers
    source.step()
    state = pickle.loads(pickle.dumps(source)).state_dict()
    assert torch.equal(
        state["state"]["first.weight"]["mask"], source.state_dict()["state"]["first.weight"]["mask"]
    )
    target.load_state_dict(state)
    assert torch.equal(target.model(sequences(4)), source.model(sequences(4)))
    state["state"]["first.weight"]["mask"] = torch.zeros(6)
    with pytest.raises(ValueError, match="needs a channel, all of its 6"):
        target.load_state_dict(state)
    target.prune()
    assert target.model.first.out_features == 3


def test_a_copy_is_pruned_by_itself() -> None:
    model = lively(Odd(F.relu))
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, config("first"), sequences(4))
    sparsifier.step()
    other, copied = copy.deepcopy((model, sparsifier))
    copied.prune()
    assert other.first.out_features == 3
    assert model.first.parametrizations.weight.original.shape == (6, 4)


def test_squash_keeps_the_shapes_and_the_order_of_parameters() -> None:
    model = lively(ResNet())
    names = list(model.state_dict())
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, every_layer(model, "head"), images())
    sparsifier.step()
    masked = model(images())
    sparsifier.squash_mask(params_to_keep=["sparsity_level"])
    assert list(model.state_dict()) == names
    assert torch.equal(model(images()), masked)
    assert model.stem.sparse_params == {"sparsity_level": 0.5}
    with pytest.raises(ValueError, match="prune needs masks"):
        sparsifier.prune()


def test_an_initial_mask_applies_at_once() -> None:
    model = lively(Odd(F.relu))
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    sparsifier = Row()
    sparsifier.prepare(model, config("first", mask=mask), sequences(4))
    assert not model.first.weight[1].any()
    assert not model.first.bias[4]
    sparsifier.prune()
    assert model.first.out_features == 4


# --- other models --------------------------------------------------------------------------------


def test_a_language_model_of_transformers_reloads_by_its_configuration() -> None:
    model, batch = lively(llama()), {"input_ids": torch.arange(10).view(2, 5)}
    sparsifier = SaliencyPruner({"sparsity_level": 0.5})
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in inner_weights(model)], batch)
    sparsifier.step()
    masked = model(**batch).logits
    sparsifier.prune()
    fresh = llama(2, 1, 12).double().eval()
    fresh.load_state_dict(model.state_dict())
    for pruned in (model, fresh):
        torch.testing.assert_close(pruned(**batch).logits, masked, rtol=1e-9, atol=1e-9)
