"""Every way to run one linear layer here, dense and packed: what is measured against what."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.float64 import in_float64
from secateur.core.memory import is_out_of_memory
from secateur.formats.contract import Format, Packed
from secateur.formats.format import dequantised
from secateur.formats.kernels.cusparselt_child import NoSearch
from secateur.formats.linear import REFERENCE, SparseLinear
from secateur.formats.pack import packed_linear

DENSE = "dense"
PREPACKED = "dense prepacked"
ROWS_AT_ONCE = 4096  # of a weight in float64: a vocabulary of 128,000 x 4096 would take 4 GB whole
TOKENS_CHECKED = 128  # spread over the input; float64 of 4096 tokens can take a GPU seconds
OUT_OF_MEMORY = "ran out of memory"
NOT_SEARCHED = "was not searched"
PASSING = (OUT_OF_MEMORY, NOT_SEARCHED)  # what is no verdict for later

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer. `make()` is a fresh copy of it with weights of its own.

    `holds` are the bytes of each tensor of the weight that it holds, of which a launch reads those
    in `reads`. `quantised` is the packed weight that the result is held to instead of the layer's
    own, for a format that rounds.
    """

    name: str
    make: Callable[[], Run]
    holds: Mapping[str, int]
    reads: tuple[str, ...]
    quantised: Packed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return sum(self.holds.values())

    @property
    def read(self) -> int:
        """Bytes of the weight that a launch reads."""
        return sum(self.holds[name] for name in self.reads)


def dense_candidates(linear: nn.Linear, tokens: int) -> list[Candidate]:
    """The layer as it is, and on a CPU with its weight prepacked, as compiled, frozen code has it.

    Prepacked is the baseline that a speed-up has to be measured against: eager `nn.Linear` can be
    2x slower than the same multiplication with its weight rearranged once.
    """
    holds, reads = {"weight": linear.weight.nbytes}, ("weight",)
    found = [Candidate(DENSE, lambda: deepcopy(linear), holds, reads)]
    prepack = _prepacker(linear, tokens)
    if prepack is not None:
        found.append(Candidate(PREPACKED, prepack, holds, reads))
    return found


def sparse_candidates(
    linear: nn.Linear, format: Format, tokens: int
) -> tuple[list[Candidate], list[str]]:
    """Every implementation of the format that can run this layer, and why the others cannot.

    The reference is left out: it unpacks at every call and is never faster.
    """
    layer = packed_linear("", linear, format, REFERENCE)
    problems = why_not_each(layer, tokens)
    reasons = [problem for problem in problems.values() if problem is not None]
    if not problems:
        reasons.append(f"{format} has no implementation but the reference here")
    found, failed = packed_candidates(layer, tokens)
    return found, reasons + failed


def why_not_each(layer: SparseLinear, tokens: int, searches: bool = True) -> dict[str, str | None]:
    """For each implementation but the reference: None if it can run here, else the reason.

    Without `searches`, those that search are left out, too.
    """
    reasons = dict[str, str | None]()
    for entry in layer.format.implementations[:-1]:
        name = f"{layer.format} {entry.name}"
        reasons[name] = entry.why_not(layer.held, tokens)
        if reasons[name] is None and entry.searches and not searches:
            reasons[name] = (
                f"{name} was not tried: it holds the weight a second time, and its algorithm has "
                "to be searched, which takes minutes: policy='fastest' does"
            )
    return reasons


def packed_candidates(
    layer: SparseLinear, tokens: int, searches: bool = True
) -> tuple[list[Candidate], list[str]]:
    """The implementations that can run this layer, and what those said that could not arrange it.

    Without `searches`, none of those that search. Cost: one arrangement of each.
    """
    quantised = None if layer.format.is_exact else layer.packed
    known = {entry.name: entry for entry in layer.format.implementations}
    found, failed = list[Candidate](), list[str]()
    for name, problem in why_not_each(layer, tokens, searches).items():
        if problem is not None:
            continue
        short = name.removeprefix(f"{layer.format} ")
        try:
            one = _arranged(layer, short, tokens)
        except (RuntimeError, ValueError, MemoryError) as raised:
            failed.append(failure(name, raised))
            continue
        make, reads = partial(deepcopy, one), known[short].reads(layer.format)
        found.append(Candidate(name, make, one.held_bytes, reads, quantised))
    return found, failed


def admitted(
    candidates: Sequence[Candidate], linear: nn.Linear, x: Float[Tensor, "tokens in"]
) -> tuple[list[Candidate], list[str]]:
    """The candidates whose result on x is right, and why the others were dropped.

    Right is an error, against float64, of at most twice that of the dense layer plus one rounding
    of the result and of the sums behind it. Where a format rounds weights or activations, float64
    is that of its packed weight, and instead of the dense layer it is the format's own reference
    that sets the error: what rounding costs the model is not for a machine to judge. A candidate
    that raises is dropped with what it said. Of many tokens some are compared.
    """
    kept, reasons = list[Candidate](), list[str]()
    targets: dict[int | None, tuple[Tensor, float]] = {}
    rows = (
        torch.linspace(
            0, len(x) - 1, min(len(x), TOKENS_CHECKED), dtype=torch.float32, device="cpu"
        )
        .round()
        .long()
        .to(x.device)
    )
    for candidate in candidates:
        of = None if candidate.quantised is None else id(candidate.quantised)
        if of not in targets:
            targets[of] = _target(linear, candidate.quantised, x[rows])
        exact, allowed = targets[of]
        try:
            result = candidate.make()(x)
            error = float((in_float64(result[rows]) - exact).abs().max())
            finite = bool(result.isfinite().all())
        except (RuntimeError, ValueError, MemoryError) as problem:
            reasons.append(failure(candidate.name, problem))
            continue
        if error <= allowed and finite:  # False for nan
            kept.append(candidate)
        elif error <= allowed:
            reasons.append(f"{candidate.name} is wrong: its result is not finite")
        else:
            reasons.append(
                f"{candidate.name} is wrong by {error:.1e} where {allowed:.1e} is allowed"
            )
    return kept, reasons


def runs(candidates: Sequence[Candidate], copies: int) -> Mapping[str, list[Run]]:
    """For each candidate, as many copies of it as there is room for."""
    return {candidate.name: [candidate.make() for _ in range(copies)] for candidate in candidates}


def _target(
    linear: nn.Linear, quantised: Packed | None, x: Tensor
) -> tuple[Float[Tensor, "tokens out"], float]:
    """The result in float64 and the error allowed against it."""
    if quantised is None:
        exact, magnitude = _exact(linear.weight.detach(), linear.bias, x)
        usual = torch.nn.functional.linear(x, linear.weight, linear.bias)
    else:
        exact, magnitude = _exact(dequantised(quantised), linear.bias, x)
        usual = quantised.format.implementations[-1].linear(x, quantised, linear.bias)
    error = float((in_float64(usual) - exact).abs().max())
    return exact, 2 * (error + _rounding(x.dtype, exact, magnitude))


def _exact(
    weight: Tensor, bias: Tensor | None, x: Tensor
) -> tuple[Float[Tensor, "tokens out"], float]:
    """The result in float64, and the largest sum of magnitudes behind it, some rows at a time."""
    wide, results, magnitude = in_float64(x), list[Tensor](), 0.0
    for part in weight.split(ROWS_AT_ONCE):
        rows = in_float64(part).t()
        results.append(wide @ rows)
        magnitude = max(magnitude, float((wide.abs() @ rows.abs()).max()))
    result = torch.cat(results, dim=1)
    return result if bias is None else result + in_float64(bias.detach()), magnitude


def _rounding(dtype: torch.dtype, exact: Tensor, magnitude: float) -> float:
    """One rounding of the largest result to the dtype, and of its sum of magnitudes to float32.

    Without the second term a plain row-by-row float32 sum, rightly computed, would not be admitted
    beside a blocked one. 16-bit inputs are summed in float32 by every implementation.
    """
    summed = torch.promote_types(dtype, torch.float32)
    result = float(exact.abs().max())
    return torch.finfo(dtype).eps * result + torch.finfo(summed).eps * magnitude


def _arranged(layer: SparseLinear, implementation: str, tokens: int) -> SparseLinear:
    copy = deepcopy(layer)
    copy.use(((implementation, tokens), ("reference", None)))
    return copy


def _prepacker(linear: nn.Linear, tokens: int) -> Callable[[], Run] | None:
    """Makes the multiplication with MKL's own arrangement of the weight, where MKL has one."""
    weight, bias = linear.weight.detach(), linear.bias
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (usable and torch.backends.mkl.is_available()):
        return None

    def make() -> Run:
        original = weight.clone()
        arranged = torch.ops.mkl._mkl_reorder_linear_weight(original, tokens)
        offset = None if bias is None else bias.detach()

        def run(x: Tensor) -> Tensor:
            result: Tensor = torch.ops.mkl._mkl_linear(x, arranged, original, offset, tokens)
            return result

        return run

    return make


def failure(name: str, problem: BaseException) -> str:
    """What a report says of a candidate that raised; see `PASSING`."""
    what = OUT_OF_MEMORY if is_out_of_memory(problem) else "failed"
    what = NOT_SEARCHED if isinstance(problem, NoSearch) else what
    return f"{name} {what}: {first_line(problem)}"


def first_line(problem: BaseException) -> str:
    """What went wrong, without the trace that some messages carry."""
    return str(problem).partition("\n")[0] or type(problem).__name__
