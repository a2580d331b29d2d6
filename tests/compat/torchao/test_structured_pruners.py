"""Which channels the pruners drop."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compat.torchao import FPGMPruner, LambdaSL, LSTMSaliencyPruner, SaliencyPruner
from tests.prune.channels.models import Recurrent, ResNet, lively


def rows(*values: list[float]) -> nn.Sequential:
    """A layer with these rows, and one that reads it."""
    weight = torch.tensor(values)
    model = nn.Sequential(nn.Linear(weight.shape[1], len(weight)), nn.Linear(len(weight), 2))
    model[0].weight.data = weight
    return model


def kept(model: nn.Sequential) -> list[bool]:
    return model[0].parametrizations.weight[0].mask.tolist()


FIRST = [{"tensor_fqn": "0.weight"}]


def test_saliency_drops_the_least_l1_norms_and_rounds_down() -> None:
    model = rows([1.0, 1.0], [3.0, 0.0], [-1.0, 1.5], [0.1, -2.0], [4.0, 4.0])
    pruner = SaliencyPruner({"sparsity_level": 0.5})  # int(2.5) of five
    pruner.prepare(model, FIRST)
    pruner.step()
    assert kept(model) == [False, True, True, False, True]


def test_of_equal_rows_the_lower_stay() -> None:
    model = rows([1.0], [1.0], [1.0], [1.0])
    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, FIRST)
    pruner.step()
    assert kept(model) == [True, True, False, False]


@pytest.mark.parametrize("dist, gone", [(None, 1), (2, 1), (1, 1)])
def test_fpgm_drops_what_the_others_can_stand_for(dist: int | None, gone: int) -> None:
    """The middle one of three points is nearest to both others, although it is the largest."""
    model = rows([9.0, 9.0], [10.0, 10.0], [9.0, 12.0])
    pruner = FPGMPruner(0.34, dist)
    pruner.prepare(model, FIRST)
    pruner.step()
    assert kept(model) == [index != gone for index in range(3)]


def test_fpgm_by_ones_own_distance_and_rounding_to_the_nearest() -> None:
    model = rows([0.0], [1.0], [5.0], [7.0])
    farthest = FPGMPruner(0.4, lambda x: 7 - torch.cdist(x, x))  # round(1.6) of four
    farthest.prepare(model, FIRST)
    farthest.step()
    assert kept(model) == [False, True, True, False]
    with pytest.raises(ValueError, match="dist to be None, 1, 2 or a function, got 3"):
        FPGMPruner(dist=3)


def test_a_unit_counts_with_all_its_layers_in_the_config() -> None:
    """Row 0 of the stem is the least, but what is added to it outweighs it."""
    model = lively(ResNet())
    with torch.no_grad():
        model.stem.weight.fill_(1)
        model.a.conv2.weight.fill_(1)
        model.stem.weight[0] = 0.5
        model.a.conv2.weight[0] = 3
        model.a.conv2.weight[5] = 0
    for named, gone in ((["stem"], 0), (["stem", "a.conv2"], 5)):
        pruner = SaliencyPruner({"sparsity_level": 0.125})
        pruner.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in named])
        pruner.step()
        for layer in (model.stem, model.a.conv2):
            assert (~layer.parametrizations.weight[0].mask).nonzero().tolist() == [[gone]]
        pruner.squash_mask()
        with torch.no_grad():  # as it was before the zeros
            model.stem.weight[0] = 0.5
            model.a.conv2.weight[0] = 3


def test_lstm_units_count_with_their_rows_of_all_gates() -> None:
    model = lively(Recurrent())
    with torch.no_grad():
        for weight in (model.lstm.weight_ih_l0, model.lstm.weight_hh_l0):
            weight.fill_(1)
            weight[2] = 0  # one gate of unit 2
            weight[[3, 9, 15, 21]] = 0.5  # all gates of unit 3
    pruner = LSTMSaliencyPruner({"sparsity_level": 0.2})
    layers = [{"tensor_fqn": "lstm.weight_ih_l0"}, {"tensor_fqn": "lstm.weight_hh_l0"}]
    pruner.prepare(model, layers)
    pruner.step()
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hh_l1_reverse"):
        mask = model.lstm.parametrizations[name][0].mask.view(4, 6)
        assert (mask == torch.tensor([True, True, True, False, True, True])).all()
    assert model.lstm.weight_ih_l1.view(4, 6, -1)[:, 3].abs().sum() == 0


def test_settings_are_verified_before_the_model_is_changed() -> None:
    model = rows([1.0], [2.0])
    for level in (1.0, -0.1, None):
        with pytest.raises(ValueError, match=r"0.weight needs a sparsity_level in \[0, 1\)"):
            SaliencyPruner({"sparsity_level": level}).prepare(model, FIRST)
    with pytest.raises(ValueError, match="weights of recurrent layers, 0.weight is none"):
        LSTMSaliencyPruner({"sparsity_level": 0.5}).prepare(model, FIRST)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_scheduler_sets_the_level() -> None:
    model = rows([1.0], [2.0], [3.0], [4.0])
    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, FIRST)
    scheduler = LambdaSL(pruner, lambda epoch: epoch / 2)
    counts = []
    for _ in range(3):
        pruner.step()
        counts.append(4 - sum(kept(model)))
        scheduler.step()
    assert counts == [0, 1, 2]


@pytest.mark.usefixtures("unchecked")
def test_patterns_are_refused_and_their_default_is_taken() -> None:
    with pytest.raises(ValueError, match="SaliencyPruner follows the model's graph .* leave them"):
        SaliencyPruner({"sparsity_level": 0.5}, {(nn.Linear, "output"): print})
    assert SaliencyPruner({"sparsity_level": 0.5}, None).defaults["prune_bias"]


def test_a_subclass_hands_on_all_settings() -> None:
    class Own(SaliencyPruner):
        def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
            super().update_mask(module, tensor_name, **kwargs)

    model = rows([1.0], [3.0], [2.0], [4.0])
    pruner = Own({"sparsity_level": 0.5, "note": "mine"})
    pruner.prepare(model, FIRST)
    pruner.step()
    assert kept(model) == [False, True, False, True]


def test_a_distance_of_ones_own_is_what_a_subclass_overrides() -> None:
    class Own(FPGMPruner):
        def _compute_distance(self, t: Tensor) -> Tensor:
            return -t.flatten(1).sum(1)

    model = rows([1.0], [3.0], [2.0], [4.0])
    pruner = Own(0.5)
    pruner.prepare(model, FIRST)
    pruner.step()
    assert kept(model) == [True, False, True, False]
