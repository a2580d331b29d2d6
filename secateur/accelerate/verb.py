"""`accelerate_`: measures every layer dense and packed on this machine; keeps what is faster."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.accelerate.advice import blocks_that_gain
from secateur.accelerate.candidates import (
    DENSE,
    PASSING,
    Candidate,
    admitted,
    dense_candidates,
    failure,
    first_line,
    packed_candidates,
    why_not_each,
)
from secateur.accelerate.choices import Policy
from secateur.accelerate.decision import POLICIES, Decision, decide
from secateur.accelerate.experts import ON_A_GPU, judge_, often_chosen
from secateur.accelerate.layer_report import LayerReport
from secateur.accelerate.measurements import Measurement, lookup, store
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.tokens import Day, Tokens, day_of
from secateur.core.autocast import without_autocast
from secateur.core.progress import progress
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.weights import DTYPES, adapters, require_module, tied_weights
from secateur.core.wrappers import unwrapped
from secateur.formats.contract import Format
from secateur.formats.experts import closed_experts
from secateur.formats.format import parse_format, weight_error
from secateur.formats.fuse import fuse_activations_
from secateur.formats.kernels.cusparselt_child import one_child
from secateur.formats.kernels.timing import (
    Calls,
    Timing,
    VariantFailed,
    compare,
    copies_for,
    copies_on,
)
from secateur.formats.linear import REFERENCE, SparseLinear
from secateur.formats.pack import (
    bytes_of,
    linear_at,
    linears_of,
    named_linears,
    packed_linear,
    packed_share,
    swap,
    why_not_layer,
)

DEFAULT_FORMATS = ("semi24", "semi48", "block:64x64", "block:32x32", "block:16x16", "bitmap", "csr")
# A 2:4 weight is at most 4:8 too, takes as many bytes so and more instructions: it is not measured.
NARROWER = {"semi48": "semi24"}
ALIKE = 0.01  # layers of one shape whose densities agree to this are measured once
MOST_SPREAD = 0.5  # of a median between quartiles; on a busier machine times serve this call alone

Timer = Callable[[Mapping[str, Calls], torch.device], Mapping[str, Timing]]
Likeness = tuple[
    tuple[Format, ...], tuple[int, ...], torch.Size, torch.dtype, torch.device, bool, bool
]


def accelerate_(
    model: nn.Module,
    tokens: Tokens = (1, 16),
    formats: Sequence[str | Format] | None = None,
    layers: Sequence[str] | None = None,
    strict: bool = False,
    policy: Policy = "memory",
    remeasure: bool = False,
) -> AccelerateReport:
    """What was measured, layer by layer; layers that are faster packed are now `SparseLinear`.

    Each distinct layer is timed here, dense and in every format that fits its zeros, at each number
    of tokens that the model will be called with: on a GPU by device time in a CUDA graph. `tokens`
    may say how often each number occurs (`{1: 1000, 2048: 1}`). A layer changes to what makes all
    these calls together shortest; without frequencies each number counts for an equal share of the
    dense layer's time. It changes only if its result is right, it is at least 5 % faster than eager
    *and* than prepacked dense at one of these numbers, and slower (3 %) at none, however rare. Each
    number runs the implementation that was fastest there, and those between what the next larger
    one runs. Where dense wins, dense stays. All is measured before anything is changed.

    With the policy "memory" a layer holds its packed weight once, to 2 %. With "fastest" it may
    hold further copies, in orders that other implementations read, where these are faster. The
    report says what the other policy would take and hold.

    Only exact formats are tried unless `formats` names others, such as `"semi24_int4"`, which
    rounds weights to a grid, or `"semi24_int8_dynamic"`, which rounds inputs too. Then a right
    result is as near to that of the rounded weight as the format's reference, and the report
    says how far the weight is from the layer's own. Dense formats that round (`"int4"`) are
    measured beside them if they are listed, and the format whose calls are shortest wins.

    Where what a layer runs can apply the activation that follows it (`fc1`, then `gelu`), the layer
    does so from then on, which saves a pass over its results.

    Where no layer gains on a CPU, a random layer with blocks of zeros is measured beside them, and
    the report's `advice` says what would be faster here.

    Measurements are kept on disk beside the compiled kernels, unless the machine was too busy, and
    a like layer on a like device is not measured again; `remeasure` does.

    Cost: seconds per distinct layer, once; 256 MB of copies on a CPU, or one of each candidate if
        that is more; on a GPU as much for each candidate.
    Raises: ValueError for unknown layers, formats or policies, numbers of tokens or frequencies
        that are none, and weights that are computed (a
        mask of torch.nn.utils.prune, a parametrization) or have no data; with `strict`, if no layer
        gains, or one that is listed in `layers` does not. Then, and if it is interrupted, the model
        is unchanged; what was measured is kept.
    """
    with all_or_nothing() as undo:
        report = _accelerate(
            undo, model, tokens, formats, layers, strict, compare, policy, remeasure
        )
    return replace(report, advice=_advice(unwrapped(model), report))


@torch.inference_mode(False)  # or the packed tensors could not be trained around
def _accelerate(
    undo: Undo,
    model: nn.Module,
    tokens: Tokens,
    formats: Sequence[str | Format] | None,
    layers: Sequence[str] | None,
    strict: bool,
    timer: Timer,
    policy: Policy = "memory",
    remeasure: bool = False,
) -> AccelerateReport:
    day = day_of(tokens)
    require_module(model)
    model = unwrapped(model)
    if policy not in POLICIES:
        raise ValueError(
            f"accelerate_ needs the policy 'memory' or 'fastest', got {policy!r}: name one of them"
        )
    tried = [parse_format(format) for format in (DEFAULT_FORMATS if formats is None else formats)]
    linears = _linears(model) if layers is None else named_linears(model, layers)
    left = adapters(model) if layers is None else {}
    experts = closed_experts(model)
    left |= {n: ON_A_GPU for n, m in linears.items() if m.weight.is_cuda and _is_in(n, experts)}
    groups, skipped = _groups(model, linears, tried, left)
    decisions: dict[str, tuple[str, Decision]] = {}
    with one_child():  # that searches what a library has, if that has to be searched
        for like, names in progress(groups.items(), "measure", unit="layer"):
            layer = linears[names[0]]
            with torch.no_grad(), without_autocast(layer.weight.device):
                decision = _measured_decision(layer, like, day, timer, policy, remeasure)
            decisions |= dict.fromkeys(names, (names[0], decision))
    packed = _packed_(linears, decisions)
    for name, judged in judge_(experts, packed, day, timer).items():
        measured_on, alone = decisions[name]
        told = replace(alone, reason=f"{alone.reason}; {judged.told}")
        decisions[name] = measured_on, told if judged.gain else _dense(alone, judged.told)
    report = AccelerateReport(
        device=_device_name(next(iter(linears.values())).weight.device),
        threads=torch.get_num_threads(),
        tokens=day.tokens,
        layers=tuple(
            _skipped(name, linear, skipped[name])
            if name in skipped
            else replace(
                _measured(name, linear, *decisions[name], packed.get(name)),
                chosen=often_chosen(experts, name, day),
            )
            for name, linear in linears.items()
        ),
        often=day.often,
        policy=policy,
        dense_formats=_dense_formats(groups),
        model_bytes=bytes_of(model),
    )
    if strict:
        _demand_gains(report, layers)
    swap(model, packed, undo)
    share = packed_share(model) if report.changed else ""
    return replace(report, fused=fuse_activations_(model, undo), coverage=share)


def _packed_(
    linears: Mapping[str, nn.Linear], decisions: dict[str, tuple[str, Decision]]
) -> dict[str, SparseLinear]:
    """The layers as they were decided on; the decision on one that cannot be packed is dense."""
    packed: dict[str, SparseLinear] = {}
    for name, (measured_on, decision) in decisions.items():
        if decision.format is not None:
            try:
                packed[name] = packed_linear(name, linears[name], decision.format, decision.table)
            except (RuntimeError, ValueError, MemoryError) as problem:  # no room, most likely
                reason = f"{decision.format} was faster, but {failure('packing it', problem)}"
                decisions[name] = measured_on, _dense(decision, reason)
    return packed


def _dense(decision: Decision, reason: str) -> Decision:
    """To stay dense for this reason, whatever was faster."""
    return replace(decision, format=None, table=(), reason=reason, other=None)


def _is_in(layer: str, modules: Iterable[str]) -> bool:
    return any(layer.startswith(f"{module}.") for module in modules)


def _advice(model: nn.Module, report: AccelerateReport) -> str:
    """What would be faster on this CPU; nothing where something is, or nothing was measured."""
    left = [layer.layer for layer in report.layers if layer.format == DENSE]
    weights = [linear.weight.detach() for linear in named_linears(model, left).values()]
    usable = [weight for weight in weights if _why_unmeasurable(weight) is None]
    if report.changed or not usable or any(weight.is_cuda for weight in usable):
        return ""
    return blocks_that_gain(
        [(weight.shape[0], weight.shape[1]) for weight in usable],
        usable[0].dtype,
        report.tokens,
        lambda layer, format: _tried(layer, format, report),
    )


def _tried(layer: nn.Module, format: str, of: AccelerateReport) -> AccelerateReport:
    tokens = dict(zip(of.tokens, of.often, strict=True)) if of.often else of.tokens
    with all_or_nothing() as undo:
        return _accelerate(undo, layer, tokens, [format], None, False, compare, of.policy)


def _groups(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    formats: Sequence[Format],
    left: Mapping[str, str],
) -> tuple[dict[Likeness, list[str]], dict[str, str]]:
    """Layers that one measurement stands for, and why the others are not measured at all.

    Alike are layers of one shape, dtype, device and bias that fit the same formats with the same
    density.
    """
    tied = tied_weights(model)
    groups: dict[Likeness, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, linear in progress(linears.items(), "look", unit="layer"):
        weight = linear.weight.detach()
        module = linear_at(model, name, linears)
        problem = left.get(name) or why_not_layer(name, module, tied) or _why_unmeasurable(weight)
        if problem is not None:
            skipped[name] = problem
            continue
        misfits = {format: format.why_not(weight) for format in formats}
        names = {str(format) for format in formats if misfits[format] is None}
        fitting = tuple(
            format
            for format in formats
            if misfits[format] is None and NARROWER.get(str(format)) not in names
        )
        if fitting:
            densities = tuple(round(format.density(weight) / ALIKE) for format in fitting)
            like = (fitting, densities, weight.shape, weight.dtype, weight.device)
            same = (*like, linear.bias is None, weight.is_contiguous())
            groups.setdefault(same, []).append(name)
        elif int(weight.count_nonzero()) == weight.numel():
            skipped[name] = "its weight has no zeros"
        else:
            skipped[name] = "; ".join(filter(None, misfits.values()))
    return groups, skipped


def _dense_formats(groups: Mapping[Likeness, Sequence[str]]) -> tuple[str, ...]:
    """The formats that store every weight, rounded: what sparse ones that round have to beat."""
    full = round(1 / ALIKE)
    found = [
        str(format)
        for formats, densities, *_ in groups
        for format, density in zip(formats, densities, strict=True)
        if density == full and not format.is_exact
    ]
    return tuple(dict.fromkeys(found))


def _key(like: Likeness) -> str:
    """A layer's likeness as the file of measurements has it: `64x64 bfloat16 bias: semi24 50%`."""
    formats, densities, (out, width), dtype, _, biasless, contiguous = like
    stored = (f"{format} {share}%" for format, share in zip(formats, densities, strict=True))
    bias = "no bias" if biasless else "bias"
    strided = "" if contiguous else ", strided"
    return f"{out}x{width} {str(dtype).removeprefix('torch.')} {bias}{strided}: {', '.join(stored)}"


def _measured_decision(
    linear: nn.Linear,
    like: Likeness,
    day: Day,
    timer: Timer,
    policy: Policy,
    remeasure: bool,
) -> Decision:
    """The format whose day is shortest, or none, from measurements."""
    device, key, found = linear.weight.device, _key(like), list[Measurement]()
    searches = policy == "fastest"  # what is searched holds the weight a second time
    try:
        layers = {format: packed_linear("", linear, format, REFERENCE) for format in like[0]}
        for count in day.tokens:
            known = None if remeasure else lookup(device, key, count)
            if known is None or known.cannot != _cannot(layers.values(), count, searches):
                known = _times(linear, layers, count, timer, searches)
                passing = any(word in why for word in PASSING for why in known.dropped)
                if known.steady and not passing:
                    store(device, key, count, known)
            found.append(known)
    except (RuntimeError, MemoryError) as problem:  # dense itself failed: no room, most likely
        return Decision(None, (), (), f"could not be measured: {first_line(problem)}")
    return decide(layers, day, found, linear.weight.nbytes, policy)


def _times(
    linear: nn.Linear,
    layers: Mapping[Format, SparseLinear],
    tokens: int,
    timer: Timer,
    searches: bool,
) -> Measurement:
    """Median microseconds of every candidate that works, and why the others do not.

    Raises: RuntimeError or MemoryError if dense itself cannot be measured.
    """
    weight = linear.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(
        tokens, linear.in_features, generator=generator, device=weight.device, dtype=torch.float32
    )
    x = x.to(weight.dtype)
    sparse, dropped = list[Candidate](), list[str]()
    for layer in layers.values():
        candidates, failed = packed_candidates(layer, tokens, searches)
        sparse += candidates
        dropped += failed
    kept, wrong = admitted(sparse, linear, x)
    dropped += wrong
    calls = dict[str, Calls]()
    everything = [*dense_candidates(linear, tokens), *kept]
    for candidate in everything:
        try:
            copies = _copies(candidate, everything, weight.device)
            calls[candidate.name] = [partial(candidate.make(), x) for _ in range(copies)]
        except (RuntimeError, ValueError, MemoryError) as problem:
            if candidate.name == DENSE:
                raise
            dropped.append(failure(candidate.name, problem))
    timings: Mapping[str, Timing] | None = None
    while timings is None:
        try:
            timings = timer(calls, weight.device)
        except VariantFailed as failed_one:
            if failed_one.variant == DENSE:
                raise
            del calls[failed_one.variant]
            dropped.append(failure(failed_one.variant, failed_one.problem))
    return Measurement(
        {name: timing.median_us for name, timing in timings.items()},
        _cannot(layers.values(), tokens, searches),
        tuple(dropped),
        steady=max(timing.spread for timing in timings.values()) <= MOST_SPREAD,
    )


def _copies(candidate: Candidate, everything: Sequence[Candidate], device: torch.device) -> int:
    if device.type == "cuda":
        return copies_on(device, candidate.read, candidate.nbytes, len(everything))
    return copies_for(sum(one.read for one in everything))


def _cannot(layers: Iterable[SparseLinear], tokens: int, searches: bool) -> dict[str, str]:
    """What implementations say that cannot run these layers here, by candidate."""
    problems = [item for layer in layers for item in why_not_each(layer, tokens, searches).items()]
    return {name: problem for name, problem in problems if problem is not None}


def _measured(
    name: str,
    linear: nn.Linear,
    measured_on: str,
    decision: Decision,
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
        table=decision.table,
        stored=decision.stored,
        cannot=decision.cannot,
        dropped=decision.dropped,
        other=decision.other,
    )


def _skipped(name: str, linear: nn.Linear, reason: str) -> LayerReport:
    shape, nbytes = (linear.out_features, linear.in_features), linear.weight.nbytes
    return LayerReport(name, shape, DENSE, (), name, nbytes, nbytes, reason)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    linears = linears_of(model)
    if not linears:
        raise ValueError("accelerate_ needs a model with nn.Linear layers, got none: nothing to do")
    return named_linears(model, list(linears))


def _why_unmeasurable(weight: Tensor) -> str | None:
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device.type}, where nothing can be measured"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, which no format stores"
    if weight.numel() == 0:
        return "its weight is empty"
    if not bool(weight.isfinite().all()):
        return "its weight is not finite"
    return None


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
