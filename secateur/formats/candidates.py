"""Every way to run one linear layer here, dense and packed: what is measured against what."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.formats.contract import Packed, packed_bytes
from secateur.formats.format import Format, dequantised
from secateur.formats.linear import SparseLinear
from secateur.formats.pack import packed_linear

DENSE = "dense"
PREPACKED = "dense prepacked"
ROWS_AT_ONCE = 4096  # of a weight in float64: a vocabulary of 128,000 x 4096 would take 4 GB whole

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer. `make()` is a fresh copy of it with weights of its own.

    `quantised` is the packed weight that the result is held to instead of the layer's own, for a
    format that rounds weights to a grid.
    """

    name: str
    make: Callable[[], Run]
    nbytes: int
    quantised: Packed | None = None


def dense_candidates(linear: nn.Linear, tokens: int) -> list[Candidate]:
    """The layer as it is, and on a CPU with its weight prepacked, as compiled, frozen code has it.

    Prepacked is the baseline that a speed-up has to be measured against: eager `nn.Linear` can be
    2x slower than the same multiplication with its weight rearranged once.
    """
    nbytes = linear.weight.nbytes
    found = [Candidate(DENSE, lambda: deepcopy(linear), nbytes)]
    prepack = _prepacker(linear, tokens)
    if prepack is not None:
        found.append(Candidate(PREPACKED, prepack, nbytes))
    return found


def sparse_candidates(
    linear: nn.Linear, format: Format, tokens: int
) -> tuple[list[Candidate], list[str]]:
    """Every implementation of the format that can run this layer, and why the others cannot.

    The reference is left out: it unpacks at every call and is never faster.
    """
    layer = packed_linear("", linear, format)
    quantised = None if format.is_exact else layer.packed
    found, reasons = list[Candidate](), list[str]()
    for implementation in format.folder.IMPLEMENTATIONS:
        if implementation.name == "reference":
            continue
        problem = implementation.why_not(layer.packed, tokens)
        if problem is not None:
            reasons.append(problem)
            continue
        make = _maker(layer, implementation.name, tokens)
        nbytes = packed_bytes(layer.packed)
        found.append(Candidate(f"{format} {implementation.name}", make, nbytes, quantised))
    if not found and not reasons:
        reasons.append(f"{format} has no implementation but the reference here")
    return found, reasons


def admitted(
    candidates: Sequence[Candidate], linear: nn.Linear, x: Float[Tensor, "tokens in"]
) -> tuple[list[Candidate], list[str]]:
    """The candidates whose result on x is right, and why the others were dropped.

    Right is an error, against float64, of at most twice that of the dense layer plus one rounding
    of the result and of the sums behind it. Where a format rounds weights to a grid the dense layer
    is that of the rounded weight: what rounding costs the model is not for a machine to judge. A
    candidate that raises is dropped with what it said.
    """
    kept, reasons = list[Candidate](), list[str]()
    targets: dict[int | None, tuple[Tensor, float]] = {}
    for candidate in candidates:
        of = None if candidate.quantised is None else id(candidate.quantised)
        if of not in targets:
            targets[of] = _target(linear, candidate.quantised, x)
        exact, allowed = targets[of]
        try:
            error = float((candidate.make()(x) - exact).abs().max())
        except (RuntimeError, ValueError, MemoryError) as problem:  # a GPU's out of memory too
            reasons.append(f"{candidate.name} failed: {first_line(problem)}")
            continue
        if error <= allowed:  # False for nan
            kept.append(candidate)
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
    own = linear.weight.detach()
    weight = own if quantised is None else dequantised(quantised)
    exact, magnitude = _exact(weight, linear.bias, x)
    dense = torch.nn.functional.linear(x, weight.to(own.dtype), linear.bias)
    error = float((dense - exact).abs().max())
    return exact, 2 * (error + _rounding(x.dtype, exact, magnitude))


def _exact(
    weight: Tensor, bias: Tensor | None, x: Tensor
) -> tuple[Float[Tensor, "tokens out"], float]:
    """The result in float64, and the largest sum of magnitudes behind it, some rows at a time."""
    wide, results, magnitude = x.double(), list[Tensor](), 0.0
    for part in weight.split(ROWS_AT_ONCE):
        rows = part.double().t()
        results.append(wide @ rows)
        magnitude = max(magnitude, float((wide.abs() @ rows.abs()).max()))
    result = torch.cat(results, dim=1)
    return result if bias is None else result + bias.detach().double(), magnitude


def _rounding(dtype: torch.dtype, exact: Tensor, magnitude: float) -> float:
    """One rounding of the largest result to the dtype, and of its sum of magnitudes to float32.

    Without the second term a plain row-by-row float32 sum, rightly computed, would not be admitted
    beside a blocked one. 16-bit inputs are summed in float32 by every implementation.
    """
    summed = torch.promote_types(dtype, torch.float32)
    result = float(exact.abs().max())
    return torch.finfo(dtype).eps * result + torch.finfo(summed).eps * magnitude


def _maker(layer: SparseLinear, implementation: str, tokens: int) -> Callable[[], Run]:
    def make() -> Run:
        copy = deepcopy(layer)
        copy.use(((implementation, tokens), ("reference", None)))
        return copy

    return make


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


def first_line(problem: BaseException) -> str:
    """What went wrong, without the trace that some messages carry."""
    return str(problem).partition("\n")[0] or type(problem).__name__
