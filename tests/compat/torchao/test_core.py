"""The same masks, levels and checkpoints as torch.ao.pruning, where that does what it says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import pruning as core
from torch.ao.pruning._experimental import pruner as core_structured
from torch.nn import functional as F

import secateur.compat.torchao as ao


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 12))


def masked(package: Any, name: str, *arguments: Any) -> tuple[nn.Sequential, Any]:
    model = mlp()
    sparsifier = vars(package)[name](*arguments)
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}]
    sparsifier.prepare(model, config)
    sparsifier.step()
    return model, sparsifier


@pytest.mark.parametrize(
    "arguments",
    [
        ("WeightNormSparsifier", 1.0, (1, 4), 2),
        ("WeightNormSparsifier", 0.3, (1, 4)),
        ("WeightNormSparsifier", 0.5, (4, 2), 5, 1),
        ("WeightNormSparsifier", 0.9, (1, 1)),
        ("WeightNormSparsifier", 0.5, (3, 5)),
        ("WeightNormSparsifier", 2.0, (2, 2)),
        ("WeightNormSparsifier", -1.0, (2, 2)),
        ("NearlyDiagonalSparsifier", 5),
    ],
)
def test_weights_are_masked_alike(arguments: tuple[Any, ...]) -> None:
    (ours, _), (theirs, _) = masked(ao, *arguments), masked(core, *arguments)
    for layer in (0, 2):
        assert torch.equal(ours[layer].weight, theirs[layer].weight)


@pytest.mark.parametrize("settings", [{}, {"init_t": 3, "initially_zero": True}, {"init_sl": 0.2}])
def test_levels_rise_alike(settings: dict[str, Any]) -> None:
    pairs = []
    for package in (ao, core):
        _, sparsifier = masked(package, "WeightNormSparsifier", 0.8)
        scheduler = package.CubicSL(sparsifier, delta_t=2, total_t=4, **settings)
        seen = []
        for _ in range(14):
            sparsifier.step()
            scheduler.step()
            seen.append(scheduler.get_last_sl())
        pairs.append(seen)
    torch.testing.assert_close(torch.tensor(pairs[0]), torch.tensor(pairs[1]), rtol=1e-6, atol=0)


def test_states_of_its_sparsifiers_and_models_load() -> None:
    theirs, source = masked(core, "WeightNormSparsifier", 0.5, (2, 2), 3)
    model = mlp()
    sparsifier = ao.WeightNormSparsifier()
    sparsifier.prepare(model)
    model.load_state_dict(theirs.state_dict(), strict=False)
    state = copy.deepcopy(source.state_dict())
    sparsifier.load_state_dict(state)
    for layer in (0, 2):
        assert torch.equal(model[layer].weight, theirs[layer].weight)
    assert sparsifier.groups[0]["zeros_per_block"] == 3
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, theirs[0].weight)


# --- what code asks of its classes ----------------------------------------------------------------


def test_parametrizations_and_sparsifiers_are_instances_of_its_classes() -> None:
    model, sparsifier = masked(ao, "WeightNormSparsifier", 0.5)
    assert isinstance(sparsifier, core.BaseSparsifier)
    assert isinstance(ao.WandaSparsifier(), core.BaseSparsifier)
    assert isinstance(model[0].parametrizations.weight[0], core.FakeSparsity)
    assert core.sparsifier.utils.module_contains_param(model[0], core.FakeSparsity)
    assert "0.parametrizations.weight.0.mask" in model.state_dict(), "core leaves it out"
    pruner = ao.SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(small := mlp(), [{"tensor_fqn": "0.weight"}])
    found = small[0].parametrizations.weight[0]
    assert isinstance(found, core_structured.FakeStructuredSparsity)
    assert isinstance(pruner, core.BaseSparsifier)
    assert not isinstance(nn.Linear(2, 2), core.FakeSparsity)


def test_its_schedulers_take_the_sparsifiers() -> None:
    _, sparsifier = masked(ao, "WeightNormSparsifier", 0.8)
    _, theirs = masked(core, "WeightNormSparsifier", 0.8)
    for each in (sparsifier, theirs):
        scheduler = core.CubicSL(each, total_t=2, delta_t=2)
        for _ in range(3):
            each.step()
            scheduler.step()
    assert [g["sparsity_level"] for g in sparsifier.groups] == [
        g["sparsity_level"] for g in theirs.groups
    ]


def test_state_has_the_masks_and_keeps_them_after_squash() -> None:
    states = []
    for package in (ao, core):
        model, sparsifier = masked(package, "WeightNormSparsifier", 0.5)
        mask = model[0].parametrizations.weight[0].mask
        assert sparsifier.state["0.weight"]["mask"] is mask
        sparsifier.squash_mask()
        states.append(sparsifier.state_dict()["state"])
    assert list(states[0]) == list(states[1]) == ["0.weight", "2.weight"]
    for name, values in states[0].items():
        assert torch.equal(values["mask"], states[1][name]["mask"].to(values["mask"]))


@pytest.mark.parametrize("kinds", [{}, {"SUPPORTED_MODULES": {nn.Conv2d}}])
def test_a_config_is_made_from_a_model_alike(kinds: dict[str, Any]) -> None:
    configs = []
    for package in (ao, core):
        sparsifier = package.WeightNormSparsifier()
        sparsifier.make_config_from_model(lenet(), **kinds)
        configs.append(sparsifier.config)
    assert configs[0] == configs[1] and len(configs[0]) == (2 if kinds else 1)


def test_what_subclasses_override_and_call_has_the_same_effect() -> None:
    """A criterion, a choice of layers and a preparation of one's own, by what the class has."""

    def make(package: Any) -> Any:
        class Own(package.WeightNormSparsifier):
            def make_config_from_model(self, model: nn.Module, *args: Any) -> None:
                super().make_config_from_model(model, *args)
                self.config = self.config[1:]

            def _prepare(self, *args: Any) -> None:
                super()._prepare(*args)
                self.prepared = [group["tensor_fqn"] for group in self.groups]

            def update_mask(
                self,
                module: nn.Module,
                tensor_name: str,
                sparsity_level: float,
                sparse_block_shape: tuple[int, int],
                zeros_per_block: int,
                **kwargs: Any,
            ) -> None:
                data = self.norm_fn(getattr(module, tensor_name)) + 1
                whole = self._make_tensor_mask(data, data.shape, 0.5, sparse_block_shape)
                inside = self._make_block_mask(data, sparse_block_shape, zeros_per_block)
                keep = torch.logical_or(whole, inside)
                module.parametrizations[tensor_name][0].mask.data = keep.to(data)

        return Own(0.5, (2, 4), 3)

    results = []
    for package in (ao, core):
        model, sparsifier = mlp(), make(package)
        sparsifier.prepare(model, None)
        sparsifier.step()
        results.append((model[2].weight, sparsifier.prepared))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][0] == 0).sum() == 18  # three of eight in six of twelve blocks
    assert results[0][1] == results[1][1] == ["2.weight"]


def test_schedulers_of_ones_own_call_the_same_helpers() -> None:
    def make(package: Any, sparsifier: Any) -> Any:
        class Steps(package.BaseScheduler):
            def __init__(self, sparsifier: Any, size: float | list[float]) -> None:
                self.sparsifier = sparsifier
                self.size = self._make_sure_a_list(size)
                super().__init__(sparsifier)

            def get_sl(self) -> list[float]:
                assert self._get_sl_called_within_step
                return [min(size * self.last_epoch, 1.0) for size in self.size]

        return Steps(sparsifier, 0.25), Steps(sparsifier, [0.25, 0.5])

    seen = []
    for package in (ao, core):
        _, sparsifier = masked(package, "WeightNormSparsifier", 0.8)
        one, each = make(package, sparsifier)
        sparsifier.step()
        each.step()
        seen.append((one.size, each.get_last_sl()))
        with pytest.raises(ValueError, match="3"):
            each._make_sure_a_list([1, 2, 3])
        assert not each._get_sl_called_within_step
    assert seen[0] == seen[1] == ([0.25, 0.25], [0.25, 0.5])


@pytest.mark.parametrize("dist", [None, 1, lambda x: torch.cdist(x, x) ** 2])
def test_distances_of_filters_are_summed_alike(dist: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2)
    ours, theirs = (
        p.FPGMPruner(0.5, dist)._compute_distance(weight) for p in (ao, core_structured)
    )
    torch.testing.assert_close(ours, theirs)


# --- structured pruning, from the config alone ----------------------------------------------------


def lenet(activation: type[nn.Module] = nn.ReLU, **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, **settings),
        activation(),
        nn.Conv2d(8, 6, 3, **settings),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def pooled(pool: type[nn.Module], **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, **settings),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(8, 6, 3, **settings),
        pool(2),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3),
    )


class Functional(nn.Module):
    """What is between the layers is in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(8, 3), nn.Linear(6, 8)
        self.stem = nn.Conv2d(1, 6, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.pool(self.stem(x)), 1)
        return self.head(F.gelu(self.inner(x)))


class Sequences(nn.Module):
    def __init__(self, layers: int, norm: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, layers)
        self.norm = nn.LayerNorm(8) if norm else None
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return self.out(hidden if self.norm is None else self.norm(hidden))


def every(base: Any, step: int) -> Any:
    """A pruner of a user's own: every so many channels go, from each gate of recurrent layers."""

    class Every(base):
        def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
            mask = getattr(module.parametrizations, tensor_name)[0].mask
            mask.view(4 if "lstm" in kwargs["tensor_fqn"] else 1, -1)[:, ::step] = False

    return Every


PICTURES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
STEPS = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # theirs
@pytest.mark.parametrize(
    "make, batch, named, prune_bias",
    [
        (lenet, PICTURES, ["0", "2"], True),
        (lambda: lenet(bias=False), PICTURES, ["0"], True),
        (lambda: lenet(nn.Hardswish), PICTURES, ["2"], False),
        (lambda: lenet(nn.Sigmoid, padding=1), PICTURES, ["2"], True),
        (lambda: pooled(nn.MaxPool2d), PICTURES, ["0", "3"], True),
        (lambda: pooled(nn.AvgPool2d), PICTURES, ["0", "3"], False),
        (lambda: pooled(nn.MaxPool2d), PICTURES, ["0", "3", "6"], True),
        (Functional, PICTURES, ["stem", "inner"], True),
        (Functional, PICTURES, ["inner", "head"], True),
        *(
            (
                lambda layers=layers, norm=norm: Sequences(layers, norm),
                STEPS,
                [
                    f"lstm.weight_{kind}_l{layer}"
                    for layer in range(layers)
                    for kind in ("ih", "hh")
                ],
                True,
            )
            for layers in (1, 2)
            for norm in (False, True)
        ),
    ],
)
def test_whole_channels_go_alike(
    make: Callable[[], nn.Module], batch: Tensor, named: list[str], prune_bias: bool
) -> None:
    pruned = []
    for base in (ao.BaseStructuredSparsifier, core_structured.BaseStructuredSparsifier):
        torch.manual_seed(0)
        model = make().eval()
        pruner = every(base, 3)({"prune_bias": prune_bias})
        weights = [name if "weight" in name else f"{name}.weight" for name in named]
        pruner.prepare(model, [{"tensor_fqn": name} for name in weights])
        assert list(pruner.state) == weights
        pruner.enable_mask_update = True
        pruner.step()
        pruned.append(pruner.prune())
    ours, theirs = pruned
    torch.testing.assert_close(ours(batch), theirs(batch))
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in theirs.named_parameters()
    }


@pytest.mark.parametrize("name", ["SaliencyPruner", "FPGMPruner"])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.7])
def test_the_same_channels_are_chosen(name: str, level: float) -> None:
    masks = []
    for package in (ao, core_structured):
        torch.manual_seed(0)
        model = lenet()
        kind = getattr(package, name)
        pruner = kind(level) if name == "FPGMPruner" else kind({"sparsity_level": level})
        pruner.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
        pruner.step()
        masks.append([model[i].parametrizations.weight[0].mask for i in (0, 2)])
    for ours, theirs in zip(*masks, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [mlp, lenet, lambda: pooled(nn.MaxPool2d), Functional])
def test_without_a_config_the_same_layers_are_taken(make: Callable[[], nn.Module]) -> None:
    taken = []
    for base in (ao.BaseStructuredSparsifier, core_structured.BaseStructuredSparsifier):
        pruner = every(base, 3)(None)
        if base is ao.BaseStructuredSparsifier:
            with pytest.warns(UserWarning, match="too, whose channels are outputs of the"):
                pruner.prepare(make(), None)
        else:
            pruner.prepare(make(), None)
        taken.append({group["tensor_fqn"] for group in pruner.groups})
    assert taken[0] == taken[1]
