"""Criteria and algorithms, bound once: what each asks for, and how it solves one layer.

A function asks for what its parameters name, so nothing has to be registered. They are read here,
once before a pass; for each layer `solve` only passes the values on.
"""

import contextlib
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from secateur.model.statistics import name_of, needed_by
from secateur.reconstruct.solution import Solution

# What every criterion or algorithm may ask for besides statistics. `memo(function, *arguments)` is
# the function's value, computed once for all layers that share an input.
CRITERION_GIVEN = ("weight", "layer_seed")
ALGORITHM_GIVEN = ("weight", "pattern", "dtype", "layer", "memo")


@dataclass(frozen=True)
class Method:
    """A criterion or an algorithm, and the statistics and gradients that it needs.

    `solve` takes the layer's `weight`, `pattern`, `dtype` and name (`layer`), the `memo`, and the
    values of `needs`, each under its name.
    """

    name: str
    needs: tuple[str, ...]
    solve: Callable[[Mapping[str, Any]], Solution]


def is_algorithm(function: Callable[..., Any]) -> bool:
    """Whether the function refits weights, which it cannot do without knowing the pattern."""
    return "pattern" in inspect.signature(function).parameters


def bind(function: Callable[..., Any]) -> Method:
    """The criterion or the algorithm as a method."""
    return bind_algorithm(function) if is_algorithm(function) else bind_criterion(function)


def bind_criterion(criterion: Callable[..., Tensor]) -> Method:
    """The method that drops what the criterion scores lowest and leaves the rest unchanged.

    Raises:
        ValueError: if it is no criterion, or asks for something that is no statistic.
    """
    _require_method(criterion)
    name = name_of(criterion)
    if is_algorithm(criterion):
        raise ValueError(
            f"{name} refits weights, prune_ changes none that it keeps: use reconstruct_"
        )
    needs = needed_by(criterion, given=CRITERION_GIVEN)
    asked = inspect.signature(criterion).parameters

    def solve(given: Mapping[str, Any]) -> Solution:
        weight = given["weight"]
        scores = criterion(**_asked(asked, given))
        mask = given["pattern"].mask(_checked(name, weight, scores))
        return Solution(weight.masked_fill(~mask, 0), mask)

    return Method(name, needs, solve)


def bind_algorithm(algorithm: Callable[..., Solution]) -> Method:
    """The algorithm as a method.

    Raises:
        ValueError: if it is no algorithm, or asks for something that is no statistic.
    """
    _require_method(algorithm)
    name = name_of(algorithm)
    if not is_algorithm(algorithm):
        raise ValueError(f"{name} only scores weights, reconstruct_ refits them: use prune_")
    needs = needed_by(algorithm, given=ALGORITHM_GIVEN)
    asked = inspect.signature(algorithm).parameters

    def solve(given: Mapping[str, Any]) -> Solution:
        solution = algorithm(**{key: value for key, value in given.items() if key in asked})
        if not isinstance(solution, Solution):
            raise ValueError(
                f"algorithm {name} needs to give a Solution, got {type(solution).__name__}"
            )
        return solution

    return Method(name, needs, solve)


def score(
    criterion: Callable[..., Tensor],
    layer: str,
    weight: Float[Tensor, "out in"],
    statistics: Mapping[str, Any],
) -> Float[Tensor, "out in"]:
    """The criterion's scores for a layer.

    Raises:
        ValueError: if they do not have the weight's shape, or hold NaN.
    """
    given = {**statistics, "weight": weight, "layer": layer}
    with naming(layer):
        scores = criterion(**_asked(inspect.signature(criterion).parameters, given))
        return _checked(name_of(criterion), weight, scores)


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Begin the message of a ValueError with the layer that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error


def _asked(asked: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values that a criterion asks for; its seed is derived from the layer's name."""
    seeded = {**given, "layer_seed": zlib.crc32(given["layer"].encode())}
    return {key: value for key, value in seeded.items() if key in asked}


def _checked(
    criterion: str, weight: Float[Tensor, "out in"], scores: Any
) -> Float[Tensor, "out in"]:
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"criterion {criterion} needs to give a tensor of scores, got {type(scores).__name__}"
        )
    if scores.shape != weight.shape or scores.isnan().any():
        raise ValueError(
            f"criterion {criterion} needs to give scores of shape {tuple(weight.shape)} without "
            f"NaN, got {tuple(scores.shape)} with {int(scores.isnan().sum())} NaN"
        )
    return scores


def _require_method(function: Callable[..., Any]) -> None:
    if not callable(function):
        raise ValueError(
            f"prune_ and reconstruct_ take functions such as sc.wanda, got {function!r}: pass the "
            "function itself"
        )
    if "method" in inspect.signature(function).parameters:
        name = name_of(function)
        raise ValueError(
            f"{name} makes an algorithm of a criterion or another algorithm: pass "
            f"sc.{name}(sc.wanda)"
        )
