"""Plans: made, printed, written, read, and refused for another model."""

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.model.plan import match, plan_from_dict
from tests.reconstruct.problems import gpt2_and_batches


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.Linear(6, 4))


def test_one_pattern_for_all_as_string_or_value() -> None:
    net = model()
    assert sc.plan(net, "unstructured:0.5") == sc.plan(net, sc.Unstructured(0.5))
    assert dict(sc.plan(net, "unstructured:0.5").shapes) == {
        "0": (12, 8),
        "2": (6, 12),
        "3": (4, 6),
    }


def test_a_mapping_gives_each_layer_the_first_that_matches() -> None:
    plan = sc.plan(model(), {"0": "2:4", "re:^[02]$": "4:8@dense-remainder", "*": "channels:0.5"})
    assert {name: str(p) for name, p in plan.layers.items()} == {
        "0": "2:4",
        "2": "4:8@dense-remainder",
        "3": "channels:0.5",
    }


def test_layers_that_do_not_fit_are_all_listed() -> None:
    with pytest.raises(ValueError) as error:
        sc.plan(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 10), nn.Linear(10, 2)), {"*": "2:4"})
    assert "2 of 3 layers cannot have their pattern" in str(error.value)
    assert "0: 2:4 needs in_features divisible by 4, got 6" in str(error.value)
    assert "2: 2:4 needs in_features divisible by 4, got 10" in str(error.value)
    assert "Ignore them, choose another pattern, or for N:M write '2:4@dense-remainder'" in str(
        error.value
    )


def test_by_default_layers_that_do_not_fit_are_left_alone_and_said() -> None:
    """The first convolution of a network for three-channel images cannot have 2:4."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    plan = sc.plan(net, "2:4")
    assert list(plan.layers) == list(plan.shapes) == ["1", "3"]
    assert plan.skipped == {"0": "2:4 needs in_channels of at least 4, got 3"}
    assert "0: 2:4 needs in_channels of at least 4, got 3" in str(plan)
    stem = net[0].weight.detach().clone()
    sc.prune_(net, "2:4")
    assert torch.equal(net[0].weight, stem)
    assert sc.check(net, "2:4") == {"1": 0.5, "3": 0.5}


@pytest.mark.parametrize("selected", [{"layers": "0"}, {"layers": ["*"]}, {"layers": nn.Conv2d}])
def test_layers_that_are_selected_and_do_not_fit_are_an_error(selected) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"1 of \d layers cannot have their pattern: 0: 2:4 needs"):
        sc.plan(net, "2:4", **selected)


def test_a_default_that_no_layer_can_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 of 2 layers cannot have their pattern: 0: 2:4 .* 1: 2"):
        sc.plan(nn.Sequential(nn.Linear(6, 4), nn.Linear(7, 2)), "2:4")


def test_the_names_of_weights_are_names_of_layers() -> None:
    plan = sc.plan(model(), {"0.weight": "2:4", "2.weight": "4:8@dense-remainder"})
    assert {name: str(p) for name, p in plan.layers.items()} == {
        "0": "2:4",
        "2": "4:8@dense-remainder",
    }


def test_a_layer_without_a_shape_is_named() -> None:
    with pytest.raises(ValueError, match="0.weight has no shape yet in this LazyLinear: run the"):
        sc.plan(nn.Sequential(nn.LazyLinear(8)), "2:4")


def test_a_dense_remainder_makes_ragged_layers_fit() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    plan = sc.plan(net, "2:4@dense-remainder")
    sc.prune_(net, plan)
    assert (net[0].weight[:, :4] != 0).sum(1).tolist() == [2] * 4
    assert (net[0].weight[:, 4:] != 0).all()


def test_a_padded_remainder_is_pruned_too() -> None:
    net = nn.Sequential(nn.Linear(7, 4))
    plan = sc.plan(net, "2:4@pad-remainder")
    sc.prune_(net, plan)
    assert (net[0].weight[:, :4] != 0).sum(1).tolist() == [2] * 4
    assert (net[0].weight[:, 4:] != 0).sum(1).tolist() == [2] * 4
    assert sc.check(net, plan) == {"0": pytest.approx(3 / 7)}
    assert "42.9%" in str(plan), "not 50 %, which the last three columns cannot have"


def test_groups_of_a_convolution_lie_along_its_channels_at_every_position(tmp_path: Path) -> None:
    """2 x 2 positions of 6 channels are 24 columns; 4 divides the 24, but not the 6."""
    net = nn.Sequential(nn.Conv2d(6, 5, 2))
    with pytest.raises(ValueError, match="0: 2:4 needs in_channels divisible by 4, got 6"):
        sc.plan(net, "2:4")
    plan = sc.plan(net, "2:4@pad-remainder")
    assert str(plan.layers["0"]) == "2:4@pad-remainder@channels6" and "33.3%" in str(plan)
    plan.write(tmp_path / "plan.yaml")
    sc.prune_(net, sc.read_plan(tmp_path / "plan.yaml"))
    kept = (net[0].weight != 0).movedim(1, -1)
    assert (kept[..., :4].sum(-1) == 2).all() and kept[..., 4:].all()
    assert sc.check(net, "2:4@pad-remainder") == {"0": pytest.approx(1 / 3)}


def test_a_plan_for_other_channels_is_refused() -> None:
    plan = sc.plan(nn.Sequential(nn.Conv2d(6, 5, 2)), "2:4@pad-remainder")
    with pytest.raises(ValueError) as error:
        match(nn.Sequential(nn.Conv2d(24, 5, 1)), plan)
    assert "first 0 takes 2:4@pad-remainder, planned 2:4@pad-remainder@channels6" in str(
        error.value
    )


def test_prints_what_it_will_do_and_what_not() -> None:
    net = nn.Sequential()
    net.add_module("body", nn.Linear(8, 8))
    net.add_module("lm_head", nn.Linear(8, 16))
    text = str(sc.plan(net, "2:4"))
    assert "body" in text and "50.0%" in text
    assert "1 layers (2:4: 1), 64 weights" in text
    assert "lm_head: output head: name it to prune it" in text


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_written_and_read_back(name: str, tmp_path: Path) -> None:
    plan = sc.plan(model(), {"0": "2:4", "*": "unstructured:0.25@layer"}, ignore=["3"])
    plan.write(tmp_path / name)
    assert sc.read_plan(tmp_path / name) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as YAML: while parsing"),
        ("[" * 9999, "cannot be read as YAML: it is nested more than 100 levels deep"),
        ("version: 1\nlayers: {a: 1, a: 2}", "cannot be read as YAML: it has the key 'a' twice"),
        ("version: 1\nlayers: !!timestamp x", "cannot be read as YAML: line 2 has the tag"),
        ("3", "is not a plan: at the top level"),
        ("layers: 3\nversion: 1", "is not a plan: at layers: "),
        ("version: 1", "is not a plan: at layers: Field required"),
        ("version: 9\nlayers: {}", "is a plan of version 9, this library reads 1"),
        (
            "version: 1\nlayers: {a: {pattern: '2:3:4', shape: [4, 4]}}",
            "is not a plan: unknown pattern '2:3:4'",
        ),
        (
            "version: 1\nlayers: {a: {pattern: '2:4', shape: [4]}}",
            "is not a plan: at layers.a.shape",
        ),
        ("version: 1\nlayers: {}\nimport: os", "is not a plan: at import: Extra inputs"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML: line 1 has the tag"),
    ],
)
def test_files_that_are_no_plan_say_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        sc.read_plan(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_names_the_remainders_that_help() -> None:
    with pytest.raises(ValueError, match="'2:4@pad-remainder' to count them as a group filled up"):
        sc.plan(nn.Sequential(nn.Linear(6, 4)), "2:4")


def test_a_plan_for_another_model_is_refused() -> None:
    plan = sc.plan(model(), "unstructured:0.5")
    with pytest.raises(ValueError) as error:
        match(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 7)), plan)
    assert "made for another model than this Sequential" in str(error.value)
    assert "1 of its 3 layers are missing, first '3'" in str(error.value)
    assert "1 have another shape, first 2 is (7, 12), planned (6, 12)" in str(error.value)


def test_a_mapping_and_layers_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="either a mapping of selectors to patterns, or layers="):
        sc.plan(model(), {"0": "2:4"}, layers=["0"])


def test_a_written_plan_keeps_the_layers_order(tmp_path: Path) -> None:
    net = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
    sc.plan(net, "2:4").write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.index("up:") < text.index("down:")


def test_planning_changes_nothing() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    sc.plan(net, "unstructured:0.9")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_plain_data_round_trip() -> None:
    plan = sc.plan(model(), "unstructured:0.5")
    assert plan_from_dict(plan.to_dict(), "here") == plan


def test_conv1d_is_planned_by_default() -> None:
    model, _ = gpt2_and_batches(blocks=1)
    made = sc.plan(model, "2:4")
    block = "transformer.h.0"
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(made.layers) == [f"{block}.{name}" for name in names]
    assert made.shapes[f"{block}.attn.c_attn"] == (48, 16)
    assert list(made.skipped) == ["lm_head"]
