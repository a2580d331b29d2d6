"""What layers cost in each pattern, for a budget: parameters, bytes or measured milliseconds."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.accelerate.candidates import DENSE
from secateur.accelerate.layer_report import LayerReport
from secateur.accelerate.verb import DEFAULT_FORMATS, accelerate_
from secateur.allocation import DENSE_CHOICE, Allocation, Costs, Sensitivity, allocate
from secateur.allocation.budget import figure, front_of
from secateur.allocation.choices import parse_choice
from secateur.core.conv1d import is_conv1d
from secateur.formats import quantised
from secateur.formats.bitmap import codes
from secateur.formats.contract import Format
from secateur.formats.format import parse_format
from secateur.formats.kernels.timing import compare, copies_for
from secateur.formats.pack import is_linear, named_linears
from secateur.formats.quantised import Quantised
from secateur.model.layers import layers_of, matrix
from secateur.model.piece import is_expert

BYTES = "bytes"

# The formats that may store a weight in fewer bytes, fast or not.
SMALL_FORMATS = (*DEFAULT_FORMATS, "bitmap")

TRIES = 5  # allocations that `allocate_milliseconds` measures as a whole
NEAR = 0.98  # share of the budget from which another try is not worth its time
MARGIN = 1.01  # added to what was too slow, so that at least one layer changes


def parameters(sensitivity: Sensitivity) -> Costs:
    """The exact number of nonzeros of each sensed layer in each pattern, and of the dense layer."""
    kept: dict[tuple[tuple[int, int], str], float] = {}

    def counted(shape: tuple[int, int], choice: str) -> float:
        if (shape, choice) not in kept:
            kept[shape, choice] = float(
                _pruned(
                    torch.ones(shape, dtype=torch.float32, device="cpu"), choice
                ).count_nonzero()
            )
        return kept[shape, choice]

    return Costs(
        "parameters",
        {
            name: {one: counted(shape, one) for one in _choices(sensitivity, name)}
            for name, shape in sensitivity.shapes.items()
        },
    )


def nbytes(
    model: nn.Module, sensitivity: Sensitivity, formats: Sequence[str | Format] = SMALL_FORMATS
) -> Costs:
    """The bytes of each sensed layer's weight in each pattern, in the smallest of the formats.

    Dense storage counts where it is smaller. Formats that round, such as `"semi24_int4"`, are tried
    only if they are named; a choice on a grid (`2:4+int4`) is tried in the formats with that grid.

    What no format packs, such as a convolution, costs its bytes dense.

    Cost: packs a pruned copy of one layer of each shape in each pattern and format.
    Raises:
        ValueError: if the model has no such layer, or a format is unknown.
    """
    for format in formats:
        parse_format(format)

    def stored(linear: nn.Linear, choices: Sequence[str]) -> list[float]:
        weights = {one: _pruned(linear.weight, one) for one in choices}
        return [
            float(min([w.nbytes, *_packed_bytes(w, _formats_of(one, formats) or ())]))
            for one, w in weights.items()
        ]

    def kept(module: nn.Module) -> float:
        return float(matrix(module).nbytes)

    return _per_layer(BYTES, model, sensitivity, stored, kept)


def milliseconds(
    model: nn.Module,
    sensitivity: Sensitivity,
    tokens: Sequence[int],
    formats: Sequence[str | Format] | None = None,
    *,
    remeasure: bool = False,
) -> Costs:
    """The milliseconds of one call of each sensed layer, summed over the numbers of tokens.

    Measured on the model's device, as `accelerate_` measures and with what it remembers. A layer's
    time in a pattern is how long it takes as `accelerate_(model, tokens, formats)` would leave it,
    which is dense where nothing is faster. So a plan within a budget takes that time once it is
    accelerated. A choice on a grid (`2:4+int4`) is tried in the formats with that grid.

    What no format packs, such as a convolution, is not counted, nor are experts, whose time depends
    on how many tokens choose them.

    Cost: `accelerate_` on one layer of each shape in each pattern, and copies of these layers.
    Raises:
        ValueError: as `accelerate_`; if the model has no such layer, or no format can store a layer
            in any pattern, so that there is nothing to compare.
    """

    def timed(linear: nn.Linear, choices: Sequence[str]) -> list[float]:
        patterns = [one for one in choices if one != DENSE_CHOICE]
        reports = _accelerated(linear, patterns, tokens, formats, remeasure=remeasure)
        # Dense is measured beside every pattern; one figure for all, so that noise decides nothing.
        dense = [_time(one, dense=True) for one in reports.values() if one.measured]
        if not dense:
            raise ValueError(
                f"milliseconds needs a pattern that a format can store, {linear} has none: "
                f"{reports[patterns[-1]].reason}: measure others, such as 2:4"
            )
        times = {
            one: median(dense) if report.format == DENSE else _time(report, dense=False)
            for one, report in reports.items()
        }
        return [times.get(one, median(dense)) for one in choices]

    return _per_layer("ms", model, sensitivity, timed, lambda _: 0.0)


def allocate_milliseconds(
    model: nn.Module,
    sensitivity: Sensitivity,
    budget: float,
    tokens: Sequence[int],
    formats: Sequence[str | Format] | None = None,
    *,
    dense: float | None = None,
    remeasure: bool = False,
) -> Allocation:
    """The allocation that takes at most `budget` milliseconds with its layers measured together.

    Layers run one after another do not take the sum of their separate `milliseconds`: on an H200 up
    to 8 % more (probably because similar kernels overlap at their ends, and clocks drop with
    power). So the allocation is measured as a whole, the table is scaled by what it took per
    millisecond of the sum, and the next one is allocated by the scaled table, a few times. The
    costs that it prints are scaled too, except that the chosen point has its measured cost. `dense`
    is `dense_milliseconds`, for a budget that is a share of it; without it, it is measured.

    Cost: `milliseconds`, and in each try a copy of some layers, 256 MB of each kind.
    Raises:
        ValueError: as `milliseconds` and `allocate`; if no allocation that was tried is within the
            budget.
    """
    table = milliseconds(model, sensitivity, tokens, formats, remeasure=remeasure)
    linears = _packable(model, sensitivity)
    dense = dense_milliseconds(model, sensitivity, tokens) if dense is None else dense
    scale, fastest = 1.0, dense
    kept: Allocation | None = None
    seen = list[Mapping[str, str]]()
    for _ in range(TRIES):
        try:
            found = allocate(sensitivity, _scaled(table, scale), budget)
        except ValueError:
            if not seen:
                raise
            break
        if found.best.choices in seen:
            break
        seen.append(found.best.choices)
        took = _milliseconds_together(linears, found.best.choices, tokens, formats)
        fastest = min(fastest, took)
        if took <= budget and (kept is None or found.best.increase < kept.best.increase):
            best = replace(found.best, cost=took)
            others = [point for point in found.front if point is not found.best]
            kept = replace(found, best=best, dense=dense, front=front_of([best, *others]))
        if NEAR * budget <= took <= budget:
            break
        scale *= took / found.best.cost * (MARGIN if took > budget else 1)
    if kept is None:
        raise ValueError(
            f"no choice of these patterns was measured to take {figure(budget)} ms at most: the "
            f"least of {len(seen)} tried is {figure(fastest)}, dense is {figure(dense)}: raise the "
            "budget, or measure sparser patterns"
        )
    return kept


def dense_milliseconds(model: nn.Module, sensitivity: Sensitivity, tokens: Sequence[int]) -> float:
    """The milliseconds of one call of all sensed layers, dense, summed over the numbers of tokens.

    They are called in order, so that a share of it is a budget for `allocate_milliseconds`.

    Raises:
        ValueError: if the model has no such layer, or none that a format packs.
    """
    linears = _packable(model, sensitivity)
    return _milliseconds_together(linears, dict.fromkeys(linears, DENSE_CHOICE), tokens, None)


@torch.no_grad()
def _milliseconds_together(
    linears: Mapping[str, nn.Linear],
    choices: Mapping[str, str],
    tokens: Sequence[int],
    formats: Sequence[str | Format] | None,
) -> float:
    """Milliseconds of one call of all layers, in order, summed over the numbers of tokens.

    Similar layers share copies, as many as it takes for no cache to hold them.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, linear in linears.items():
        alike.setdefault((*_likeness(linear), choices[name]), []).append(name)
    called: dict[str, nn.Module] = {}
    for names in alike.values():
        linear, choice = linears[names[0]], choices[names[0]]
        copies = nn.ModuleList(
            _copy(linear, choice) for _ in range(copies_for(linear.weight.nbytes, len(names)))
        )
        if choice != DENSE_CHOICE:
            accelerate_(copies, tokens, _formats_of(choice, formats))
        called |= {name: copies[i % len(copies)] for i, name in enumerate(names)}
    weights = {linear.in_features: linear.weight for linear in linears.values()}
    generator = torch.Generator().manual_seed(0)
    microseconds = 0.0
    for count in tokens:
        x = {
            width: torch.randn(
                count, width, generator=generator, dtype=torch.float32, device="cpu"
            ).to(weight)
            for width, weight in weights.items()
        }

        def call(x: Mapping[int, Tensor] = x) -> list[Tensor]:
            return [called[name](x[linear.in_features]) for name, linear in linears.items()]

        device = next(iter(weights.values())).device
        microseconds += compare({"layers": [call]}, device)["layers"].median_us
    return microseconds / 1e3


def _accelerated(
    linear: nn.Linear,
    choices: Sequence[str],
    tokens: Sequence[int],
    formats: Sequence[str | Format] | None,
    *,
    remeasure: bool,
) -> dict[str, LayerReport]:
    """What `accelerate_` makes of the layer in each choice, those of one grid together."""
    alike: dict[tuple[str | Format, ...] | None, list[str]] = {}
    for one in choices:
        tried = _formats_of(one, formats)
        alike.setdefault(None if tried is None else tuple(tried), []).append(one)
    reports: dict[str, LayerReport] = {}
    for tried, names in alike.items():
        copies = nn.ModuleList(_copy(linear, one) for one in names)
        found = accelerate_(copies, tokens, tried, remeasure=remeasure).layers
        reports |= dict(zip(names, found, strict=True))
    return {one: reports[one] for one in choices}


def _formats_of(
    choice: str, formats: Sequence[str | Format] | None
) -> Sequence[str | Format] | None:
    """The formats to try for a choice: those given, and of one on a grid all that round to it."""
    grid = parse_choice(choice).grid
    if grid is None:
        return formats
    kept = [one for one in quantised.FORMATS if one.grid == grid and not one.rounds_inputs]
    return [*kept, *(one for one in codes.FORMATS if one.grid == grid), Quantised(grid)]


def _scaled(table: Costs, scale: float) -> Costs:
    return Costs(
        table.unit,
        {layer: {one: scale * ms for one, ms in of.items()} for layer, of in table.of.items()},
    )


def _likeness(linear: nn.Linear) -> tuple[object, ...]:
    """A key that is the same for layers that cost the same."""
    weight = linear.weight
    return weight.shape, weight.dtype, weight.device, linear.bias is None


def _per_layer(
    unit: str,
    model: nn.Module,
    sensitivity: Sensitivity,
    measure: Callable[[nn.Linear, Sequence[str]], Sequence[float]],
    unpacked: Callable[[nn.Module], float],
) -> Costs:
    """The table of costs; layers with the same `_likeness` are measured once.

    `unpacked` is what a layer costs that no format packs, whatever its pattern. They are told.
    """
    linears = _packable(model, sensitivity, experts=unit == BYTES)
    others = {name: found for name, found in layers_of(model).items() if name not in linears}
    known: dict[tuple[object, ...], Mapping[str, float]] = {}
    table: dict[str, Mapping[str, float]] = {}
    for name, linear in linears.items():
        choices = _choices(sensitivity, name)
        key = (*_likeness(linear), *choices)
        if key not in known:
            with torch.no_grad():
                known[key] = dict(zip(choices, measure(linear, choices), strict=True))
        table[name] = known[key]
    dearest = [name for name in sensitivity.increase if name not in linears]
    for name in dearest:
        table[name] = dict.fromkeys(_choices(sensitivity, name), unpacked(others[name]))
    if dearest:
        some = any(is_expert(others[name]) for name in dearest)
        experts = ", or experts, whose time depends on the routing" if some else ""
        warnings.warn(
            f"{len(dearest)} of {len(table)} sensed layers, first {dearest[0]}, are of kinds that "
            f"no format packs{experts}: a pattern saves no {unit} there, so they stay dense",
            stacklevel=1,
        )
    return Costs(unit, table)


def _packable(
    model: nn.Module, sensitivity: Sensitivity, *, experts: bool = False
) -> dict[str, nn.Linear]:
    """The sensed layers that a format may store, matrices of experts among them or not.

    Raises:
        ValueError: if the model lacks a sensed layer, or a format may store none.
    """
    inside = {
        name: module
        for name, module in layers_of(model).items()
        if not (is_linear(module) or is_conv1d(module) or (experts and is_expert(module)))
    }
    found = [name for name in sensitivity.increase if name not in inside]
    if not found:
        raise ValueError(
            f"no sensed layer is of a kind that a format packs, first "
            f"{next(iter(sensitivity.increase), None)}: give a budget in parameters"
        )
    return named_linears(model, found)


def _packed_bytes(weight: Tensor, formats: Sequence[str | Format]) -> list[int]:
    fitting = [format for format in map(parse_format, formats) if format.why_not(weight) is None]
    return [format.pack(weight).nbytes for format in fitting]


def _choices(sensitivity: Sensitivity, layer: str) -> list[str]:
    """The choices of a layer: dense, and the patterns that it can have."""
    found = sensitivity.increase[layer]
    return [DENSE_CHOICE, *(one for one in sensitivity.patterns if found[one] is not None)]


def _copy(linear: nn.Linear, choice: str) -> nn.Linear:
    copy = deepcopy(linear)
    copy.weight.copy_(_pruned(linear.weight, choice))
    return copy


def _pruned(weight: Float[Tensor, "out in"], choice: str) -> Float[Tensor, "out in"]:
    """The weight pruned by magnitude, and rounded: costs depend on how many zeros, not on which."""
    if choice == DENSE_CHOICE:
        return weight
    found = parse_choice(choice)
    return found.applied(weight, found.mask(weight.float().abs()))


def _time(layer: LayerReport, *, dense: bool) -> float:
    """Milliseconds of a call, summed over the numbers of tokens: dense, or as the layer runs."""
    microseconds = 0.0
    for one in layer.measured:
        name = DENSE if dense else one.fastest_sparse
        assert name is not None
        microseconds += dict(one.microseconds)[name]
    return microseconds / 1e3
