"""Algorithms that finish another method's mask: with new weights, or with a better mask."""

import inspect
from collections.abc import Callable
from typing import Any

from secateur.model.statistics import name_of, needed_by
from secateur.reconstruct.methods import bind
from secateur.reconstruct.solution import Solution


def on_mask_of(
    method: Callable[..., Any],
    finish: Callable[..., Solution],
    wrapper: str,
    at_hand: str,
    options: str = "",
) -> Callable[..., Solution]:
    """The algorithm that takes its mask from a criterion or an algorithm and has it finished.

    `finish` is a function `(weight, mask, statistic...)`, which may ask for `pattern` and `dtype`
    too. The algorithm asks for the statistics of both and joins their notes. `wrapper` and
    `options` make its name; `at_hand` names, in the error, the function that takes a mask directly.
    """
    if not callable(method):
        raise ValueError(
            f"{wrapper} takes a criterion or an algorithm such as sc.wanda, got {method!r}: for a "
            f"mask at hand use secateur.reconstruct.{at_hand}"
        )
    chooser = bind(method)
    wanted = inspect.signature(finish).parameters

    def algorithm(**statistics: Any) -> Solution:
        _, mask, before = chooser.solve(statistics)
        known = {**statistics, "mask": mask}
        found = finish(**{name: value for name, value in known.items() if name in wanted})
        notes = dict.fromkeys([*before.split("; "), *found.note.split("; ")])
        return found._replace(note="; ".join(filter(None, notes)))

    parameters = inspect.signature(method).parameters.values()
    asked = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in parameters}
    asked.pop("layer_seed", None)  # derived from the layer's name
    also = needed_by(finish, given=("weight", "mask", "pattern", "dtype"))
    for name in ("weight", *also, "pattern", "layer", "dtype"):
        asked[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    algorithm.__name__ = f"{wrapper}({name_of(method)}{options})"
    vars(algorithm)["__signature__"] = inspect.Signature(list(asked.values()))
    return algorithm
