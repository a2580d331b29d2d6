"""Preparing, stepping, squashing, copying, saving: what every sparsifier does."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from secateur.compat.torchao import (
    BaseSparsifier,
    FakeSparsity,
    LSTMSaliencyPruner,
    SaliencyPruner,
    WeightNormSparsifier,
)
from tests.models import Decoder


class FirstRow(BaseSparsifier):
    """What users write: masks the first row in place, counts its steps, takes any settings."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(defaults=settings)
        self.seen: list[dict[str, Any]] = []

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        getattr(module.parametrizations, tensor_name)[0].mask[0] = 0
        state = self.state[kwargs["tensor_fqn"]]
        state["step_count"] = state.get("step_count", 0) + 1
        self.seen.append(kwargs)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def mask(model: nn.Module, layer: str = "0") -> torch.Tensor:
    return model.get_submodule(layer).parametrizations.weight[0].mask


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in now)


# --- prepare -------------------------------------------------------------------------------------


def test_the_seeds_call() -> None:
    """The README of torchao.sparsity: prepare, step, squash_mask; then plain 2:4 weights."""
    model = mlp().half()
    config = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            config.append({"tensor_fqn": f"{name}.weight"})
    keys, dense = list(model.state_dict()), copied(model)
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(model, config)
    sparsifier.step()
    sparsifier.squash_mask()
    assert list(model.state_dict()) == keys
    after = list(model.named_parameters())
    assert [(n, id(p)) for n, p in after] == parameters, "what an optimizer has, in its order"
    for layer in ("0", "2"):
        weight = model.get_submodule(layer).weight
        assert weight.dtype == torch.float16
        groups, before = (
            weight.unflatten(1, (-1, 4)),
            dense[f"{layer}.weight"].unflatten(1, (-1, 4)),
        )
        assert (groups.count_nonzero(-1) == 2).all()
        assert torch.equal(groups.abs().sum(-1), before.abs().topk(2).values.sum(-1))


def test_settings_come_from_the_config_then_the_defaults() -> None:
    model = mlp()
    sparsifier = FirstRow(test=3, other="x")
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": ".2.weight", "test": 4}])
    sparsifier.step()
    first, second = sparsifier.seen
    assert first == {"test": 3, "other": "x", "tensor_fqn": "0.weight", "module_fqn": "0"}
    assert second == {"test": 4, "other": "x", "tensor_fqn": "2.weight", "module_fqn": "2"}
    assert sparsifier.groups[1]["module"] is model[2]
    assert "2.weight: test=4, other='x'" in repr(sparsifier)


def test_a_tensor_of_the_model_itself_has_the_module_of_no_name() -> None:
    layer = nn.Linear(4, 4)
    sparsifier = FirstRow()
    sparsifier.prepare(layer, [{"tensor_fqn": "weight", "module_fqn": "", "tensor_name": "weight"}])
    sparsifier.step()
    assert int((layer.weight == 0).sum()) == 4
    assert sparsifier.groups[0]["module_fqn"] == ""


def test_without_a_config_every_linear_layer_is_prepared() -> None:
    class Own(nn.Linear):
        """A subclass, which torchao did not find."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.attention = Own(4, 4), nn.MultiheadAttention(4, 1)
            self.embed, self.lm_head = nn.Embedding(4, 4), nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.embed.weight
            self.again = self.own

    sparsifier = FirstRow()
    sparsifier.prepare(Mixed(), None)
    assert [g["tensor_fqn"] for g in sparsifier.groups] == ["own.weight", "lm_head.weight"]


def test_an_initial_mask_applies_at_once_in_the_weights_dtype() -> None:
    model = mlp().bfloat16()
    given = torch.eye(8, dtype=torch.bool)
    FirstRow().prepare(model, [{"tensor_fqn": "0.weight", "mask": given}])
    assert torch.equal(model[0].weight != 0, given)
    assert mask(model).dtype == torch.bfloat16
    mask(model).zero_()
    assert given.any(), "the user's tensor is copied"


def test_a_parametrization_of_ones_own_is_used() -> None:
    class Halves(nn.Module):
        def __init__(self, mask: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.mask) / 2

    model, before = mlp(), mlp()
    sparsifier = FirstRow(parametrization=Halves)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(model[0].weight[0], before[0].weight[0] / 2)
    assert torch.equal(model[0].weight[1:], before[0].weight[1:])
    assert "parametrization" not in sparsifier.state_dict()["groups"][0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"tensor_fqn": "seq.0.weight"}], r"no 'seq.0.weight': closest are '0.weight'"),
        ([{"tensor_fqn": "0.wieght"}], r"no '0.wieght': closest are '0.weight'"),
        ([{"tensor_fqn": "1.weight"}], r"Sequential has no '1.weight'"),
        (["0.weight"], r"list of dicts, got \[.*'0.weight'\]"),
        ({"0.weight": {}}, "list of dicts, got {'0.weight': {}}"),
        ("0.weight", "list of dicts, got '0.weight'"),
        ([], "found none in Sequential"),
        ([{"module": "0"}], r"dicts with 'tensor_fqn', got {'module': '0'}"),
        ([{"tensor_fqn": "0.weight", "module_fqn": "2"}], "has the module_fqn '0' and not '2'"),
        ([{"tensor_fqn": "0.weight"}, {"tensor_fqn": ".0.weight"}], "0.weight is named twice"),
        ([{"tensor_fqn": "0.weight", "mask": torch.ones(8)}], r"shape \(8, 8\), got \(8,\)"),
        ([{"tensor_fqn": "0.weight", "mask": torch.full((8, 8), 0.5)}], "0 or 1, got 0.5"),
        ([{"tensor_fqn": "0.weight", "parametrization": lambda mask: nn.ReLU()}], "ReLU of 0.we"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_config_that_cannot_be_is_an_error_and_changes_nothing(config: Any, message: str) -> None:
    model = mlp()
    before = copied(model)
    sparsifier = FirstRow()
    valid = [{"tensor_fqn": "2.weight"}] if isinstance(config, list) and config else []
    with pytest.raises(ValueError, match=message):
        sparsifier.prepare(model, [*valid, *config] if valid else config)
    assert same(model, before) and not parametrize.is_parametrized(model[2])
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])


def test_tied_and_computed_weights_are_an_error() -> None:
    model = Decoder()
    model.lm_head.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"lm_head.weight cannot be prepared: .* embed.weight"):
        FirstRow().prepare(model, [{"tensor_fqn": "lm_head.weight"}])
    layer = parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight is computed by a parametrization: remove it"):
        FirstRow().prepare(layer, [{"tensor_fqn": "weight"}])


def test_preparing_twice_is_an_error_until_squashed() -> None:
    model = mlp()
    sparsifier = FirstRow()
    sparsifier.prepare(model)
    with pytest.raises(ValueError, match="holds masks of 2 tensors: squash_mask them first"):
        sparsifier.prepare(model)
    with pytest.raises(ValueError, match=r"0.weight has a mask of another sparsifier"):
        FirstRow().prepare(model, [{"tensor_fqn": "0.weight"}])
    with pytest.raises(ValueError, match="found none in Sequential"):
        FirstRow().prepare(model)
    assert len(sparsifier.groups) == 2
    assert len(model[0].parametrizations.weight) == 1
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    assert len(sparsifier.groups) == 1
    assert list(sparsifier.state) == ["0.weight"] and sparsifier.step_count == 0
    assert sparsifier.state["0.weight"]["mask"].all()
    sparsifier.step()


def test_a_class_without_update_mask_is_an_error() -> None:
    class Nothing(BaseSparsifier):
        pass

    with pytest.raises(TypeError, match="Nothing needs a method update_mask"):
        Nothing()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "settings", [0.5, 0, "linear", [("test", 1)], nn.Sequential(nn.Linear(2, 2))]
)
@pytest.mark.parametrize("kind", [SaliencyPruner, LSTMSaliencyPruner, BaseSparsifier])
def test_settings_that_are_no_dict_are_an_error_that_shows_one(kind: type, settings: Any) -> None:
    class Own(kind):
        def update_mask(self, module: nn.Module, tensor_name: str) -> None: ...

    with pytest.raises(
        ValueError, match=r"Own needs a dict of settings, got the .*: write Own\(\{'"
    ) as e:
        Own(settings)
    assert "\n" not in str(e.value) and type(settings).__name__ in str(e.value)
    Own(None)


@pytest.mark.usefixtures("unchecked")
def test_what_a_config_may_be_is_said() -> None:
    for config in (3, nn.Linear(2, 2), "0.weight", {"tensor_fqn": "0.weight"}, [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match="prepare needs a config that is a list of dicts, got"):
            FirstRow().prepare(mlp(), config)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_or_no_mask_is_said() -> None:
    for kind in (FirstRow, lambda: SaliencyPruner({"sparsity_level": 0.5})):
        for model in (None, nn.Linear, "model"):
            with pytest.raises(ValueError, match="prepare needs a model, an nn.Module, got"):
                kind().prepare(model, [{"tensor_fqn": "0.weight"}])
        for given in ("x", 3, [1, 0]):
            model = mlp()
            with pytest.raises(ValueError, match="the mask of 0.weight needs to be a tensor, got"):
                kind().prepare(model, [{"tensor_fqn": "0.weight", "mask": given}])
            assert not parametrize.is_parametrized(model[0])


def test_a_preparation_that_fails_leaves_nothing() -> None:
    class Fails(FirstRow):
        def _prepare(self, *args: Any) -> None:
            super()._prepare()
            raise RuntimeError("no")

    model, sparsifier = mlp(), Fails()
    before = copied(model)
    with pytest.raises(RuntimeError, match="no"):
        sparsifier.prepare(model)
    assert list(before) == list(model.state_dict())
    assert not sparsifier.groups and not sparsifier.state and sparsifier.model is None


# --- step ----------------------------------------------------------------------------------------


def test_step_without_masks_is_an_error() -> None:
    sparsifier = FirstRow()
    with pytest.raises(ValueError, match="step needs a prepared model, this FirstRow has none"):
        sparsifier.step()
    sparsifier.prepare(mlp())
    sparsifier.squash_mask()
    for verb in (sparsifier.step, sparsifier.squash_mask):
        with pytest.raises(ValueError, match=r"0.weight has none since squash_mask"):
            verb()


def test_step_does_nothing_while_updates_are_disabled() -> None:
    model = mlp()
    sparsifier = FirstRow()
    sparsifier.prepare(model)
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert mask(model).all()
    sparsifier.enable_mask_update = True
    sparsifier.step(use_path=False)
    assert not mask(model)[0].any()


def test_a_step_that_raises_has_changed_no_mask() -> None:
    class Fails(BaseSparsifier):
        def update_mask(self, module: nn.Module, tensor_name: str, how: str) -> None:
            chain = module.parametrizations[tensor_name]
            if how == "in place":
                chain[0].mask[0] = 0
            elif how == "data":
                chain[0].mask.data = torch.zeros(8, 8)
            elif how == "object":
                chain[0].mask = torch.zeros(8, 8)
            elif how == "soft":
                chain[0].mask[1] = 0.5

    for how in ("in place", "data", "object"):
        model = mlp()
        sparsifier = Fails()
        config = [{"tensor_fqn": "0.weight", "how": how}, {"tensor_fqn": "2.weight", "how": "soft"}]
        sparsifier.prepare(model, config)
        object_before = mask(model)
        with pytest.raises(ValueError, match=r"mask of 2.weight needs values of 0 or 1, got 0.5"):
            sparsifier.step()
        assert mask(model).all() and mask(model, "2").all()
        assert mask(model) is object_before


def test_update_mask_gets_only_the_settings_that_it_names() -> None:
    class Named(BaseSparsifier):
        def update_mask(self, module: nn.Module, tensor_name: str, rows: int) -> None:
            module.parametrizations[tensor_name][0].mask[:rows] = 0

    model = mlp()
    sparsifier = Named({"rows": 3, "unused": 1})
    sparsifier.prepare(model)
    sparsifier.step()
    assert mask(model).sum() == 40


# --- squash --------------------------------------------------------------------------------------


def test_squashing_leaves_plain_parameters_as_they_were() -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    before = dict(model.named_parameters())
    sparsifier = FirstRow()
    sparsifier.prepare(model)
    sparsifier.step()
    sparsifier.squash_mask()
    assert dict(model.named_parameters()) == before
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad and not model[2].weight.requires_grad
    assert not model[0].weight[0].any() and model[0].weight[1:].all()
    assert "sparse_params" not in vars(model[0])


def test_settings_are_kept_everywhere_or_by_layer() -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier(0.3, (1, 4))
    sparsifier.prepare(model)
    sparsifier.squash_mask(("sparsity_level",), {"2": ("sparse_block_shape", "zeros_per_block")})
    assert model[0].sparse_params == {"sparsity_level": 0.3}
    assert model[2].sparse_params == {
        "sparsity_level": 0.3,
        "sparse_block_shape": (1, 4),
        "zeros_per_block": 4,
    }


@pytest.mark.parametrize(
    ("keep", "per_layer", "message"),
    [
        (("sparsity_levle",), None, "not 'sparsity_levle': closest are 'sparsity_level'"),
        (None, {"2": ("nothing",)}, "what 2.weight has, which is not 'nothing'"),
        (None, {"linear2": ("norm",)}, "'linear2' was not: closest are"),
    ],
)
def test_an_unknown_setting_changes_nothing(keep: Any, per_layer: Any, message: str) -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    with pytest.raises(ValueError, match=message):
        sparsifier.squash_mask(keep, per_layer)
    assert type(model[0].parametrizations.weight[0]) is FakeSparsity
    assert "sparse_params" not in vars(model[0])
    sparsifier.squash_mask()


def test_two_tensors_of_a_module_keep_what_they_agree_on() -> None:
    layer = nn.RNN(4, 4)
    order = list(layer.state_dict())
    config = [{"tensor_fqn": "weight_hh_l0", "test": 2}, {"tensor_fqn": "weight_ih_l0"}]
    sparsifier = FirstRow(test=1, same=0)
    sparsifier.prepare(layer, config)
    with pytest.raises(ValueError, match="one sparse_params, but its tensors have test 2 and 1"):
        sparsifier.squash_mask(("same", "test"))
    sparsifier.squash_mask(("same",))
    assert layer.sparse_params == {"same": 0}
    assert list(layer.state_dict()) == order


def test_a_subclass_hands_on_all_settings() -> None:
    class Own(WeightNormSparsifier):
        def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
            assert kwargs["note"] == "mine"
            super().update_mask(module, tensor_name, **kwargs)

    model = mlp()
    sparsifier = Own(0.5, (1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "note": "mine"}])
    sparsifier.step()
    assert int(mask(model).sum()) == 32


def test_state_has_the_mask_in_use_after_the_model_has_moved() -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier(0.5, (1, 1))
    sparsifier.prepare(model)
    model.double()
    sparsifier.step()
    assert sparsifier.state["0.weight"]["mask"] is mask(model)
    sparsifier.squash_mask()
    last = sparsifier.state["0.weight"]["mask"]
    assert last.dtype == torch.float64 and int(last.sum()) == 32
    assert torch.equal(sparsifier.state_dict()["state"]["0.weight"]["mask"], last)


# --- copies and states ---------------------------------------------------------------------------


def test_a_state_moves_masks_settings_and_state_and_shares_nothing() -> None:
    model0, model1 = mlp(), mlp()
    sparsifier0, sparsifier1 = FirstRow(test=3), FirstRow(test=1)
    sparsifier0.prepare(model0, [{"tensor_fqn": "0.weight"}])
    for _ in range(3):
        sparsifier0.step()
    sparsifier1.prepare(model1)
    state = sparsifier0.state_dict()
    assert state["state"]["0.weight"]["step_count"] == 3
    assert state["groups"] == [{"test": 3, "tensor_fqn": "0.weight"}]
    sparsifier1.load_state_dict(state)

    (values0,), (values1,) = sparsifier0.state.values(), sparsifier1.state.values()
    assert values0.keys() == values1.keys() == {"mask", "step_count"}
    assert torch.equal(values0["mask"], values1["mask"])
    assert values1["step_count"] == 3
    assert [g["tensor_fqn"] for g in sparsifier1.groups] == ["0.weight"]
    assert sparsifier1.groups[0]["test"] == 3 and sparsifier1.groups[0]["module"] is model1[0]
    assert torch.equal(model0[0].weight, model1[0].weight)
    assert not parametrize.is_parametrized(model1[2]), "no tensor of the state"
    assert torch.equal(model1[2].weight, mlp()[2].weight)

    sparsifier1.step()
    mask(model1).zero_()
    assert sparsifier0.state["0.weight"]["step_count"] == 3
    assert mask(model0)[1:].all()
    assert state["state"]["0.weight"]["mask"][1:].all() and "mask" in state["state"]["0.weight"]
    assert state["state"]["0.weight"]["step_count"] == 3


def test_a_state_is_a_snapshot_of_the_masks_in_use() -> None:
    model = mlp()
    sparsifier = FirstRow()
    sparsifier.prepare(model)
    sparsifier.state["0.weight"]["history"] = [1]
    before = sparsifier.state_dict()
    sparsifier.step()  # in place
    sparsifier.load_state_dict(before)
    sparsifier.state["0.weight"]["history"].append(2)
    model.to(torch.bfloat16)
    sparsifier.step()
    assert before["state"]["0.weight"]["mask"].all()
    assert before["state"]["0.weight"]["history"] == [1]
    after = sparsifier.state_dict()["state"]["0.weight"]["mask"]
    assert torch.equal(after, mask(model)) and not after[0].any()


def test_a_state_loads_onto_a_squashed_model_and_into_another_dtype() -> None:
    source = FirstRow()
    source.prepare(mlp())
    source.step()
    model = mlp().half()
    sparsifier = FirstRow()
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    sparsifier.load_state_dict(source.state_dict())
    assert mask(model).dtype == torch.float16
    assert not model[0].weight[0].any() and model[0].weight.dtype == torch.float16
    sparsifier.step()


def test_a_state_without_a_setting_has_the_default_and_no_initial_mask() -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier(0.25)
    sparsifier.prepare(model)
    block = [1, 4]
    bare = {"tensor_fqn": "0.weight", "norm": 1, "mask": torch.zeros(8, 8)}
    bare["sparse_block_shape"] = block
    sparsifier.load_state_dict({"state": {}, "groups": [bare]})
    (group,) = sparsifier.groups
    assert (group["sparsity_level"], group["norm"], group["zeros_per_block"]) == (0.25, 1, 4)
    assert "mask" not in group and mask(model).all()
    block[0] = 2
    assert group["sparse_block_shape"] == [1, 4], "copied"


def test_states_that_do_not_fit_change_nothing() -> None:
    sparsifier = FirstRow()
    with pytest.raises(ValueError, match="load_state_dict needs a model: call prepare"):
        sparsifier.load_state_dict({"state": {}, "groups": []})
    model = mlp()
    sparsifier.prepare(model)
    good = sparsifier.state_dict()
    before = copied(model)
    wrong_shape = copy.deepcopy(good)
    wrong_shape["state"]["2.weight"]["mask"] = torch.zeros(1, 8)
    unknown = copy.deepcopy(good)
    unknown["groups"][0]["tensor_fqn"] = "seq.0.weight"
    for state, message in (
        (wrong_shape, r"mask of 2.weight needs the shape \(4, 8\), got \(1, 8\)"),
        (unknown, r"no 'seq.0.weight': closest are '0"),
        ({"state": {}}, "'groups' is not in it"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsifier.load_state_dict(state)
        assert same(model, before)
    sparsifier.load_state_dict(unknown, strict=False)
    assert [g["tensor_fqn"] for g in sparsifier.groups] == ["2.weight"]


def test_a_deep_copy_works_and_shares_nothing() -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier(0.5, (1, 1), norm=lambda weight: weight.abs())
    sparsifier.prepare(model)
    new_model, new = copy.deepcopy((model, sparsifier))
    new.step()
    assert mask(model).all()
    assert int(mask(new_model).sum()) == 32
    assert new.model is new_model


def test_a_pickle_has_the_masks_but_no_model() -> None:
    model = mlp()
    sparsifier = WeightNormSparsifier(0.5, (1, 1), norm=1)
    sparsifier.prepare(model)
    sparsifier.step()
    new = pickle.loads(pickle.dumps(sparsifier))
    assert new.norm == 1 and new.defaults == sparsifier.defaults
    with pytest.raises(ValueError, match=r"call prepare\(model, config\) first"):
        new.step()
    state, new_model = new.state_dict(), mlp()
    new.prepare(new_model)
    new.load_state_dict(state)
    assert torch.equal(new_model[0].weight, model[0].weight)
    new.step()
    sparsifier.squash_mask()
    squashed = pickle.loads(pickle.dumps(sparsifier)).state_dict()
    assert torch.equal(squashed["state"]["0.weight"]["mask"], state["state"]["0.weight"]["mask"])
