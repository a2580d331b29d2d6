"""Random scores: reproducible by layer name, different between layers, uniform."""

import torch

import secateur as sc


def test_same_seed_same_scores_and_other_seed_others() -> None:
    weight = torch.zeros(20, 30)
    assert torch.equal(sc.criteria.random(weight, 7), sc.criteria.random(weight, 7))
    assert not torch.equal(sc.criteria.random(weight, 7), sc.criteria.random(weight, 8))


def test_global_random_state_is_not_touched() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sc.criteria.random(torch.zeros(4, 4), 0)
    assert torch.equal(torch.rand(3), expected)


def test_equal_layers_get_different_masks_that_a_rerun_repeats() -> None:
    def masks() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        sc.prune_(model, sc.plan(model, "2:4"), sc.criteria.random)
        return [layer.weight != 0 for layer in model]

    first, again = masks(), masks()
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
