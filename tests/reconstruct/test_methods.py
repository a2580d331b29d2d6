"""Binding: what a criterion or an algorithm is given, and how it is refused."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.patterns import Pattern
from secateur.reconstruct import Solution
from secateur.reconstruct.methods import bind, bind_algorithm, bind_criterion, is_algorithm, score

WEIGHT = torch.tensor([[3.0, -1.0, 2.0, 4.0]])
GIVEN = {"weight": WEIGHT, "pattern": sc.NM(2, 4), "dtype": torch.float32, "layer": "fc"}


def test_a_criterion_drops_what_it_scores_lowest_and_moves_nothing() -> None:
    method = bind_criterion(sc.wanda)
    assert (method.name, method.needs) == ("wanda", ("input_norm",))
    norms = torch.tensor([1.0, 9.0, 1.0, 1.0])
    found = method.solve({**GIVEN, "input_norm": norms, "gram": None})
    assert found.weight.tolist() == [[0.0, -1.0, 0.0, 4.0]]
    assert found.mask.tolist() == [[False, True, False, True]]


def test_only_what_is_named_is_given() -> None:
    seen: dict[str, Any] = {}

    def algorithm(weight: Tensor, pattern: Pattern, gram: Tensor, power: float = 2.0) -> Solution:
        seen.update(gram=gram, power=power)
        return Solution(weight, weight != 0)

    method = bind_algorithm(functools.partial(algorithm, power=3.0))
    assert (method.name, method.needs) == ("algorithm(power=3.0)", ("gram",))
    method.solve({**GIVEN, "gram": "G", "held_gram": "H", "memo": None})
    assert seen == {"gram": "G", "power": 3.0}


def test_the_seed_follows_from_the_layers_name() -> None:
    one, same, other = (score(sc.criteria.random, name, WEIGHT, {}) for name in ("a", "a", "b"))
    assert torch.equal(one, same) and not torch.equal(one, other)
    chosen = bind(sc.criteria.random).solve({**GIVEN, "layer": "a"})
    assert torch.equal(chosen.mask, sc.NM(2, 4).mask(one))


def test_scores_of_another_shape_or_nan_name_the_layer() -> None:
    for wrong in (torch.zeros(4), torch.full((1, 4), torch.nan)):

        def broken(weight: Tensor, wrong: Tensor = wrong) -> Tensor:
            return wrong

        with pytest.raises(ValueError, match=r"layer fc: criterion broken needs to give scores of"):
            score(broken, "fc", WEIGHT, {})
        with pytest.raises(ValueError, match=r"^criterion broken needs to give scores of shape"):
            bind(broken).solve(GIVEN)


def test_what_is_no_method_is_refused_with_the_one_that_is(unchecked: None) -> None:
    assert is_algorithm(sc.alps) and not is_algorithm(sc.ria)
    for function, bound, reason in (
        (sc.sparsegpt, bind_criterion, "sparsegpt refits weights, prune_ changes none"),
        (sc.wanda, bind_algorithm, "wanda only scores weights, reconstruct_ refits them"),
        (sc.refit, bind, r"refit makes an algorithm of .*: pass sc\.refit\(sc\.wanda\)"),
        (sc.swap, bind_criterion, r"pass sc\.swap\(sc\.wanda\)"),
        ("wanda", bind_algorithm, "take functions such as sc.wanda, got 'wanda'"),
    ):
        with pytest.raises(ValueError, match=reason):
            bound(function)  # type: ignore[operator]
