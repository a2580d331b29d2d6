"""`accelerate_`: measures every layer dense and packed on this machine; keeps what is faster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secateur.accelerate_report import AccelerateReport, LayerReport, Measured, measured_for
from secateur.formats.candidates import (
    DENSE,
    Candidate,
    admitted,
    dense_candidates,
    first_line,
    runs,
    sparse_candidates,
)
from secateur.formats.contract import DTYPES
from secateur.formats.format import Format, parse_format, weight_error
from secateur.formats.linear import SparseLinear, Table
from secateur.formats.pack import (
    named_linears,
    packed_linear,
    swap,
    weight_owners,
    why_not_layer,
)
from secateur.kernels.timing import Timing, compare, copies_for

LEAST_GAIN = 1.05  # medians on a quiet machine repeat to about 3 %; less than 5 % may be noise
DEFAULT_FORMATS = ("semi24", "block:64x64", "block:32x32", "block:16x16", "csr")
ALIKE = 0.01  # layers of one shape whose densities agree to this are measured once

Timer = Callable[..., Mapping[str, Timing]]
Likeness = tuple[tuple[Format, ...], tuple[int, ...], torch.Size, torch.dtype, torch.device, bool]


@dataclass(frozen=True)
class _Decision:
    format: Format | None
    table: Table
    measured: tuple[Measured, ...]
    reason: str


def accelerate_(
    model: nn.Module,
    tokens: Sequence[int] = (1, 16),
    formats: Sequence[str | Format] | None = None,
    layers: Sequence[str] | None = None,
    strict: bool = False,
) -> AccelerateReport:
    """What was measured, layer by layer; layers that are faster packed are now `SparseLinear`.

    Each distinct layer is timed here, dense and in every format that fits its zeros, at each number
    of tokens that the model will be called with. A layer changes only if its result is right and it
    is at least 5 % faster than eager *and* than prepacked dense at every one of them; where dense
    wins, dense stays. All is measured before anything is changed.

    Only exact formats are tried unless `formats` names others: `"semi24_int4"`, `"semi24_int8"` and
    `"semi24_fp8"` round weights to a grid. Then a right result is that of the rounded weight, and
    the report says how far it is from the layer's own.

    Cost: seconds per distinct layer; 256 MB of copies, or one of each candidate if that is more.
    Raises: ValueError for unknown layers or formats; with `strict`, if no layer gains, or one that
        is listed in `layers` does not. Then, and if it is interrupted, the model is unchanged.
    """
    return _accelerate(model, tokens, formats, layers, strict, compare)


def _accelerate(
    model: nn.Module,
    tokens: Sequence[int],
    formats: Sequence[str | Format] | None,
    layers: Sequence[str] | None,
    strict: bool,
    timer: Timer,
) -> AccelerateReport:
    counts = _checked_tokens(tokens)
    tried = [parse_format(format) for format in (DEFAULT_FORMATS if formats is None else formats)]
    linears = _linears(model) if layers is None else named_linears(model, layers)
    groups, skipped = _groups(model, linears, tried)
    decisions: dict[str, tuple[str, _Decision]] = {}
    for (fitting, *_), names in tqdm(groups.items(), desc="measure", unit="layer", disable=None):
        with torch.no_grad():
            decision = _decide(linears[names[0]], fitting, counts, timer)
        decisions |= dict.fromkeys(names, (names[0], decision))
    packed = {
        name: _packed(name, linears[name], decision)
        for name, (_, decision) in decisions.items()
        if decision.format is not None
    }
    report = AccelerateReport(
        device=_device_name(next(iter(linears.values())).weight.device),
        threads=torch.get_num_threads(),
        tokens=counts,
        layers=tuple(
            _skipped(name, linear, skipped[name])
            if name in skipped
            else _measured(name, linear, *decisions[name], packed.get(name))
            for name, linear in linears.items()
        ),
    )
    if strict:
        _demand_gains(report, layers)
    swap(model, packed)
    return report


def _groups(
    model: nn.Module, linears: Mapping[str, nn.Linear], formats: Sequence[Format]
) -> tuple[dict[Likeness, list[str]], dict[str, str]]:
    """Layers that one measurement stands for, and why the others are not measured at all.

    Alike are layers of one shape, dtype, device and bias that fit the same formats with the same
    density.
    """
    owners = weight_owners(model)
    groups: dict[Likeness, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, linear in tqdm(linears.items(), desc="look", unit="layer", disable=None):
        weight = linear.weight.detach()
        problem = why_not_layer(name, linear, owners) or _unmeasurable(weight)
        if problem is not None:
            skipped[name] = problem
            continue
        misfits = {format: format.why_not(weight) for format in formats}
        fitting = tuple(format for format in formats if misfits[format] is None)
        if fitting:
            densities = tuple(round(format.density(weight) / ALIKE) for format in fitting)
            like = (fitting, densities, weight.shape, weight.dtype, weight.device)
            groups.setdefault((*like, linear.bias is None), []).append(name)
        else:
            skipped[name] = "; ".join(filter(None, misfits.values()))
    return groups, skipped


def _decide(
    linear: nn.Linear, formats: Sequence[Format], tokens: tuple[int, ...], timer: Timer
) -> _Decision:
    """The format that gains most over all numbers of tokens, or none, from measurements."""
    reasons: dict[str, None] = {}  # in order, each once
    times: dict[int, dict[str, float]] = {}
    for count in tokens:
        try:
            times[count], dropped = _times(linear, formats, count, timer)
        except (RuntimeError, MemoryError) as problem:  # no room for the copies, most likely
            return _Decision(None, (), (), f"could not be measured: {first_line(problem)}")
        reasons |= dict.fromkeys(dropped)
    best: tuple[float, Format, tuple[Measured, ...]] | None = None
    for format in formats:
        measured = tuple(measured_for(f"{format} ", count, times[count]) for count in tokens)
        gain = prod(entry.ratio for entry in measured)
        if min(entry.ratio for entry in measured) >= LEAST_GAIN and (not best or gain > best[0]):
            best = gain, format, measured
    if best is None:
        overall = tuple(measured_for("", count, times[count]) for count in tokens)
        return _Decision(None, (), overall, "; ".join([*_losses(overall), *reasons]))
    _, format, measured = best
    names = [str(entry.fastest_sparse).removeprefix(f"{format} ") for entry in measured]
    table = _table(names, tokens)
    return _Decision(format, table, measured, "faster than dense at every number of tokens")


def _times(
    linear: nn.Linear, formats: Sequence[Format], tokens: int, timer: Timer
) -> tuple[dict[str, float], list[str]]:
    """Median microseconds of every candidate that works, and why the others do not."""
    generator = torch.Generator().manual_seed(0)
    weight = linear.weight
    x = torch.randn(tokens, linear.in_features, generator=generator)
    x = x.to(weight.device, weight.dtype)
    sparse, reasons = list[Candidate](), list[str]()
    for format in formats:
        found, missing = sparse_candidates(linear, format, tokens)
        sparse += found
        reasons += missing
    kept, wrong = admitted(sparse, linear, x)
    everything = [*dense_candidates(linear, tokens), *kept]
    copies = copies_for(sum(candidate.nbytes for candidate in everything))
    calls = {
        name: [partial(run, x) for run in copied]
        for name, copied in runs(everything, copies).items()
    }
    timings = timer(calls, weight.device)
    return {name: timing.median_us for name, timing in timings.items()}, reasons + wrong


def _table(names: Sequence[str], tokens: tuple[int, ...]) -> Table:
    """What was fastest at each number of tokens serves up to it; the last serves all above."""
    rows = list[tuple[str, int | None]]()
    for name, count in zip(names, tokens, strict=True):
        if rows and rows[-1][0] == name:
            rows.pop()
        rows.append((name, count))
    return (*rows[:-1], (rows[-1][0], None))


def _losses(measured: Sequence[Measured]) -> list[str]:
    """Where the fastest sparse candidate does not gain enough."""
    return [
        f"at {entry.tokens} token{'s' * (entry.tokens != 1)} {entry.fastest_sparse} is "
        f"{entry.ratio:.2f}x of the best dense"
        for entry in measured
        if entry.fastest_sparse is not None and entry.ratio < LEAST_GAIN
    ]


def _packed(name: str, linear: nn.Linear, decision: _Decision) -> SparseLinear:
    assert decision.format is not None
    layer = packed_linear(name, linear, decision.format)
    layer.use(decision.table)
    return layer


def _measured(
    name: str,
    linear: nn.Linear,
    measured_on: str,
    decision: _Decision,
    packed: SparseLinear | None,
) -> LayerReport:
    before = linear.weight.nbytes
    return LayerReport(
        layer=name,
        shape=(linear.out_features, linear.in_features),
        format=DENSE if packed is None else str(packed.format),
        measured=decision.measured,
        measured_on=measured_on,
        bytes_before=before,
        bytes_after=before if packed is None else packed.nbytes,
        reason=decision.reason,
        weight_error=0.0 if packed is None else weight_error(linear.weight.detach(), packed.packed),
    )


def _skipped(name: str, linear: nn.Linear, reason: str) -> LayerReport:
    shape, nbytes = (linear.out_features, linear.in_features), linear.weight.nbytes
    return LayerReport(name, shape, DENSE, (), name, nbytes, nbytes, reason)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if not linears:
        raise ValueError("accelerate_ needs a model with nn.Linear layers, got none: nothing to do")
    return named_linears(model, linears)


def _unmeasurable(weight: Tensor) -> str | None:
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device.type}, where nothing can be measured"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, which no format stores"
    if not bool(weight.isfinite().all()):
        return "its weight is not finite"
    if int(weight.count_nonzero()) == weight.numel():
        return "its weight has no zeros"
    return None


def _checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    if not tokens or any(type(count) is not int or count < 1 for count in tokens):
        raise ValueError(
            f"accelerate_ needs numbers of tokens from 1 upwards, got {tokens!r}: "
            "name those that the model will be called with, such as (1, 16)"
        )
    return tuple(sorted(set(tokens)))


def _demand_gains(report: AccelerateReport, layers: Sequence[str] | None) -> None:
    losing = [layer for layer in report.layers if layer.format == DENSE]
    if layers is not None and losing:
        raise ValueError(
            f"accelerate_ with strict needs every listed layer to gain, {losing[0].layer!r} "
            f"does not ({losing[0].reason}): the model is unchanged"
        )
    if not report.sparse:
        raise ValueError(f"accelerate_ with strict needs a gain, got none: {report}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
