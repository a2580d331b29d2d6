"""Sensitivity: how much the model loses when a single layer is pruned, layer by layer."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.allocation.choices import Choice, as_choice
from secateur.allocation.progress import Progress, write_json
from secateur.core.disk.checkpoint import digest
from secateur.core.disk.data_files import first_fault, read_json
from secateur.core.progress import bar
from secateur.core.shown import Shown, Table
from secateur.core.weights import require_ordinary
from secateur.core.wrappers import unwrapped
from secateur.criteria import magnitude
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list
from secateur.model.layers import Selector
from secateur.model.outputs import eval_mode
from secateur.model.statistics import name_of
from secateur.patterns import Pattern
from secateur.reconstruct.scores import needs_of, scores

SENSITIVITY_VERSION = 1


@dataclass(frozen=True)
class Sensitivity(Shown):
    """The loss of the dense model, and by how much pruning a single layer raises it.

    `increase[layer][pattern]` is None where the layer cannot have the pattern; `why_not` says why.
    Increases of several layers pruned together add up only roughly.
    """

    criterion: str
    loss: float
    patterns: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    increase: Mapping[str, Mapping[str, float | None]]
    why_not: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "out", "in", *self.patterns)

    def rows(self) -> list[tuple[str, ...]]:
        def cell(increase: float | None) -> str:
            return "-" if increase is None else f"{increase:+.4f}"

        return [
            (name, *map(str, self.shapes[name]), *(cell(found[p]) for p in self.patterns))
            for name, found in self.increase.items()
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        reasons = [
            f"\n  {name}, {pattern}: {reason}"
            for name, found in self.why_not.items()
            for pattern, reason in found.items()
        ]
        return (
            Table(self.columns, self.rows()),
            f"increase of the loss over the dense model's {self.loss:.4f}, one layer pruned by "
            f"{self.criterion}" + ("\nnot measured:" + "".join(reasons) if reasons else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """The sensitivity as plain data, as in the file."""
        return {
            "version": SENSITIVITY_VERSION,
            "criterion": self.criterion,
            "loss": self.loss,
            "patterns": list(self.patterns),
            "layers": {
                name: {
                    "shape": list(self.shapes[name]),
                    "increase": dict(found),
                    "why_not": dict(self.why_not.get(name, {})),
                }
                for name, found in self.increase.items()
            },
            "skipped": dict(self.skipped),
        }

    def write(self, path: str | Path) -> None:
        """Write the sensitivity as JSON, which `read_sensitivity` reads back."""
        write_json(Path(path), self.to_dict())


@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    patterns: Sequence[str | Pattern],
    loss: Callable[[nn.Module], float],
    *,
    layers: Sequence[Selector] | None = None,
    ignore: Iterable[Selector] = (),
    criterion: Callable[..., Tensor] = magnitude,
    batches: Iterable[Batch] | None = None,
    checkpoint: str | Path | None = None,
) -> Sensitivity:
    """By how much `loss(model)` rises when one layer at a time is pruned to each of the patterns.

    `"2:4+int4"` also rounds what is kept to the nearest of a grid, `"dense+int4"` rounds alone.

    Statistics, where the criterion needs any, are gathered once from `batches` on the dense model.
    The model runs in eval mode without gradients. With `checkpoint`, a file, what has been
    measured is stored there, and the same call continues where an interrupted one stopped; patterns
    may be added later.

    Cost: layers x patterns + 1 evaluations of the loss; memory for a copy of one layer's weight.
    Raises:
        ValueError: if a pattern or selector is wrong, data is needed and missing, the loss is not
            finite, or the checkpoint belongs to another call. The model is left as it was, bit for
            bit, whether the call returns or raises, also by Ctrl-C.
    """
    chosen = _parsed_patterns(patterns)
    needs = needs_of(criterion, batches)
    selection = _layers.select(model, layers, ignore)
    model = unwrapped(model)
    require_ordinary(selection.layers)
    shapes = {name: _shape(module) for name, module in selection.layers.items()}
    choices = {name: _choices_for(module, chosen) for name, module in selection.layers.items()}
    why_not = {name: _misfits(choices[name], one) for name, one in selection.layers.items()}
    with eval_mode(model), torch.no_grad():
        listed = as_list(batches) if needs and batches is not None else []
        progress = Progress(checkpoint, _fingerprint(selection.layers, criterion, listed))
        dense = progress.dense_loss(_measured(loss, model, "the dense model"))
        todo = {
            name: [p for p in chosen if p not in why_not[name] and not progress.has(name, p)]
            for name in shapes
        }
        missing = {name: selection.layers[name] for name in shapes if todo[name]}
        shown = bar("sensitivity", sum(map(len, todo.values())))
        with shown, contextlib.closing(scores(model, missing, criterion, listed)) as scored:
            for name, found in scored:
                for key in todo[name]:
                    with _pruned(missing[name], choices[name][key], found):
                        increase = _measured(loss, model, f"{name} pruned to {key}") - dense
                    progress.add(name, key, increase)
                    shown.update()
    return Sensitivity(
        name_of(criterion),
        dense,
        tuple(chosen),
        shapes,
        {name: {key: progress.get(name, key) for key in chosen} for name in shapes},
        {name: reasons for name, reasons in why_not.items() if reasons},
        selection.skipped,
    )


def read_sensitivity(path: str | Path) -> Sensitivity:
    """The sensitivity that `Sensitivity.write` wrote.

    Raises:
        ValueError: if the file is no sensitivity, with the place.
    """
    from pydantic import BaseModel, ConfigDict, ValidationError  # costs 0.1 s, and reading is rare

    class Layer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        shape: tuple[int, int]
        increase: dict[str, float | None]
        why_not: dict[str, str] = {}

    class File(BaseModel):
        model_config = ConfigDict(extra="forbid")
        version: int
        criterion: str
        loss: float
        patterns: list[str]
        layers: dict[str, Layer]
        skipped: dict[str, str] = {}

    path = Path(path)
    try:
        file = File.model_validate(read_json(path))
    except ValidationError as error:
        raise ValueError(f"{path} is no sensitivity: {first_fault(error)}") from None
    if file.version != SENSITIVITY_VERSION:
        raise ValueError(
            f"{path} is a sensitivity of version {file.version}, this library reads "
            f"{SENSITIVITY_VERSION}: measure it again"
        )
    for name, layer in file.layers.items():
        if set(layer.increase) != set(file.patterns):
            raise ValueError(f"{path} is no sensitivity: at layers.{name}: not all its patterns")
    return Sensitivity(
        file.criterion,
        file.loss,
        tuple(file.patterns),
        {name: layer.shape for name, layer in file.layers.items()},
        {name: layer.increase for name, layer in file.layers.items()},
        {name: layer.why_not for name, layer in file.layers.items() if layer.why_not},
        file.skipped,
    )


# --- one layer -----------------------------------------------------------------------------------


def _parsed_patterns(patterns: Sequence[str | Pattern]) -> dict[str, Choice]:
    if isinstance(patterns, str) or not patterns:
        raise ValueError(
            f"sensitivity needs a list of patterns, got {patterns!r}: such as ['2:4', "
            "'unstructured:0.5']"
        )
    return {choice.text: choice for choice in map(as_choice, patterns)}


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = _layers.matrix(module).shape
    return rows, columns


def _choices_for(module: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    return {
        key: choice
        if choice.pattern is None
        else replace(choice, pattern=_layers.pattern_for(module, choice.pattern))
        for key, choice in choices.items()
    }


def _misfits(choices: Mapping[str, Choice], module: nn.Module) -> dict[str, str]:
    """The choices that a weight of this shape and dtype cannot have, each with the reason."""
    shape, dtype = _shape(module), _layers.weight_of(module).dtype
    reasons = {key: choice.why_not(shape, dtype) for key, choice in choices.items()}
    return {key: why for key, why in reasons.items() if why is not None}


@contextlib.contextmanager
def _pruned(module: nn.Module, choice: Choice, found: Float[Tensor, "out in"]) -> Generator[None]:
    """Prune the weight by these scores, and round; put it back at the end, whatever happens."""
    weight = _layers.weight_of(module)
    before = weight.detach().clone()
    try:
        pruned = choice.applied(_layers.matrix(module), choice.mask(found))
        weight.copy_(_layers.from_matrix(module, pruned))
        yield
    finally:
        weight.copy_(before)


def _measured(loss: Callable[[nn.Module], float], model: nn.Module, what: str) -> float:
    value = float(loss(model))
    if not math.isfinite(value):
        raise ValueError(
            f"sensitivity needs a finite loss, got {value} for {what}: use a bounded loss, such as "
            "secateur.model.evaluate.compare(...).kl, or ignore the layer"
        )
    return value


def _fingerprint(
    layers: Mapping[str, nn.Module], criterion: Callable[..., Tensor], batches: Sequence[Batch]
) -> dict[str, Any]:
    """What identifies a call; the loss and its data are recognised by the dense loss instead."""
    return {
        "criterion": name_of(criterion),
        "layers": list(layers),
        "weights": digest([_layers.matrix(module) for module in layers.values()]),
        "batches": digest(batches),
    }
