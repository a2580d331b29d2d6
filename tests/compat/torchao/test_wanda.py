"""Wanda as in the paper: norms with their root, rows compared within, recomputed at each step."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.compat.torchao import CubicSL, PerChannelNormObserver, WandaSparsifier
from secateur.patterns import NM
from tests.models import ConvNet


def one(weight: list[list[float]], **settings: float) -> tuple[nn.Sequential, WandaSparsifier]:
    rows = torch.tensor(weight)
    model = nn.Sequential(nn.Linear(rows.shape[1], rows.shape[0], bias=False))
    model[0].weight.data.copy_(rows)
    sparsifier = WandaSparsifier(**settings)
    sparsifier.prepare(model, None)
    return model, sparsifier


def test_the_norm_is_a_norm() -> None:
    """|W| * norm is 10 and 12; with squared norms it would be 100 and 48."""
    model, sparsifier = one([[1, 3]])
    model(torch.tensor([[10.0, 4]]))
    sparsifier.step()
    assert model[0].weight.tolist() == [[0, 3]]


def test_weights_are_compared_within_a_row() -> None:
    model, sparsifier = one([[1, 2, 3, 4], [10, 20, 30, 40]])
    model(torch.ones(1, 4))
    sparsifier.step()
    assert model[0].weight.tolist() == [[0, 0, 3, 4], [0, 0, 30, 40]]


def test_every_step_chooses_anew_from_all_data_so_far() -> None:
    model, sparsifier = one([[1, 1, 1, 1]])
    for x, expected in (([9.0, 8, 1, 1], [1, 1, 0, 0]), ([0.0, 0, 50, 60], [0, 0, 1, 1])):
        model(torch.tensor([x]))
        for _ in range(3):
            sparsifier.step()
            assert model[0].weight.tolist() == [expected]


def test_half_of_each_group_goes_and_groups_do_not_cross_rows() -> None:
    model, sparsifier = one([[1, 2, 3, 4, 5, 6, 7, 8]], semi_structured_block_size=4)
    model(torch.ones(1, 8))
    sparsifier.step()
    assert model[0].weight.tolist() == [[0, 0, 3, 4, 0, 0, 7, 8]]
    with pytest.raises(ValueError, match=r"0.weight: 2:4 needs in_features divisible by 4, got 6"):
        one([[1, 2, 3, 4, 5, 6]] * 2, semi_structured_block_size=4)


def test_it_prunes_what_prune_with_wanda_prunes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    batches = [torch.randn(5, 12), torch.randn(3, 2, 12)]
    other = copy.deepcopy(model)
    sparsifier = WandaSparsifier(0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    for batch in batches:
        model(batch)
    sparsifier.step()
    sparsifier.squash_mask()
    sc.prune_(other, sc.plan(other, "unstructured:0.5", layers=["0"]), sc.wanda, batches)
    assert torch.equal(model[0].weight, other[0].weight)
    assert model[1].weight.all()


def test_convolutions_are_pruned_along_their_input_channels() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    other = copy.deepcopy(model)
    batch = torch.randn(2, 4, 8, 8)
    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(model, [{"tensor_fqn": "down.weight"}])
    model.eval()(batch)
    sparsifier.step()
    sparsifier.squash_mask()
    sc.prune_(other.eval(), sc.plan(other, "2:4", layers=["down"]), sc.wanda, [batch])
    assert torch.equal(model.down.weight, other.down.weight)
    assert NM(2, 4).violation(model.down.weight.permute(0, 2, 3, 1).flatten(1) != 0) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_vector_and_other_dtypes_will_do(dtype: torch.dtype) -> None:
    model, sparsifier = one([[1, 2, 3, 4]])
    model.to(dtype)
    model[0](input=torch.tensor([4.0, 3, 1, 1], dtype=dtype))
    sparsifier.step()
    assert model[0].weight.tolist() == [[1, 2, 0, 0]] and model[0].weight.dtype == dtype


def test_a_layer_without_data_is_an_error_and_no_mask_changes() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    sparsifier = WandaSparsifier()
    sparsifier.prepare(model)
    model[0](torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"1.weight has seen no input since prepare: run batches"):
        sparsifier.step()
    assert model[0].weight.all()


def test_nothing_of_it_is_left_after_squashing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    keys = list(model.state_dict())
    kept = model[0].register_forward_pre_hook(lambda module, args: None)
    sparsifier = WandaSparsifier()
    sparsifier.prepare(model)
    assert isinstance(model[0].activation_post_process, PerChannelNormObserver)
    model(torch.ones(1, 4))
    sparsifier.step()
    sparsifier.squash_mask()
    assert list(model.state_dict()) == keys
    assert not hasattr(model[0], "activation_post_process") and not hasattr(model, "qconfig")
    assert list(model[0]._forward_pre_hooks) == [kept.id]
    assert not model[0]._forward_pre_hooks_with_kwargs


def test_a_copy_observes_for_itself() -> None:
    model, sparsifier = one([[1, 1]])
    new_model, new = copy.deepcopy((model, sparsifier))
    model(torch.tensor([[1.0, 9]]))
    new_model(torch.tensor([[9.0, 1]]))
    sparsifier.step()
    new.step()
    assert (model[0].weight.tolist(), new_model[0].weight.tolist()) == ([[0, 1]], [[1, 0]])


def test_a_loaded_state_observes_its_own_layers() -> None:
    source_model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    source = WandaSparsifier(0.25)
    source.prepare(source_model, [{"tensor_fqn": "1.weight"}])
    source_model(torch.ones(1, 4))
    source.step()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = WandaSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.load_state_dict(source.state_dict())
    assert not hasattr(model[0], "activation_post_process") and not model[0]._forward_pre_hooks
    assert torch.equal(model[1].weight == 0, source_model[1].weight == 0)
    model(torch.ones(1, 4))
    sparsifier.step()
    assert ((model[1].weight == 0).sum(1) == 1).all()


def test_schedulers_take_it() -> None:
    model, sparsifier = one([[1, 2, 3, 4]], sparsity_level=1.0)
    scheduler = CubicSL(sparsifier, delta_t=1, total_t=2)
    model(torch.ones(1, 4))
    zeros = []
    for _ in range(3):
        sparsifier.step()
        zeros.append(int((model[0].weight == 0).sum()))
        scheduler.step()
    assert zeros == [0, 4, 4]  # 0.875 of 4 is 3.5, which rounds up


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_level": 1.5}, "from 0 to 1, got 1.5"),
        ({"sparsity_level": -0.1}, "from 0 to 1, got -0.1"),
        ({"semi_structured_block_size": 1}, "at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_are_an_error_at_construction(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WandaSparsifier(**settings)


def test_layers_that_wanda_does_not_know_are_an_error_by_prepare() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(4, 4), "fc": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3, groups=4)}
    )
    for fqn, message in (
        ("embed.weight", "weight of a Linear or Conv2d, embed.weight is of a Embedding"),
        ("fc.bias", "fc.bias is of a Linear"),
        ("conv.weight", "conv.weight cannot be pruned by Wanda: depthwise"),
    ):
        with pytest.raises(ValueError, match=message):
            WandaSparsifier().prepare(model, [{"tensor_fqn": fqn}])


def test_an_observer_passes_on_and_remembers_the_norm() -> None:
    observer = PerChannelNormObserver()
    assert observer.norm.numel() == 0
    x = torch.tensor([[3.0, 1], [0, 1]])
    assert observer(x) is x
    observer(torch.tensor([4.0, 7]))
    assert observer.norm.tolist() == pytest.approx([5, 51**0.5])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", ["x", None, {"sparsity_level": 0.5}, nn.Linear(2, 2)])
def test_a_level_of_another_kind_is_an_error_that_shows_it(value: object) -> None:
    with pytest.raises(ValueError, match="Wanda needs a sparsity_level from 0 to 1, got ['N{L]"):
        WandaSparsifier(value)
    with pytest.raises(ValueError, match="semi_structured_block_size of at least 2, got 2.5"):
        WandaSparsifier(0.5, 2.5)
