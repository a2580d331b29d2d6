"""Evolution: better than its start, never costlier, and the model is left as it was."""

import copy
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocation import Costs, evolve
from secateur.allocation.evolve import _child
from secateur.model.blocks import Batch

PATTERNS = ("unstructured:0.5", "unstructured:0.75")
BATCHES = [torch.full((1,), float(i)) for i in range(4)]
START = dict.fromkeys("0123", "unstructured:0.5")


def stack() -> nn.Sequential:
    """Four layers whose weights are all equal to 1, 10, 100 and 1000."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.fill_(10.0**i)
    return model.train()


def weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    found = {}
    for pattern in PATTERNS:
        pruned = copy.deepcopy(model)
        sc.prune_(pruned, pattern)
        found[pattern] = pruned.state_dict()
    return found


def costs() -> Costs:
    of = {"dense": 16.0, "unstructured:0.5": 8.0, "unstructured:0.75": 4.0}
    return Costs("parameters", dict.fromkeys("0123", of))


def lost(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Minus the sum of all weights: zeros in large ones cost most."""
    assert not model.training
    return -sum(float(p.sum()) for p in model.parameters())


def test_it_finds_the_best_choice_within_the_cost() -> None:
    model, all_costs = stack(), costs()
    tables = weights(model)
    found = evolve(
        model, START, tables, all_costs, lost, BATCHES, generations=30, rounds=((1, 2), (4, 1))
    )

    def loss(choices: dict[str, str]) -> float:
        named = {
            name: {"dense": 16, PATTERNS[0]: 8, PATTERNS[1]: 4}[c] for name, c in choices.items()
        }
        return -sum(10.0 ** int(name) * kept for name, kept in named.items())

    possible = [
        dict(zip("0123", picked, strict=True))
        for picked in itertools.product(("dense", *PATTERNS), repeat=4)
    ]
    best = min((c for c in possible if all_costs.total(c) <= 32), key=loss)
    assert found.choices == best
    assert found.cost == all_costs.total(best) <= 32
    assert found.losses[0] == loss(START)
    assert found.losses[-1] == loss(best)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.losses))
    assert {n: str(p) for n, p in found.patterns.items()} == {
        n: c for n, c in best.items() if c != "dense"
    }
    assert str(found).startswith("loss -16")


def test_layers_may_be_rounded_in_place_of_pruned() -> None:
    """1, 10, 100 and 1000 lie on the grid: rounding costs no loss here, and zeros do."""
    model, tables = stack(), weights(stack())
    tables["dense+int4"] = stack().state_dict()
    of = {"dense": 16.0, "dense+int4": 8.0, "unstructured:0.5": 8.0, "unstructured:0.75": 4.0}
    all_costs = Costs("ms", dict.fromkeys("0123", of))
    found = evolve(
        model, START, tables, all_costs, lost, BATCHES, generations=30, rounds=((1, 2), (4, 1))
    )
    assert found.cost <= all_costs.total(START)
    assert found.losses[-1] <= found.losses[0]
    assert "dense+int4" in found.choices.values()
    assert {one for one in found.by_grid if one is not None} == {sc.Int4()}
    rounded = [name for name, one in found.choices.items() if one == "dense+int4"]
    assert list(found.by_grid[sc.Int4()]) == rounded
    assert not set(rounded) & set(found.patterns)


def test_a_kind_that_loses_more_than_its_cost_says_is_passed_over() -> None:
    """Between 0.75 and rounding, in cost, lies a pattern that nothing survives."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    for layer in model:
        nn.init.ones_(layer.weight)
    tables = weights(model)
    tables["dense+int4"] = copy.deepcopy(model).state_dict()
    tables["2:4"] = {name: -tensor for name, tensor in tables["dense+int4"].items()}
    of = {"dense": 16.0, "unstructured:0.75": 4.0, "2:4": 6.0, "dense+int4": 8.0}
    start = {"1": "unstructured:0.75"}
    found = evolve(
        model,
        start,
        tables,
        Costs("ms", {"0": of, "1": of}),
        lost,
        BATCHES,
        generations=5,
        rounds=((4, 1),),
    )
    assert found.choices == dict.fromkeys("01", "dense+int4") and found.cost == 16 <= 20


def test_the_same_seed_gives_the_same_and_rounds_see_their_batches() -> None:
    model, seen = stack(), list[int]()

    def counting(model: nn.Module, batches: Sequence[Batch]) -> float:
        seen.append(len(batches))
        return lost(model, batches)

    def run() -> object:
        return evolve(
            model,
            START,
            weights(model),
            costs(),
            counting,
            BATCHES,
            generations=2,
            offspring=5,
            rounds=((1, 3), (2, 2), (4, 1)),
        )

    assert run() == run()
    once = [1] * 5 + [2] * 3 + [4] * 3  # the parent is one in the last round
    assert seen == 2 * ([4] + 2 * once)


def test_children_keep_to_the_cost() -> None:
    of = {
        "a": {"dense": 10.0, "2:4": 5.0, "1:4": 2.5},
        "b": {"dense": 100.0, "2:4": 50.0, "1:4": 25.0},
        "c": {"dense": 1.0, "2:4": 0.5, "1:4": 0.25},
    }
    all_costs, levels = Costs("bytes", of), {key: ["1:4", "2:4", "dense"] for key in "abc"}
    generator, parent = random.Random(0), dict.fromkeys("abc", "2:4")
    children = [_child(parent, levels, all_costs, 56.0, generator) for _ in range(200)]
    assert all(all_costs.total(child) <= 56 for child in children)
    assert {child["b"] for child in children} == {"1:4", "2:4"}  # dense b never fits
    # what b gives goes to the others
    assert {"a": "dense", "b": "1:4", "c": "dense"} in children
    whole = dict.fromkeys("abc", "dense")
    assert _child(whole, levels, all_costs, 111.0, generator) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_it_was(error: type[BaseException]) -> None:
    model, calls = stack(), 0
    before = copy.deepcopy(model.state_dict())

    def failing(model: nn.Module, batches: Sequence[Batch]) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            assert not all(bool(p.all()) for p in model.parameters())
            raise error
        return lost(model, batches)

    with pytest.raises(error):
        evolve(model, START, weights(model), costs(), failing, BATCHES, rounds=((4, 1),))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_a_loss_that_is_not_finite_never_survives() -> None:
    def breaking(model: nn.Module, batches: Sequence[Batch]) -> float:
        changed = any(int((p == 0).sum()) != 8 for p in model.parameters())
        return float("-inf") if changed else 1.0

    model = stack()
    found = evolve(
        model, START, weights(model), costs(), breaking, BATCHES, generations=3, rounds=((4, 1),)
    )
    assert found.choices == START


def test_evolve_errors() -> None:
    model = stack()
    tables, all_costs = weights(model), costs()
    with pytest.raises(ValueError, match=r"weights and a cost for 0 in 2:4, it has both only for"):
        evolve(model, {"0": "2:4"}, tables, all_costs, lost, BATCHES)
    with pytest.raises(ValueError, match=r"cost of every layer of the start, 9 has none"):
        evolve(model, {"9": "2:4"}, tables, all_costs, lost, BATCHES)
    with pytest.raises(ValueError, match=r"rounds of \(batches, survivors\).* at most the 4 batch"):
        evolve(model, START, tables, all_costs, lost, BATCHES)
    tables[PATTERNS[0]]["2.weight"] = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"weights of 2 of shape \(4, 4\), got \(3, 3\) for unst"):
        evolve(model, START, tables, all_costs, lost, BATCHES, rounds=((4, 1),))
