"""Methods by name: what `secateur.criteria` and `secateur.reconstruct` export, or a file's own."""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from torch import nn

from secateur import criteria, reconstruct
from secateur.cli.own_methods import function_in, names_file
from secateur.core.disk.data_files import parse_yaml
from secateur.model.blocks import Batch
from secateur.model.plan import Plan
from secateur.model.statistics import STATISTICS, needed_by
from secateur.patterns.grids import Grid, parse_grid
from secateur.prune.verbs import PruneReport, prune_, reconstruct_
from secateur.reconstruct.methods import ALGORITHM_GIVEN, CRITERION_GIVEN, is_algorithm


def criteria_by_name() -> dict[str, Callable[..., Any]]:
    """The functions that `secateur.criteria` exports: each scores weights."""
    return _exported(criteria)


def algorithms_by_name() -> dict[str, Callable[..., Any]]:
    """The functions of `secateur.reconstruct` that choose a mask and refit the kept weights."""
    found = {name: inspect.signature(f) for name, f in _exported(reconstruct).items()}
    return {
        name: getattr(reconstruct, name)
        for name, asks in found.items()
        if asks.return_annotation is reconstruct.Solution
        and "pattern" in asks.parameters
        and "mask" not in asks.parameters
    }


def presets_by_name() -> dict[str, reconstruct.Blockwise]:
    """The methods that `secateur.reconstruct` exports with their options chosen."""
    exported = {name: vars(reconstruct)[name] for name in reconstruct.__all__}
    return {n: thing for n, thing in exported.items() if isinstance(thing, reconstruct.Blockwise)}


def method_help() -> str:
    """All methods in one text."""
    return (
        f"Zeros only, kept weights as they are: {', '.join(criteria_by_name())}. "
        f"Kept weights refitted: {', '.join(algorithms_by_name())}, and 'refit(METHOD)' with the "
        "mask of any of these. 'swap(METHOD)' betters a mask and moves no weight, "
        "'blockwise(METHOD)' trains the kept weights of each half-block together, 'best' is "
        "'blockwise(alps)', and 'thorough' trains those of the whole model after it. With "
        "--trust-code, FILE.py:FUNCTION is your own, also for METHOD."
    )


@dataclass(frozen=True)
class ChosenMethod:
    """A criterion or an algorithm with its options fixed, and the statistics that it needs."""

    name: str
    function: Any  # a function or a `Blockwise`
    refits: bool
    needs: tuple[str, ...]

    def __call__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Sequence[Batch] | None,
        *,
        keep_zeros: bool,
        offload: bool,
        checkpoint: Path | None,
    ) -> PruneReport:
        """Prune the model by this method."""
        how: dict[str, Any] = {
            "keep_zeros": keep_zeros,
            "offload": offload,
            "checkpoint": checkpoint,
        }
        if self.refits:
            # Data was asked for before, unless the method needs none.
            return reconstruct_(model, plan, self.function, batches or (), **how)
        return prune_(model, plan, self.function, batches, **how)


def find_method(
    name: str, options: Sequence[str] = (), *, trust_code: bool = False
) -> ChosenMethod:
    """The method of that name with options such as `damping=0.1`; or a function in a file.

    Raises:
        ValueError: if there is no such method or option, with the closest names; if it is in a file
            whose code is not trusted, or as `function_in`.
    """
    if inner := re.fullmatch(r"(refit|swap|blockwise)\((.+)\)", name):
        wrappers = reconstruct.refit, reconstruct.swap, reconstruct.blockwise
        wrapper: Callable[..., Any] = {w.__name__: w for w in wrappers}[inner[1]]
        algorithm = wrapper(
            find_method(inner[2], trust_code=trust_code).function,
            **_options(name, wrapper, options),
        )
        each = algorithm.method if isinstance(algorithm, reconstruct.Blockwise) else algorithm
        return ChosenMethod(name, algorithm, True, needed_by(each, given=ALGORITHM_GIVEN))
    presets = presets_by_name()
    if preset := presets.get(name):
        if fixed := _options(name, _of_preset, options):
            preset = replace(preset, **fixed)
        return ChosenMethod(name, preset, True, needed_by(preset.method, given=ALGORITHM_GIVEN))
    if names_file(name):
        own = function_in(name, trust_code)
        return _chosen(name, own, is_algorithm(own), options)
    algorithms = algorithms_by_name()
    known = {**criteria_by_name(), **algorithms}
    if name not in known:
        names = [*known, *presets]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown method {name!r}: {hint}Methods are {', '.join(names)}")
    return _chosen(name, known[name], name in algorithms, options)


def _chosen(
    name: str, function: Callable[..., Any], refits: bool, options: Sequence[str]
) -> ChosenMethod:
    """The criterion or the algorithm with its options fixed."""
    given = ALGORITHM_GIVEN if refits else CRITERION_GIVEN
    needs = needed_by(function, given=given)
    fixed = _options(name, function, options)
    return ChosenMethod(name, partial(function, **fixed) if fixed else function, refits, needs)


def _of_preset(*, grid: Grid | None = None) -> None:
    """The options of a preset."""


def find_criterion(name: str, *, trust_code: bool = False) -> ChosenMethod:
    """The criterion of that name, or the one in a file.

    Raises:
        ValueError: if it is unknown, or an algorithm, which also moves weights; as `find_method`.
    """
    known = criteria_by_name()
    if names_file(name) and not (own := find_method(name, trust_code=trust_code)).refits:
        return own
    if name not in known:
        refits = name in algorithms_by_name() or names_file(name)
        kind = "refits the kept weights" if refits else "is unknown"
        raise ValueError(f"this needs a criterion, {name!r} {kind}: use {', '.join(known)}")
    return find_method(name)


def _exported(module: ModuleType) -> dict[str, Callable[..., Any]]:
    found = {name: vars(module)[name] for name in vars(module)["__all__"]}
    return {name: thing for name, thing in found.items() if inspect.isfunction(thing)}


def _options(name: str, function: Callable[..., Any], options: Sequence[str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    given = (*ALGORITHM_GIVEN, *STATISTICS)
    defaults = {
        p.name: (p.default, float if float in get_args(p.annotation) else type(p.default))
        for p in parameters
        if p.default is not p.empty and p.name not in given
    }
    found: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in defaults:
            has = ", ".join(f"{k}={v}" for k, (v, _) in defaults.items()) or "none"
            raise ValueError(f"{name} has no option {option!r}: write NAME=VALUE, it has {has}")
        default, kind = defaults[key]
        if key == "grid":
            found[key] = parse_grid(value)
            continue
        read = parse_yaml(value, f"--option {option}")
        if kind is float and isinstance(read, int):
            read = float(read)
        if kind is not type(None) and type(read) is not kind:
            raise ValueError(
                f"{name} needs a {kind.__name__} for {key}, got {value!r}: it is {default}"
            )
        found[key] = read
    return found
