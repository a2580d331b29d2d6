"""The plan: which layer gets which pattern, decided and shown before a weight is touched."""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from secateur.core.coverage import coverage, is_slight, left_alone
from secateur.core.disk.atomic import write_whole
from secateur.core.disk.data_files import first_fault, read_yaml
from secateur.core.shown import Shown, Table
from secateur.core.weights import require_module, why_not_ordinary
from secateur.core.wrappers import base_name, unwrapped
from secateur.model import layers as _layers
from secateur.model.layers import Selector
from secateur.model.piece import parameter_name
from secateur.patterns import Pattern, as_pattern, parse

PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan(Shown):
    """Each layer's pattern and `[out, in]` shape by name, and why other layers were skipped.

    `left` accounts for all other parameters of the model: how many are left dense, by the reason.
    """

    layers: Mapping[str, Pattern]
    shapes: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, str]
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """The number of weights in the planned layers."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def coverage(self) -> str:
        """One sentence: the share of the whole model that is planned, and why no more is."""
        return coverage("planned", self.weights, self.left)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "out", "in", "pattern", "sparsity")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                *map(str, self.shapes[name]),
                str(pattern),
                f"{_sparsity(pattern, self.shapes[name]):.1%}",
            )
            for name, pattern in self.layers.items()
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        patterns = ", ".join(
            f"{p}: {n}" for p, n in Counter(map(str, self.layers.values())).items()
        )
        skipped = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped.items())
        return (
            self.coverage,
            Table(self.columns, self.rows()),
            f"{len(self.layers)} layers ({patterns}), {self.weights:,} weights"
            + (f"\nskipped:{skipped}" if skipped else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; `plan_from_dict` reads it back."""
        return {
            "version": PLAN_VERSION,
            "layers": {
                name: {"pattern": str(pattern), "shape": list(self.shapes[name])}
                for name, pattern in self.layers.items()
            },
            "skipped": dict(self.skipped),
            "left": dict(self.left),
        }

    def write(self, path: str | Path) -> None:
        """Write the plan as YAML, or as JSON if the name ends in .json."""
        path = Path(path)
        data = self.to_dict()
        if path.suffix == ".json":
            write_whole(path, json.dumps(data, indent=2))
        else:
            import yaml  # plans are rarely written, and importing it costs 15 ms

            write_whole(path, yaml.safe_dump(data, sort_keys=False))


def plan(
    model: nn.Module,
    pattern: Pattern | str | Mapping[Selector, Pattern | str],
    *,
    layers: Selector | Sequence[Selector] | None = None,
    ignore: Selector | Iterable[Selector] = (),
) -> Plan:
    """The plan of which layers get which pattern; printing it shows a table. Nothing is changed.

    `pattern` is one pattern for all (`"2:4"`, `NM(2, 4)`), or a mapping from selectors to patterns
    in which the first match wins. `layers` and `ignore` take names, globs, `re:` expressions,
    module types and callables. The default is every Linear, Conv2d, Conv1D of GPT-2, expert, and
    matrix of attention and recurrent modules, except tied weights, adapters and the output head;
    layers whose shape cannot have the pattern, such as a CNN's first convolution with its three
    input channels, are then skipped with the reason. A warning says so if the plan has under 1 % of
    the model's matrices.

    Raises:
        ValueError: if a selector matches nothing, a selected layer's shape cannot have its pattern,
            or no layer's shape can; all such layers are listed.
    """
    if isinstance(pattern, Mapping):
        if layers is not None:
            raise ValueError("plan takes either a mapping of selectors to patterns, or layers=")
        selectors: Selector | Sequence[Selector] | None = list(pattern)
        patterns = [as_pattern(p) for p in pattern.values()]
    else:
        selectors = layers
        patterns = [as_pattern(pattern)]
    selection = _layers.select(model, selectors, ignore)
    one = len(patterns) == 1
    chosen = {
        name: _layers.pattern_for(selection.layers[name], patterns[0 if one else index])
        for name, index in selection.matched_by.items()
    }
    shapes = {name: _shape(name, module) for name, module in selection.layers.items()}
    misfits = _misfits(chosen, shapes)
    if misfits and (selectors is not None or len(misfits) == len(chosen)):
        raise ValueError(_cannot_have(misfits, len(chosen)))
    skipped = {**selection.skipped, **misfits}
    fitting = {name: shape for name, shape in shapes.items() if name not in misfits}
    covered: Counter[str] = Counter()
    for name, (rows, columns) in fitting.items():
        covered[parameter_name(name, selection.layers[name])] += rows * columns
    left = left_alone(unwrapped(model), covered, skipped)
    made = Plan({name: chosen[name] for name in fitting}, fitting, skipped, left)
    if selectors is None and is_slight(made.weights, left):
        warnings.warn(made.coverage, stacklevel=2)
    return made


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML or JSON file.

    Raises:
        ValueError: if it is not a plan; the message names the file and the place.
    """
    path = Path(path)
    return plan_from_dict(read_yaml(path), str(path))


def plan_from_dict(data: object, where: str) -> Plan:
    """The plan in the output of `Plan.to_dict`; `where` names its origin in errors."""
    # Imported here because plans are rarely read, and importing pydantic costs 0.1 s.
    from pydantic import BaseModel, ConfigDict, ValidationError

    class Entry(BaseModel):
        model_config = ConfigDict(extra="forbid")
        pattern: str
        shape: tuple[int, int]

    class File(BaseModel):
        model_config = ConfigDict(extra="forbid")
        version: int
        layers: dict[str, Entry]
        skipped: dict[str, str] = {}
        left: dict[str, int] = {}

    try:
        file = File.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where} is not a plan: {first_fault(error)}") from None
    if file.version != PLAN_VERSION:
        raise ValueError(
            f"{where} is a plan of version {file.version}, this library reads {PLAN_VERSION}: "
            "write the plan again"
        )
    try:
        patterns = {name: parse(entry.pattern) for name, entry in file.layers.items()}
    except ValueError as error:
        raise ValueError(f"{where} is not a plan: {error}") from None
    shapes = {name: entry.shape for name, entry in file.layers.items()}
    return Plan(patterns, shapes, file.skipped, file.left)


def as_plan(model: nn.Module, given: Plan | Pattern | str) -> Plan:
    """The plan itself, or a plan with this pattern for every layer that is pruned by default."""
    return given if isinstance(given, Plan) else plan(model, given)


def match(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The plan's layers in the model, by the plan's names and in the model's order.

    A plan that was made without PEFT's adapters holds for the model with them.

    Raises:
        ValueError: if the plan was made for another model: layers are missing or have another
            shape, or convolutions have other input channels.
    """
    require_module(model)
    model = unwrapped(model)
    modules = _named_as_in(plan, model)
    missing = [name for name in plan.layers if name not in modules]
    other = [
        f"{name} is {_shape(name, modules[name])}, planned {tuple(shape)}"
        for name, shape in plan.shapes.items()
        if name in modules and _shape(name, modules[name]) != tuple(shape)
    ] or [
        f"{name} takes {taken}, planned {pattern}"
        for name, pattern in plan.layers.items()
        if name in modules and (taken := _layers.pattern_for(modules[name], pattern)) != pattern
    ]
    if missing or other:
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} of its {len(plan.layers)} layers are missing, first {missing[0]!r}"
            )
        if other:
            parts.append(f"{len(other)} have another shape, first {other[0]}")
        raise ValueError(
            f"the plan was made for another model than this {type(model).__name__}: "
            f"{'; '.join(parts)}: make a plan for this model"
        )
    return {name: module for name, module in modules.items() if name in plan.layers}


def _named_as_in(plan: Plan, model: nn.Module) -> dict[str, nn.Module]:
    """The model's layers, those under adapters without PEFT's names if the plan names them so."""
    named: dict[str, nn.Module] = {}
    for name, module in _layers.layers_of(model).items():
        plain = None if name in plan.layers else base_name(model, name)
        named[plain if plain is not None and plain in plan.layers else name] = module
    return named


def _shape(name: str, module: nn.Module) -> tuple[int, int]:
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise ValueError(f"{name}.weight {why_not_ordinary(module)}")
    rows, columns = _layers.matrix(module).shape
    return rows, columns


def _sparsity(pattern: Pattern, shape: tuple[int, int]) -> float:
    """The pattern's sparsity at this shape: N:M has less where m does not divide the width."""
    zeros = sum((stop - start) * part.sparsity for start, stop, part in pattern.parts(shape))
    return zeros / shape[1]


def _misfits(
    patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """The layers whose shape cannot have their pattern, and why."""
    return {
        name: reason
        for name, pattern in patterns.items()
        if (reason := pattern.why_not(shapes[name])) is not None
    }


def _cannot_have(misfits: Mapping[str, str], planned: int) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in misfits.items())
    return (
        f"{len(misfits)} of {planned} layers cannot have their pattern: {listed}. Ignore them, "
        "choose another pattern, or for N:M write '2:4@dense-remainder' to leave the last columns "
        "dense, '2:4@pad-remainder' to count them as a group filled up with zeros."
    )
