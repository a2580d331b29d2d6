"""From scores and masks to whole units."""

import pytest
import torch

from secateur.prune.channels import all_but_one, dropped, follow, isolated, least
from tests.prune.channels.models import Odd, ResNet, images, lively, sequences, weights

ADDED = weights("stem", "a.conv2")


def test_parameters_that_share_units_are_scored_together() -> None:
    """Row 0 of the stem is the least, but what is added to it outweighs it."""
    channels = follow(lively(ResNet()), images()).channels
    assert channels.pool("stem.weight", ADDED) == ADDED
    stem, other = torch.ones(8), torch.ones(8)
    stem[[0, 5]], other[[0, 5]] = torch.tensor([0.5, 0.6]), torch.tensor([3.0, 0.6])
    stem[3], other[3] = 3.0, 0.5
    alone = least(channels, {"stem.weight": stem}, lambda n: n // 8)
    assert (~alone["stem.weight"]).nonzero().tolist() == [[0]]
    both = least(channels, dict(zip(ADDED, (stem, other), strict=True)), lambda n: n // 8)
    assert [(~both[name]).nonzero().tolist() for name in ADDED] == [[[5]], [[5]]]


def test_ties_keep_the_lower_unit_and_one_has_to_stay() -> None:
    channels = follow(lively(Odd(torch.relu)), sequences(4)).channels
    scores = {"first.weight": torch.ones(6)}
    assert least(channels, scores, lambda n: 2)["first.weight"].tolist() == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="first.weight needs a sparsity .* 6 of its 6 would go"):
        least(channels, scores, lambda n: n)


def test_a_mask_drops_whole_units_or_says_which_it_splits() -> None:
    channels = follow(lively(ResNet()), images()).channels
    keep = torch.arange(8) != 2
    removed = dropped(channels, dict.fromkeys(ADDED, keep))
    assert channels.kept("a.conv1.weight", 1, removed).tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert removed.sum() == 1
    with pytest.raises(ValueError, match=r"a.conv2.weight drops .* that stem.weight keeps"):
        dropped(channels, {"stem.weight": torch.ones(8, dtype=torch.bool), "a.conv2.weight": keep})
    with pytest.raises(ValueError, match="each of its 8 channels, got the shape"):
        dropped(channels, {"stem.weight": keep[:4]})
    with pytest.raises(ValueError, match="needs a channel, all of its 8 would go"):
        dropped(channels, {"stem.weight": torch.zeros(8, dtype=torch.bool)})


def test_all_but_one_leaves_every_parameter_a_channel() -> None:
    channels = follow(lively(ResNet()), images()).channels
    removed = all_but_one(channels, ADDED)
    assert removed.sum() == 7
    assert len(channels.kept("stem.weight", 0, removed)) == 1


def test_a_parameter_that_cannot_lose_channels_gets_units_that_nothing_shares() -> None:
    channels = follow(lively(Odd(lambda x: x.softmax(-1))), sequences(4)).channels
    alone, held = isolated(channels, weights("first"))
    units = alone.units("first.weight")
    assert alone.count == channels.count + 6 and held.keys() == set(units.tolist())
    assert all("runs along the channels" in reason for reason in held.values())
    assert alone.made_with(units) == [("first.weight", 0), ("first.bias", 0)]
    assert alone.why_not("second.weight", 1) is not None
    assert isolated(channels, weights("second"))[1] == {}
