"""Algorithms that take the mask of another method and finish it: new weights, or a better mask."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct.solution import Solution
from secateur.statistics import call_with, name_of, score

# (weight, mask, gram, pattern) -> the weight on the mask, or on a better one
Finish = Callable[
    [Float[Tensor, "out in"], Bool[Tensor, "out in"], Float[Tensor, "in in"], Pattern], Solution
]


def on_mask_of(
    method: Callable[..., Any], finish: Finish, wrapper: str, at_hand: str, options: str = ""
) -> Callable[..., Solution]:
    """The algorithm that chooses a mask by a criterion or an algorithm and has it finished.

    It asks for the method's statistics and the Gram matrix; `wrapper` and `options` are for its
    name, `at_hand` for the error: what takes a mask. Notes of both are joined.
    """
    if not callable(method):
        raise ValueError(
            f"{wrapper} takes a criterion or an algorithm such as sc.wanda, got {method!r}: for a "
            f"mask at hand use secateur.reconstruct.{at_hand}"
        )
    parameters = inspect.signature(method).parameters
    chooses = "pattern" in parameters

    def algorithm(**statistics: Any) -> Solution:
        weight, gram, pattern = (statistics[key] for key in ("weight", "gram", "pattern"))
        if chooses:
            _, mask, before = call_with(method, statistics)
        else:
            mask = pattern.mask(score(method, statistics["layer"], weight, statistics))
            before = ""
        found = finish(weight, mask, gram, pattern)
        notes = dict.fromkeys([*before.split("; "), *found.note.split("; ")])
        return found._replace(note="; ".join(filter(None, notes)))

    asked = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in parameters.values()}
    asked.pop("layer_seed", None)  # made from the layer's name
    for name in ("weight", "gram", "pattern", "layer"):
        asked[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    algorithm.__name__ = f"{wrapper}({name_of(method)}{options})"
    vars(algorithm)["__signature__"] = inspect.Signature(list(asked.values()))
    return algorithm
